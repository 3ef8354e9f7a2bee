"""Seeds: every random draw of a stage depends on the seed and on a name for its purpose."""

import ctypes
import hashlib
import random

import numpy as np
import torch

from rlhf.training import distributed

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_BYTES = 2**25  # glibc's maximum; it silently ignores more
TRIM_BYTES = 2**30


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and asks torch for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode also fills new memory, which takes a tenth of the time; nothing here reads it uninitialised.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the system: fresh pages cost 5 % of a step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)


def rng_state() -> list[list[torch.Tensor]]:
    """The states of torch's CPU and GPU generators (dropout draws from them) of every process, for a checkpoint."""
    own = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    return distributed.all_gather(own)


def restore_rng(state: list[list[torch.Tensor]]) -> None:
    """Restores what `rng_state` returned; a process beyond the saved number of processes seeds its own generators."""
    if distributed.rank() >= len(state):
        torch.manual_seed(torch.initial_seed() + distributed.rank())
        return
    own = state[distributed.rank()]
    torch.set_rng_state(own[0])
    if len(own) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(own[1])


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for one named purpose, e.g. generator(1, "ppo", "noise", iteration).

    The draws of step n are a function of the seed and n, so a resumed run draws what an uninterrupted one would have;
    no generator state is saved.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
