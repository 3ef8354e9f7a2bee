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


def rng_state() -> list[torch.Tensor]:
    """torch's generators, those of the GPUs included (dropout draws from them), for a checkpoint."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def restore_rng(state: list[torch.Tensor]) -> None:
    """Sets torch's generators to what `rng_state` returned on a machine of the same kind."""
    torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of its own for a named purpose, e.g. generator(1, "ppo", "noise", iteration).

    Nothing has to be remembered between steps: step n's draws are a function of the seed and n, so a resumed
    run draws what an uninterrupted one would have.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
