"""Who is alive: the mirror holds the flock of scratch/mirror.lock, every stage a shared one of scratch/stages.lock.

The kernel frees a lock when its last holder ends, however it ends; the files themselves stay.
"""

import fcntl
import os
from pathlib import Path

MIRROR, STAGES = "mirror.lock", "stages.lock"

_held: dict[Path, int] = {}  # stages.lock of these checkouts stays open until this process ends


def hold_stages_lock(root: Path) -> None:
    """Shows mirrors that a stage lives, for as long as this process does."""
    if root not in _held:
        descriptor = open_lock(root, STAGES)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held[root] = descriptor


def open_lock(root: Path, name: str) -> int:
    return os.open(root / "scratch" / name, os.O_RDWR | os.O_CREAT, 0o644)


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free_lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def take_lock(root: Path) -> int | None:
    """The descriptor of the mirror's lock, now held; None if a mirror is alive."""
    descriptor = open_lock(root, MIRROR)
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def owns_lock(root: Path, lock: int) -> bool:
    """False once somebody deleted scratch/ and with it the file whose lock is held: another mirror may live."""
    try:
        return os.path.samestat(os.stat(root / "scratch" / MIRROR), os.fstat(lock))
    except FileNotFoundError:
        return False


def stage_alive(root: Path) -> bool:
    """True while any process that called `ensure_mirror` lives."""
    descriptor = open_lock(root, STAGES)
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
