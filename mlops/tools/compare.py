"""Two or more runs side by side: what differs between them and what came out, as a table and as a page with curves.

    python -m mlops.tools.compare kl_goal=0.3 kl_goal=0.6          # workspaces, `checkout`, or folders
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table

from mlops import from_caller, program
from mlops.config.paths import POLICY_METRICS
from mlops.printing import show_table, terminal, whole
from mlops.reporting import plots
from mlops.reporting.headline import estimate, figure, length, number, percent, points, score, signed
from mlops.reporting.journals import KlRule, Rows, column, read_rows, rules_of
from mlops.tools.runs import Run, differing, find_run
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic

PAGE = Path("reports/compare.html")
COLOURS = (plots.SFT, plots.PPO, plots.RM, plots.GOLD, plots.GOAL, *plots.OTHER_COLOURS)  # of the policies, in turn
DASH = "–"
REACHED = 0.5  # share of the goal from which a run counts as having come near it
# Title, key in metrics/evaluate.json ({arm} filled in), format.
MEASURED = (
    ("KL to SFT, nats", "eval/kl_{arm}", score), ("win rate against SFT", "eval/win_rate/{arm}_vs_sft", percent),
    ("gold score", "eval/gold_{arm}", score), ("reward-model score", "eval/rm_score_{arm}", score),
    ("tax, mean, points", "tax_of/{arm}/mean", points),
    ("tax of PPO, mean, points", "tax_between/sft/{arm}/mean", points),
    ("tax, bits per answer", "answer_bits_tax/{arm}/mean", signed),
    ("response length, tokens", "eval/length_{arm}", length), ("toxic", "eval/toxic_{arm}", percent),
)


JUDGES = {"gold": "gold labeler", "model": "a model", "reward_model": "a reward model",
          "held_out": "second reward model", "own": "none: the run's own reward model"}


@dataclass(frozen=True)
class Policy:
    """One policy of a run: its name in the tables, its colour, its evaluation, its journal, what its β followed."""

    name: str
    arm: str
    colour: str
    evaluation: dict[str, Any]
    journal: Rows
    promotion: dict[str, Any]
    rule: KlRule

    def cell(self, key: str, form: Any) -> str:
        """A measured number with its interval; a dash where it was not measured."""
        found = estimate(self.evaluation, key.format(arm=self.arm))
        if found is None:
            return DASH
        interval = f" [{form(found.low)}, {form(found.high)}]" if found.low is not None else ""
        return f"{form(found.value)}{interval}"

    def column(self, name: str) -> np.ndarray:
        return column(self.journal, name)

    def gates(self) -> str:
        """What the gates said of it; a dash for an arm that does not go to them."""
        if not self.promotion or self.evaluation.get("eval/arm") != self.arm:
            return DASH
        missed = self.promotion.get("reasons") or []
        return f"missed {len(missed)}" if missed else "passed"


def policies_of(runs: Sequence[Run]) -> list[Policy]:
    """Every trained policy of the runs. Raises UserError where a run has none."""
    found: list[Policy] = []
    for run in runs:
        arms = run.arms()
        if not arms:
            raise UserError(f"{run.name}: has no trained policy yet; `instructflow run` makes one")
        for arm in arms:
            path = run.folder / POLICY_METRICS / f"{arm}.csv"
            journal = read_rows(path)
            found.append(Policy(run.label(arm), arm, COLOURS[len(found) % len(COLOURS)], run.metrics("evaluate"),
                                journal, run.metrics("promote"), rules_of(run.folder, {arm: journal})[arm]))
    return found


def result_rows(policies: Sequence[Policy]) -> list[tuple[str, list[str]]]:
    """(what, its value for each policy); what was measured of none is left out."""
    rows = [("KL goal, nats", [DASH if policy.rule.goal is None else f"{policy.rule.goal:.3g}" for policy in policies]),
            ("β at the end", [_last(policy, "ppo/beta") for policy in policies])]
    rows += [(title, [policy.cell(key, form) for policy in policies]) for title, key, form in MEASURED]
    judges = [JUDGES.get(str(policy.evaluation.get("eval/judge")), DASH) for policy in policies]
    right = [policy.cell("eval/judge_accuracy", percent) for policy in policies]
    rows += [("who judges", [name if share == DASH else f"{name}, right on {share}"
                             for name, share in zip(judges, right, strict=True)])]
    prompts = [number(policy.evaluation, "eval/prompts") for policy in policies]
    rows += [("held-out prompts", [DASH if value is None else f"{value:,.0f}" for value in prompts]),
             ("gates", [policy.gates() for policy in policies])]
    return [(title, cells) for title, cells in rows if any(cell != DASH for cell in cells)]


def _last(policy: Policy, name: str) -> str:
    values = policy.column(name)
    values = values[np.isfinite(values)]
    return f"{values[-1]:.3g}" if len(values) else DASH


def goal_note(policy: Policy) -> str:
    """What to do where the policy has not come near its KL goal; empty where it has, or where nothing is known."""
    kl, goal = number(policy.evaluation, f"eval/kl_{policy.arm}"), policy.rule.goal
    if kl is None or goal is None or not policy.journal or kl >= REACHED * goal:
        return ""
    return (f"its KL of {kl:.3g} nats is far from its goal of {goal:.3g} after {len(policy.journal)} iterations, so "
            "the goal has hardly acted: more ppo.episodes, a higher ppo.lr, a smaller ppo.beta or a shorter "
            "ppo.value_warmup_iterations")


def curves(policies: Sequence[Policy]) -> list[tuple[str, str]]:
    """(title, SVG) of KL, β, reward-model score and gold score over the iterations."""
    trained = [policy for policy in policies if policy.journal]
    found = []
    if trained:
        found.append(("KL to the SFT policy, with its goal", plots.kl([plots.KlRun(
            policy.colour, policy.column("step"), policy.column("ppo/kl"), policy.column("ppo/kl_smoothed"),
            policy.rule.goal, policy.rule.band) for policy in trained])))
        found.append(("β", plots.beta([(policy.column("step"), policy.column("ppo/beta"), policy.colour)
                                       for policy in trained])))
    for name, title in (("ppo/rm_score", "reward-model score"), ("ppo/gold", "gold score")):
        drawn = [(policy.column("step"), policy.column(name), policy.colour) for policy in trained
                 if np.isfinite(policy.column(name)).any()]
        if drawn:
            found.append((title, plots.stacked(name, title, [(title, drawn)], "iteration")))
    return found


def write_page(runs: Sequence[Run], policies: Sequence[Policy], target: Path) -> None:
    """The page: one file without scripts or external resources."""
    folders = [Path(__file__).parent, Path(plots.__file__).parent]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("compare.html.j2").render(
        runs=runs, policies=policies, colours={policy.name: plots.CSS[policy.colour] for policy in policies},
        differing=[(name, [figure(value) for value in values]) for name, values in differing(runs).items()],
        rows=result_rows(policies), curves=curves(policies))
    write_atomic(target, (page.strip() + "\n").encode())


def show(runs: Sequence[Run], policies: Sequence[Policy], console: Console) -> None:
    """Both tables on the terminal."""
    table = Table("what differs", *(run.name for run in runs), show_edge=False)
    for name, values in differing(runs).items():
        table.add_row(name, *(whole(value) if isinstance(value, str) else figure(value) for value in values))
    if table.row_count:
        show_table(table, console)
    else:
        console.print("The runs have the same parameters and data.")
    results = Table("what came out", *(policy.name for policy in policies), show_edge=False)
    for title, cells in result_rows(policies):
        results.add_row(title, *cells)
    console.print()
    show_table(results, console)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.compare"), description=(
        "Runs side by side: what differs and what came out."))
    parser.add_argument("runs", nargs="+", metavar="RUN", help=(
        "a workspace's name or a part of it such as kl_goal=0.3, `checkout`, or a folder; two or more"))
    parser.add_argument("--out", type=Path, default=PAGE, help=f"the page (default: {PAGE})")
    options = parser.parse_args()
    root = Path.cwd()
    with one_line("compare"):
        if len(options.runs) < 2:
            raise UserError("name two runs or more; `instructflow status` lists them")
        runs = [find_run(root, name) for name in options.runs]
        if twice := next((run for run in runs if [other.folder for other in runs].count(run.folder) > 1), None):
            raise UserError(f"{twice.name}: is named twice; name two different runs, `instructflow status` lists them")
        policies = policies_of(runs)
        out = options.out if options.out == PAGE else from_caller(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_page(runs, policies, out)
        show(runs, policies, terminal())
        for policy in policies:
            if note := goal_note(policy):
                print(f"{policy.name}: {note}")
        last = f"{runs[-1].name}:{runs[-1].arms()[-1]}" if runs[-1].folder != root else runs[-1].arms()[-1]
        print(f"\nThe curves are in {out}. Next: instructflow chat {last}")


if __name__ == "__main__":
    main()
