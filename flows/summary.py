"""What a finished run tells: time, numbers of each stage and where to look next, as a table and as markdown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlops.config.paths import metrics_of
from mlops.printing import show_table, terminal, whole
from mlops.reporting.models import at_ceiling, model_table

WIDTH = 100
NOTE = "In brackets: 95 % intervals. Tax in points of a perfect score. *: the arm that goes to the gates."
MAIN_NUMBERS = {
    "validate": ["validate/sft_rows", "validate/rm_rows", "validate/ppo_rows"],
    "pretrain": ["pretrain/valid_loss"],
    "sft": ["sft/valid_loss", "sft/valid_loss_base"],
    "rm": ["rm/accuracy", "rm/accuracy_gold", "rm/accuracy_heldout_labelers"],
    "ppo": ["ppo/kl", "ppo/kl_goal", "ppo/beta", "ppo/gold_first", "ppo/gold_last"],
    "evaluate": ["eval/arm", "eval/win_rate_vs_sft", "eval/win_rate_vs_sft_low", "eval/win_rate_vs_sft_high",
                 "eval/gold_gain_vs_sft", "tax/mean"],
    "promote": ["promote/passed", "promote/gates", "promote/missed"],
}


@dataclass(frozen=True)
class StageResult:
    """How one stage went. `how`: ran, from cache (outputs checked out) or up to date."""

    stage: str
    seconds: float
    how: str


@dataclass
class Summary:
    """`summary.show()` on a terminal, `summary.markdown()` in Prefect. `links`: (what, where) to look next.

    `models`: titles and rows of the models' table, base → SFT → each arm.
    """

    results: Sequence[StageResult]
    numbers: dict[str, str]
    models: tuple[list[str], list[list[str]]] = ([], [])
    links: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    in_mlflow: tuple[str, str] = ("", "")  # ids of experiment and run; empty where no stage ran

    def rows(self) -> list[tuple[str, str, str, str]]:
        return [(item.stage, clock(item.seconds), item.how, self.numbers.get(item.stage, "")) for item in self.results]

    def show(self, console: Console | None = None) -> None:
        """Prints to stdout, in `WIDTH` columns where words, links and notes fit in."""
        if console is None:
            console = terminal()
            console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
        table = Table("stage", "time", "how", "main numbers")
        table.columns[1].justify = "right"
        for column in table.columns[:3]:
            column.no_wrap = True
        for row in self.rows():
            table.add_row(*row)
        show_table(table, console)
        titles, models = self.models
        if models:
            compared = Table("model", *titles, caption=NOTE.replace("In brackets", "Below"), box=box.SIMPLE_HEAD,
                             padding=(0, 1, 0, 0))
            for cells in models:
                compared.add_row(*(whole(on_two_lines(cell)) for cell in cells))
            show_table(compared, console)
        for what, where in self.links:
            console.print(f"{what:<12} {where}", soft_wrap=True, markup=False)
        for note in self.notes:
            console.print(note, soft_wrap=True, markup=False)

    def markdown(self) -> str:
        lines = ["| stage | time | how | main numbers |", "|---|---:|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        titles, models = self.models
        if models:
            lines += ["", "| " + " | ".join(["model", *titles]) + " |", "|---" * (len(titles) + 1) + "|"]
            lines += ["| " + " | ".join(cells) + " |" for cells in models]
            lines += ["", NOTE]
        lines += ["", *(f"- {what}: <{where}>" if where.startswith("http") else f"- {what}: `{where}`"
                        for what, where in self.links), *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def on_two_lines(cell: str) -> str:
    """A number and below it its interval: "62.4 % (61.3 % to 63.5 %)" as 62.4 % and 61.3…63.5 %."""
    value, _, interval = cell.partition(" (")
    low, to, high = interval.removesuffix(")").partition(" to ")
    return f"{value}\n{low.removesuffix('%').rstrip().lstrip('+')}…{high.lstrip('+')}" if to else cell


def main_numbers(root: Path, stages: Sequence[str]) -> dict[str, str]:
    """The main numbers of each stage, from its metrics; what is missing there is left out."""
    texts = {}
    for stage in stages:
        try:
            metrics: dict[str, Any] = json.loads((root / f"{metrics_of(stage)}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        shown = [(key.replace("tax/", "tax_").split("/")[-1], metrics[key]) for key in MAIN_NUMBERS.get(
            stage.partition("@")[0], []) if key in metrics]
        training = "in training: " if stage.startswith("ppo@") and shown else ""
        texts[stage] = training + "  ".join(f"{key}={_number(value)}" for key, value in shown)
    return texts


def compared_models(root: Path) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table base → SFT → each arm; empty without an evaluation."""
    path = root / "metrics" / "evaluate.json"
    if not path.exists():
        return [], []
    titles, rows = model_table(json.loads(path.read_text(encoding="utf-8")), tasks=False)
    return titles, [[f"{row.label} *" if row.promoted else row.label, *map(str, row.cells)] for row in rows]


def ceiling_note(root: Path) -> list[str]:
    """Says which tax tasks are at their ceiling; nothing where none is."""
    path = root / "metrics" / "evaluate.json"
    tasks = at_ceiling(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
    return [f"tax tasks at ceiling, so that only a large loss shows: {', '.join(tasks)}"] if tasks else []


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """75 → 1:15, 3700 → 1:01:40, below ten seconds with a decimal."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
