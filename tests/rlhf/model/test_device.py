"""Precision `auto`: bfloat16 where the machine multiplies in it, float32 where that would be emulated."""

from collections.abc import Iterator

import pytest
import torch

from rlhf.model.device import autocast
from rlhf.training import hardware
from rlhf.training.hardware import has_bf16, in_bf16


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    has_bf16.cache_clear()
    yield
    has_bf16.cache_clear()


@pytest.mark.parametrize("supported", [True, False])
def test_auto_follows_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                          supported: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    with autocast("auto"):
        product = torch.ones(4, 4) @ torch.ones(4, 4)
    assert product.dtype == (torch.bfloat16 if supported else torch.float32)
    in_bf16("auto")
    said = capsys.readouterr().out
    assert said.count("precision auto: float32") == (0 if supported else 1)


def test_what_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda: False)
    assert in_bf16("bf16")
    assert not in_bf16("fp32")
    monkeypatch.setattr(hardware, "has_bf16", lambda: True)
    assert not in_bf16("fp32")
