"""What the machine computes fast."""

from functools import cache

import torch

from rlhf.files import is_writer


@cache
def has_bf16() -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    Others do it without instructions for it: on a CPU with AVX2 only a training step takes many times as long.
    """
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not has and is_writer():
        print("precision auto: float32, this machine has no bfloat16 products", flush=True)
    return has


def in_bf16(precision: str) -> bool:
    """Whether matrix products are in bfloat16: for "bf16", and for "auto" where the machine has them."""
    return precision == "bf16" or (precision == "auto" and has_bf16())
