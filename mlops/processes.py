"""Processes that end with their parent."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int = 0) -> None:
    """Asks the kernel for SIGTERM when the parent (dvc) ends, so that no stage outlives its orchestrator.

    `parent`: its process, where that is known: one that has ended before the kernel was asked ends this one now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
