"""Where a model computes and in which precision."""

from contextlib import AbstractContextManager
from typing import Any

import torch


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Arithmetic of a forward pass: bfloat16 matrix products for "bf16", plain float32 for "fp32"."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")
