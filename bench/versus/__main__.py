"""instructflow against TRL 1.12's trainers and transformers' generation: the same work in turns, on one machine.

    make bench                                  # 1M, 10M, 135M parameters, five turns each (two hours on two cores)
    .venv/bin/python bench/versus --sizes 1M --turns 3 --bars rm sft

While one side works, the other waits. Both sides are tried with one multi-threaded process and with one process per
core, and theirs also with several settings; the fastest of each are compared. Equal losses show that both do the same
work (`same`). After each benchmark ("bar") bench/results.json is written: medians of the ratios of neighbouring turns,
and the machine. Each benchmark has new processes, so a process that dies (continuous batching takes 14 GB on a CPU)
fails only its own benchmark. `--keep` resumes after an interruption.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from work import COMPILES, ITERATIONS, PPO_MICRO, RM_BATCH, RM_MICRO, SFT_ROWS, SHARES

HERE = Path(__file__).parent
BARS = ("same", "sft", "rm", "ppo", "ppo_mixed", "rollout", "rollout_256", "rollout_continuous")
ATTENTIONS = [{"attention": "eager"}, {"attention": "sdpa"}]
COMPILED = [{}, {"compiled": True}]
MFU_SIZE = "10M"  # the size whose share of the matmul rate is reported as sft_mfu


class Ended(Exception):
    """A process died in a job."""


class Side:
    """A process that answers jobs one after the other; started by the first job, and again after `end`."""

    def __init__(self, python: Path, script: str, processes: int) -> None:
        self.python, self.script, self.processes = python, script, processes
        self.process: subprocess.Popen[str] | None = None

    def end(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def do(self, job: str, **more: Any) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen([self.python, HERE / self.script, str(self.processes)], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                            start_new_session=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"job": job, **more}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise Ended(f"{self.python} bench/versus/{self.script} {self.processes} died; to see why, run it with "
                        f"{json.dumps({'job': job, **more})}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def both(options: argparse.Namespace) -> Iterator[tuple[list[Side], list[Side]]]:
    """New processes of both sides, ended on leaving."""
    ours, theirs = ([Side(python, script, processes) for processes in options.processes] for python, script in (
        (Path(sys.executable), "ours.py"), (options.theirs.absolute(), "theirs.py")))
    try:
        yield ours, theirs
    finally:
        for side in (*ours, *theirs):
            side.end()


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large square matrix product, the best of ten."""
    size = 2048 if not torch.cuda.is_available() else 8192
    where = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (one @ other)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def rate(answer: dict[str, Any]) -> float:
    """Tokens, prompts or episodes per second."""
    return next(answer[unit] for unit in ("tokens", "prompts", "episodes") if unit in answer) / answer["seconds"]


def turns(count: int, mine: Callable[[], dict[str, Any]], others: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Both sides in turns, after one warm-up of each."""
    mine(), others()
    pairs = [(mine(), others()) for _ in range(count)]
    ratios = sorted(rate(one) / rate(other) for one, other in pairs)
    return {"ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1],
            "ours": statistics.median(rate(one) for one, _ in pairs),
            "theirs": statistics.median(rate(other) for _, other in pairs),
            "last": pairs[-1]}


def fastest(sides: list[Side], job: str, settings: list[dict[str, Any]], **more: Any) -> tuple[Side, dict[str, Any]]:
    """The fastest side and settings on this machine, by the better of two runs each.

    A side's first settings and compiled ones have a warm-up run. A side ends after its trials, to free its memory.
    """
    rates = []
    for side_index, side in enumerate(sides):
        for index, trial in enumerate(settings):
            if index == 0 or "compiled" in trial:
                side.do(job, **more, **trial)
            rates.append((max(rate(side.do(job, **more, **trial)) for _ in range(2)), side_index, index))
        side.end()
    _, side_index, index = max(rates)
    return sides[side_index], settings[index]


def peaks(ours: Side, theirs: Side, job: str, mine: dict[str, Any], others: dict[str, Any]) -> list[float]:
    """Peak memory, GB, of a new process of each side that does a job once."""
    memory = []
    for side, work in ((ours, mine), (theirs, others)):
        new = Side(side.python, side.script, 1)
        try:
            memory.append(new.do(job, **work)["memory"])
        finally:
            new.end()
    return memory


def works_of(size: str) -> dict[str, tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """{benchmark: (job, work, arguments of their side only, settings that their side tries)} for one model size."""
    scale, iterations = SHARES[size], ITERATIONS[size]
    compiled = COMPILED if size in COMPILES else COMPILED[:1]
    ppo = [{**some, "micro": micro} for some in ATTENTIONS for micro in PPO_MICRO[size]]
    return {
        "sft": ("sft", {"rows": SFT_ROWS[size]}, {"packing": True}, [{**some, "micro": 16} for some in ATTENTIONS]),
        "sft_unpacked": ("sft", {"rows": SFT_ROWS[size]}, {"packing": False}, [{**some, "micro": 32}
                                                                              for some in ATTENTIONS]),
        "rm": ("rm", {"prompts": max(RM_BATCH, 128 // scale)}, {}, [{**some, "micro": micro} for some in ATTENTIONS
                                                                    for micro in RM_MICRO[size]]),
        "ppo": ("ppo", {"mixed": False, "iterations": iterations}, {}, ppo),
        "ppo_mixed": ("ppo", {"mixed": True, "iterations": iterations}, {}, ppo),
        "rollout": ("rollout", {"mixed": False, "batch": 64, "prompts": max(64, 512 // scale)}, {},
                    [some | more for some in ATTENTIONS for more in compiled]),
        "rollout_256": ("rollout", {"mixed": True, "batch": 256, "prompts": max(256, 1024 // scale)}, {},
                        [some | more for some in ATTENTIONS for more in compiled]),
        "rollout_continuous": ("rollout", {"mixed": True, "batch": 256, "prompts": max(64, 256 // scale)},
                               {"continuous": True}, [{"attention": "sdpa"}])}


def bar(ours: list[Side], theirs: list[Side], folder: str, size: str, name: str, parameters: int,
        count: int) -> dict[str, Any]:
    """Runs one benchmark; returns its results by name."""
    if name == "same":
        same = same_work(ours[0], theirs[0], folder, max(RM_BATCH, 32 // SHARES[size]))
        print(f"{size} same work: largest relative difference {same['difference']:.1e}", flush=True)
        return {name: same}
    job, work, theirs_alone, settings = works_of(size)[name]
    common = {"folder": folder, "precision": "bf16"}
    compiled = COMPILED if size in COMPILES else COMPILED[:1]
    micros = [{"micro": micro} for micro in PPO_MICRO[size]] if job == "ppo" else [{}]
    tried = [some | more for some in (compiled if job in ("ppo", "rollout") else [{}]) for more in micros]
    one, own = fastest(ours, job, tried, **common, **work)
    # transformers' continuous batching kills a forked process
    able = theirs[:1] if name == "rollout_continuous" else theirs
    other, chosen = fastest(able, job, settings, **common, **work, **theirs_alone)
    mine, others = common | work | own, common | work | theirs_alone | chosen
    result = turns(count, partial(one.do, job, **mine), partial(other.do, job, **others))
    for side in (*ours, *theirs):
        side.end()  # frees their memory for the next benchmarks
    result |= {"memory": peaks(one, other, job, mine, others), "processes": [one.processes, other.processes],
               "our_settings": own, "their_settings": theirs_alone | chosen}
    print(f"{size} {name}: {result['ratio']:.2f} times theirs [{result['least']:.2f}, {result['most']:.2f}]; "
          f"{result['ours']:,.0f} and {result['theirs']:,.0f} per second; processes {result['processes']}; memory "
          f"{result['memory'][0]:.2f} and {result['memory'][1]:.2f} GB; ours {own}, theirs {chosen}", flush=True)
    if name != "sft":
        return {name: result}
    share = 6 * parameters * result["ours"] / 1e9 / matmul_rate(torch.bfloat16)
    print(f"{size} sft: {share:.2f} of the machine's bf16 matmul rate", flush=True)
    return {name: result, "sft_mfu": share}


def same_work(ours: Side, theirs: Side, folder: str, prompts: int) -> dict[str, Any]:
    """Losses of both sides in float32 on the same data: the reward model's first step, PPO's averages over 4 epochs on
    the same responses."""
    exact = {"folder": folder, "precision": "fp32"}
    responses = ours.do("sampled", folder=folder, mixed=False, iterations=2)["responses"]
    other = theirs.do("ppo", **exact, mixed=False, iterations=1, attention="eager", responses=responses)
    mine = ours.do("ppo", **exact, mixed=False, iterations=1, responses=responses, order=other["order"])
    pairs = {f"ppo {name}": (mine[name], other[name]) for name in ("loss/policy", "loss/value", "score", "weight")}
    mine = ours.do("rm", **exact, prompts=prompts)
    other = theirs.do("rm", **exact, prompts=prompts, attention="eager", micro=30)
    pairs |= {f"rm {name}": (mine[name], other[name]) for name in ("loss/first", "loss/mean")}
    differences = {name: abs(one - two) / abs(two) for name, (one, two) in pairs.items()}
    return {"difference": max(differences.values()), "differences": differences, "values": pairs}


def write(path: Path, machine: dict[str, Any], by_size: dict[str, dict[str, Any]]) -> None:
    """Writes the results so far: ratios (of further sizes with the size in the name), machine, everything by size."""
    names = {"ppo_vs_trl": "ppo", "ppo_mixed_vs_trl": "ppo_mixed", "rm_vs_trl": "rm", "sft_vs_trl": "sft",
             "rollout_vs_generate": "rollout", "rollout_mixed_vs_generate": "rollout_256",
             "rollout_vs_continuous": "rollout_continuous"}
    ratios: dict[str, float] = {}
    for number, (size, results) in enumerate(by_size.items()):
        ratios |= {name if number == 0 else f"{name}_{size}": round(results[bar]["ratio"], 3)
                   for name, bar in names.items() if bar in results}
    if shares := {size: results["sft_mfu"] for size, results in by_size.items() if "sft_mfu" in results}:
        ratios["sft_mfu"] = round(shares.get(MFU_SIZE, list(shares.values())[-1]), 3)
    path.write_text(json.dumps({**ratios, "machine": machine, "sizes": by_size}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1M", "10M", "135M"])
    parser.add_argument("--bars", nargs="+", default=list(BARS), choices=BARS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+",
                        help="numbers to try for each side (default: 1 and all cores; 1 on a GPU)",
                        default=[1] if torch.cuda.is_available() else sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--theirs", type=Path, default=Path(".venv-trl/bin/python"),
                        help="the Python of an environment with TRL")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results.json")
    parser.add_argument("--keep", action="store_true", help="keep the benchmarks in --out and run only the others")
    options = parser.parse_args()
    machine = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or
               platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "matmul_bf16_gflops": round(matmul_rate(torch.bfloat16)),
               "matmul_fp32_gflops": round(matmul_rate(torch.float32))}
    by_size: dict[str, dict[str, Any]] = {}
    if options.keep and options.out.exists():
        by_size = json.loads(options.out.read_text(encoding="utf-8"))["sizes"]
    failed = False
    for size in options.sizes:
        wanted = [name for name in ("same", *works_of(size)) if name.removesuffix("_unpacked") in options.bars
                  and name not in by_size.get(size, {}) and (name != "rollout_continuous" or size in COMPILES)]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                with both(options) as (ours, _):
                    parameters = ours[0].do("make", folder=folder, shape=size)["parameters"]
            except Ended as error:
                raise SystemExit(f"{size}: {error}") from None
            by_size.setdefault(size, {})["parameters"] = parameters
            for name in wanted:
                try:
                    with both(options) as (ours, theirs):
                        by_size[size] |= bar(ours, theirs, folder, size, name, parameters, options.turns)
                except Ended as error:
                    failed = True
                    print(f"{size} {name}: {error}", file=sys.stderr, flush=True)
                write(options.out, machine, by_size)
    print(options.out.read_text(encoding="utf-8").split('"sizes"')[0])
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
