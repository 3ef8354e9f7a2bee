"""torch.compile changes speed, not numbers: the same loss and gradients as the plain passes."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.models import compile_passes, next_token_logits


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "qwen2"])
def test_compiled_passes_give_the_same_loss_and_gradients(make_policy: Callable[..., Any], name: str) -> None:
    found = []
    for on in (False, True):
        model = make_policy(name).train()
        compile_passes(model, on)
        losses = []
        for length in (7, 12, 9):  # lengths differ from batch to batch
            ids = torch.randint(3, 300, (4, length), generator=torch.Generator().manual_seed(length))
            losses.append(next_token_logits(model, ids).log_softmax(-1).gather(2, ids[:, 1:, None]).mean())
        torch.stack(losses).sum().backward()
        found.append(([loss.item() for loss in losses], {key: value.grad for key, value in model.named_parameters()}))
        assert hasattr(model.base_model, "_compiled_call_impl")
        assert (model.base_model._compiled_call_impl is not None) == on
    (plain, gradients), (compiled, ours) = found
    assert compiled == pytest.approx(plain, abs=1e-5)
    for key, value in gradients.items():
        assert torch.allclose(ours[key], value, atol=1e-5), key
