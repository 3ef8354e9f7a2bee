"""Seeds: every random draw of a stage comes from the seed and the name of what is drawn."""

import hashlib
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and asks torch for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of its own for a named purpose, e.g. generator(1, "ppo", "noise", iteration).

    Nothing has to be remembered between steps: step n's draws are a function of the seed and n, so a resumed
    run draws what an uninterrupted one would have.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
