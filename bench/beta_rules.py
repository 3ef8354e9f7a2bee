"""How the rules for β settle: PPO from a finished run's SFT and reward model, once for each rule and KL goal.

    python bench/beta_rules.py [--rules step step_ahead] [--goals 0.3 0.6 1.5] [--picture FILE.png]

In the checkout of a finished run; writes only to a temporary folder, and the picture. Everything but rule and goal is
the profile's first arm. Prints a line of JSON for each run: over the last third of the iterations, the lowest and
highest moving average (of 3) of KL / goal, and how often β changed; over the whole run, the highest KL / goal. One
process of two threads: run nothing else meanwhile.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import matplotlib
import torch

from mlops.config.loader import load_params
from rlhf.data.schema import read_rows
from rlhf.params import PpoParams
from rlhf.ppo.run import train_ppo
from rlhf.training.journal import read_journal

Curves = tuple[list[float], list[float]]
COLOURS = {"step": "#a87900", "step_ahead": "#2f74d0", "proportional": "#7a4bc4", "fixed": "#5c6573"}


def run(params: PpoParams, prompts: list[str], seed: int) -> Curves:
    """(KL / goal, β) of each iteration."""
    with tempfile.TemporaryDirectory() as folder:
        train_ppo(params, prompts, Path("models/sft"), Path("models/rm"), seed, Path(folder),
                  corpus=Path("data/corpus.jsonl"))
        journal = read_journal(Path(folder) / "journal.csv")
    return [float(row["ppo/kl"]) / params.kl_goal for row in journal], [float(row["ppo/beta"]) for row in journal]


def settling(kl: list[float], beta: list[float]) -> dict[str, float]:
    """The figures of the last third, and the highest KL of all."""
    start = len(kl) * 2 // 3
    means = [sum(kl[place - 2:place + 1]) / 3 for place in range(start, len(kl))]
    return {"lowest": round(min(means), 2), "highest": round(max(means), 2), "highest_of_all": round(max(kl), 2),
            "changes_of_beta": sum(one != other for one, other in itertools.pairwise(beta[start:])),
            "beta_last": round(beta[-1], 4)}


def draw(curves: dict[tuple[str, float], Curves], target: Path) -> None:
    """KL / goal above, β below; a column for each goal, a line for each rule."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    goals = sorted({goal for _, goal in curves})
    figure, axes = plt.subplots(2, len(goals), figsize=(4.2 * len(goals), 5), sharex=True, squeeze=False)
    for column, goal in enumerate(goals):
        above, below = axes[0][column], axes[1][column]
        above.axhspan(2 / 3, 3 / 2, color="#17845f", alpha=0.15, label="band 2/3 to 3/2")
        for (rule, of_goal), (kl, beta) in curves.items():
            if of_goal == goal:
                above.plot(range(1, len(kl) + 1), kl, color=COLOURS[rule], label=rule)
                below.step(range(1, len(beta) + 1), beta, where="post", color=COLOURS[rule], label=rule)
        above.set_title(f"KL goal {goal:g} nats")
        above.set_ylim(bottom=0)
        below.set_yscale("log")
        below.set_xlabel("iteration")
    axes[0][0].set_ylabel("KL / goal")
    axes[1][0].set_ylabel("β")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="How the rules for beta settle.")
    parser.add_argument("--rules", nargs="+", default=["step", "step_ahead"], choices=list(COLOURS))
    parser.add_argument("--goals", nargs="+", type=float, default=[0.3, 0.6, 1.5])
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    loaded = load_params()
    arm = next(iter(loaded.stages.arms.values()))
    prompts = [row["prompt"] for row in read_rows(Path("data/ppo.jsonl")) if row["split"] == "train"]
    curves: dict[tuple[str, float], Curves] = {}
    for rule, goal in itertools.product(options.rules, options.goals):
        params = dataclasses.replace(arm, beta_rule=rule, kl_goal=goal, kl_limit=0.0)
        if rule == "step":
            params = dataclasses.replace(params, beta_band=1.5, beta_factor=2.0)  # the article's
        curves[rule, goal] = run(params, prompts, loaded.seed)
        print(json.dumps({"rule": rule, "kl_goal": goal, **settling(*curves[rule, goal])}), flush=True)
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
