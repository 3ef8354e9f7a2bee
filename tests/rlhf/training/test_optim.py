"""Muon where the machine has no bfloat16 products: as torch's, in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.training import optim
from rlhf.training.optim import muon_and_adamw, orthogonalised

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_newton_schulz_acts_on_the_singular_values(shape: tuple[int, int]) -> None:
    """Independent: numpy's SVD in float64, the polynomial on each singular value."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a, b, c = COEFFICIENTS
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert np.abs(orthogonalised(matrix, COEFFICIENTS, 5, 1e-7).numpy() - (left * values) @ right).max() < 1e-4


@pytest.mark.parametrize("has_bf16", [True, False])
def test_muon_is_in_float32_only_where_bfloat16_is_emulated(
        monkeypatch: pytest.MonkeyPatch, make_policy: Callable[..., Any], has_bf16: bool) -> None:
    torchs = torch.optim._muon._zeropower_via_newtonschulz
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", torchs)  # puts it back afterwards
    monkeypatch.setattr(optim, "has_bf16", lambda: has_bf16)
    muon, _ = muon_and_adamw(make_policy("gpt_neox"), 1e-3, 0.02, 0.0)
    weight = muon.param_groups[0]["params"][0]
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    muon.step()
    moved = (before - weight.detach()) / 0.02
    exact = orthogonalised(weight.grad, COEFFICIENTS, 5, 1e-7)
    error = float((moved / moved.norm() - exact / exact.norm()).abs().max())
    assert (error < 1e-6) is not has_bf16
    assert error < 0.02
