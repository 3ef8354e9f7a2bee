"""Several rounds against one round with the same number of labels and rollouts: metrics/rounds.json, docs/rounds.md.

    python -m flows.compare_rounds --seeds 1 2 3        with simulated labelers, in workspaces

Arms: `rounds` labels what the current policy writes, after each round's training; `one` labels all prompts at once, as
the SFT policy answers them; `restart` is `rounds` whose policies each start from SFT, with as many rollouts as `one`:
what the labels are worth, apart from the way there; `active` is `rounds` with prompts that reward models disagree on.
All but that have the same prompts. What is up to date is not run again.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401
from flows.process import continue_in_own_group, work_begins
from flows.server import start_server, wait_for_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from flows.rounds import run_rounds, workdir_of
from flows.terminal import show_bars
from mlops import imports_done
from mlops.config.loader import load_params
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic, write_json

Results = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]  # seed → arm → a row for each round
OUT, PAGE = Path("metrics/rounds.json"), Path("docs/rounds.md")
ARMS = ("rounds", "one", "restart", "active")
SHOWN = {"gold": "round/gold", "low": "round/gold_low", "high": "round/gold_high",
         "accuracy": "round/rm_accuracy_on_policy", "win_rate": "round/win_rate_vs_sft", "kl": "round/kl"}


def parameters_of(arm: str, seed: int, root: Path, count: int) -> dict[str, Any]:
    """What flow rounds is started with. Raises UserError for an unknown arm."""
    if arm not in ARMS:
        raise UserError(f"arm {arm}: must be one of {', '.join(ARMS)}")
    rounds = load_params(root).stages.rounds
    parameters: dict[str, Any] = {"count": count, "seed": seed, "own_copy": True}
    if arm == "one":
        parameters |= {"count": 1, "prompts": count * rounds.prompts, "episodes": count * rounds.episodes}
    if arm == "restart":
        parameters |= {"restart": True, "episodes": count * rounds.episodes}
    return parameters | ({"select": "disagreement"} if arm == "active" else {})


def read_arm(workdir: Path) -> list[dict[str, float]]:
    """A row for each round: what was measured, and the labelers' agreement."""
    rows = []
    for key in load_params(workdir).rounds:
        scores = json.loads((workdir / "metrics" / f"round_scores@{key}.json").read_text(encoding="utf-8"))
        labels = json.loads((workdir / "metrics" / f"round_labels@{key}.json").read_text(encoding="utf-8"))
        rows.append({name: scores[metric] for name, metric in SHOWN.items()}
                    | {"gold_sft": scores["round/gold_sft"], "rows": labels["labels/rows_so_far"],
                       "agreement": labels["labels/agreement"], "alpha": labels["labels/alpha"]})
    return rows


def differences(results: Results, arm: str, other: str) -> list[float]:
    """Gold score of the last round, `arm` minus `other`, by seed."""
    return [seed[arm][-1]["gold"] - seed[other][-1]["gold"] for seed in results.values()
            if arm in seed and other in seed]


def verdict(values: Sequence[float], what: str, against: str) -> str:
    """One sentence on the differences of the seeds."""
    mean = statistics.fmean(values)
    every = "in every seed" if all(value > 0 for value in values) else \
        "in no seed" if all(value <= 0 for value in values) else \
        f"in {sum(value > 0 for value in values)} of {len(values)} seeds"
    by = ", ".join(f"{value:+.3f}" for value in values)
    return f"{what} beats {against} {every}: gold score {mean:+.3f} in the mean ({by})."


def page(results: Results, profile: str) -> str:
    """docs/rounds.md."""
    lines = ["# Several rounds against one", "",
             f"`python -m flows.compare_rounds --seeds {' '.join(results)}` wrote this page: profile `{profile}`, "
             "simulated labelers of the embedded world, which says nothing about people.", ""]
    for arm, other, what, against in (("rounds", "one", "Labeling after each round's training", "labeling at once"),
                                      ("restart", "one", "The last reward model's own policy", "labeling at once"),
                                      ("active", "rounds", "Choosing prompts by disagreement", "choosing at random")):
        if values := differences(results, arm, other):
            lines += [verdict(values, what, against), ""]
    lines += ["| seed | arm | round | rows | gold [95 %] | SFT | win rate vs SFT | RM right on the policy | KL "
              "| labelers agree | α |", "|" + "-|" * 11]
    for seed, arms in results.items():
        for arm, rows in arms.items():
            for number, row in enumerate(rows, start=1):
                lines.append(f"| {seed} | {arm} | {number} | {row['rows']:,} | {row['gold']:.3f} [{row['low']:.3f}, "
                             f"{row['high']:.3f}] | {row['gold_sft']:.3f} | {row['win_rate']:.3f} "
                             f"| {row['accuracy']:.3f} | {row['kl']:.2f} | {row['agreement']:.3f} "
                             f"| {row['alpha']:.3f} |")
    return "\n".join(lines) + "\n"


async def compare(seeds: Sequence[int], arms: Sequence[str], count: int, root: Path) -> dict[str, Any]:
    """Runs the arms one after the other. Raises the error of the first that fails."""
    results: dict[str, Any] = {}
    for seed in seeds:
        for arm in arms:
            parameters = parameters_of(arm, seed, root, count)
            result = await run_rounds({**parameters, "root": root})
            if isinstance(result, Exception):
                raise result
            results.setdefault(str(seed), {})[arm] = read_arm(workdir_of(parameters, root))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.compare_rounds", description="Several rounds against one.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--count", type=int, default=3, help="rounds")
    parser.add_argument("--only-run", action="store_true", help="write no page: another process compares")
    options = parser.parse_args()
    imports_done()
    show_bars()
    root = Path.cwd()
    with one_line("compare_rounds"):
        work_begins()
        wait_for_server()
        results = asyncio.run(compare(options.seeds, options.arms, options.count, root))
    if not options.only_run:
        text = page(results, load_params(root).profile)
        write_json(root / OUT, results)
        write_atomic(root / PAGE, text.encode())
        print(text)


if __name__ == "__main__":
    main()
