"""The work of both sides: models of several sizes and token ids of a fixed seed, which both read from one folder.

The folder holds policy/, rm/ and value/ (Hugging Face folders) and work.json. This file imports neither side.
"""

import json
import random
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EOS_SHARE = 1 / 20  # chance per token that a response of mixed length ends


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX, or a Llama where `kv_heads` is set."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    inner: int = 0


SHAPES = {"1M": Shape(4, 128, 4, 1024), "10M": Shape(6, 384, 6, 1024),
          "135M": Shape(30, 576, 9, 49152, kv_heads=3, inner=1536),
          "1B": Shape(16, 2048, 32, 50304, kv_heads=8, inner=8192)}
# PPO: episodes per iteration and per forward pass of the update; the values of the latter that both sides try
PPO_SIZES = {"1M": (256, 64), "10M": (128, 32), "135M": (16, 8), "1B": (64, 16)}
PPO_MICRO = {"1M": (64, 128), "10M": (32, 64), "135M": (8,), "1B": (16,)}
# Demonstrations per turn. Adam's first step allocates its memory, which costs half a step at 135M
SFT_ROWS = {"1M": 2048, "10M": 512, "135M": 256, "1B": 256}
# Divisor of the other row and prompt counts relative to 1M
SHARES = {"1M": 1, "10M": 4, "135M": 32, "1B": 32}
ITERATIONS = {"1M": 2, "10M": 1, "135M": 1, "1B": 1}  # of PPO per turn
RM_MICRO = {"1M": (30, 60, 120), "10M": (30, 60), "135M": (30,), "1B": (30,)}  # pairs per forward pass that TRL tries
COMPILES = ("1M", "10M")  # sizes that also try compiled sampling; thirty blocks take over a minute to compile
RM_BATCH = 8  # prompts per step
SFT_BATCH = 32  # demonstrations per step


@dataclass(frozen=True)
class Work:
    """Token ids of all benchmarks. `mixed` prompts have 4 to 64 tokens, the others 32."""

    shape: str
    eos: int
    pad: int
    prompts: list[list[int]]
    mixed: list[list[int]]
    demonstrations: list[dict[str, list[int]]]
    rankings: list[dict[str, Any]]


def make_work(shape: str, vocabulary: int, eos: int, pad: int, seed: int = 1) -> Work:
    """Random token ids with the lengths of short questions and answers."""
    draw = random.Random(seed)
    first = max(eos, pad) + 1

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(first, vocabulary) for _ in range(draw.randint(low, high))]

    demonstrations = [{"prompt": ids(8, 48), "completion": [*ids(3, 79), eos]} for _ in range(2048)]
    rankings = []
    for _ in range(256):
        ranks = list(range(1, 7))
        draw.shuffle(ranks)
        rankings.append({"prompt": ids(24, 40), "completions": [[*ids(15, 47), eos] for _ in range(6)], "ranks": ranks})
    return Work(shape, eos, pad, [ids(32, 32) for _ in range(1024)], [ids(4, 64) for _ in range(1024)],
                demonstrations, rankings)


def save_work(work: Work, folder: Path) -> None:
    (folder / "work.json").write_text(json.dumps(asdict(work)), encoding="utf-8")


def load_work(folder: Path) -> Work:
    return Work(**json.loads((folder / "work.json").read_text(encoding="utf-8")))


def memory() -> float:
    """Peak memory of this process so far, GB."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(jobs: dict[str, Any], is_main: bool = True, broadcast: Callable[[str], str] = str) -> None:
    """Answers each JSON line on stdin with one JSON line: {"job": name, ...} calls jobs[name](...).

    Of several processes the main one reads and answers; `broadcast` gives its line to the others.
    """
    out, sys.stdout = sys.stdout, sys.stderr
    while line := broadcast(sys.stdin.readline() if is_main else ""):
        arguments = json.loads(line)
        answer = jobs[arguments.pop("job")](**arguments)
        if is_main:
            print(json.dumps(answer), file=out, flush=True)
