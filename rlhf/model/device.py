"""Where a model computes and in which precision."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from rlhf.training.hardware import in_bf16


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Arithmetic of a forward pass: bfloat16 matrix products where `in_bf16`, plain float32 elsewhere."""
    return torch.autocast(device().type, torch.bfloat16, enabled=in_bf16(precision))
