"""Who is alive: the uploader holds the flock of scratch/uploader.lock, every stage a shared one of scratch/stages.lock.

The kernel frees a lock when its last holder ends, however it ends; the files themselves stay.
"""

import fcntl
import os
from pathlib import Path

UPLOADER, STAGES = "uploader.lock", "stages.lock"
RUN = "run.lock"  # a flow holds it from its first stage to its end (flows/execution.py)
OLD_UPLOADER = "mirror.lock"  # what an uploader of older code holds

_held: dict[Path, int] = {}  # stages.lock of these checkouts stays open until this process ends


def hold_stages_lock(root: Path) -> None:
    """Shows uploaders that a stage lives, for as long as this process does."""
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
    """The descriptor of the uploader's lock, now held; None if an uploader is alive, be it one of older code."""
    descriptor = open_lock(root, UPLOADER)
    if try_lock(descriptor) and not _older_alive(root):
        return descriptor
    os.close(descriptor)
    return None


def _older_alive(root: Path) -> bool:
    """Whether an uploader of older code, which does not know today's lock, still sends."""
    return (root / "scratch" / OLD_UPLOADER).exists() and _is_held(root, OLD_UPLOADER)


def owns_lock(root: Path, lock: int) -> bool:
    """False once somebody deleted scratch/ and with it the file whose lock is held: another uploader may live."""
    try:
        return os.path.samestat(os.stat(root / "scratch" / UPLOADER), os.fstat(lock))
    except FileNotFoundError:
        return False


def stage_alive(root: Path) -> bool:
    """True while any process that called `ensure_uploader` lives."""
    return _is_held(root, STAGES)


def run_alive(root: Path) -> bool:
    """True while a stage lives, or a flow that may start one."""
    return stage_alive(root) or _is_held(root, RUN)


def _is_held(root: Path, name: str) -> bool:
    descriptor = open_lock(root, name)
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
