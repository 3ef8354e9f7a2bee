"""Seeds: every random draw of a stage comes from the seed and the name of what is drawn."""

import ctypes
import hashlib
import random

import numpy as np
import torch

from rlhf.training import distributed

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**25  # bytes; glibc silently takes no more, and mallopt without effect is slower than none
KEPT = 2**30


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and asks torch for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It also fills new memory, which nothing here reads before it is written: a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has glibc hand freed memory out again rather than return it to the system, whose new pages cost a twentieth of a
    step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def rng_state() -> list[list[torch.Tensor]]:
    """torch's generators of every process, those of its GPU included (dropout draws from them), for a checkpoint."""
    mine = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    return distributed.all_gather(mine)


def restore_rng(state: list[list[torch.Tensor]]) -> None:
    """Sets torch's generators to what `rng_state` returned; a process that was not there then seeds its own."""
    if distributed.rank() >= len(state):
        torch.manual_seed(torch.initial_seed() + distributed.rank())
        return
    mine = state[distributed.rank()]
    torch.set_rng_state(mine[0])
    if len(mine) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine[1])


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of its own for a named purpose, e.g. generator(1, "ppo", "noise", iteration).

    Nothing has to be remembered between steps: step n's draws are a function of the seed and n, so a resumed
    run draws what an uninterrupted one would have.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
