"""Seeds and memory of a training process."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import ctypes, sys, torch
from rlhf.training.seeding import keep_freed_memory
class Info(ctypes.Structure):  # malloc.h: struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "kept":
    keep_freed_memory()
before = libc.mallinfo2()
block = torch.ones(7_000_000)
held = libc.mallinfo2()
del block
print(held.hblkhd - before.hblkhd, libc.mallinfo2().arena - before.arena)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc 2.33 or newer")
def test_freed_memory_stays_with_the_process() -> None:
    """A block of 28 MB comes from the heap and stays there when freed; by default it is mapped and unmapped."""
    kept, plain = ([int(word) for word in subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()]
        for how in ("kept", "plain"))
    assert kept[0] == 0
    assert kept[1] >= 27_000_000 > plain[1]
    assert plain[0] >= 28_000_000
