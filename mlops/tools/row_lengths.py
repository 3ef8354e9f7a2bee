"""Tokens of rows in a model's chat format, and the rows that the format refuses: before a description is trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.model.chat_format import ChatFormatError

Row = Mapping[str, Any]


def millions(parameters: int) -> str:
    """A number of parameters for people: 0.13M, 134M."""
    return f"{parameters / 1e6:,.{2 if parameters < 1e6 else 1 if parameters < 1e7 else 0}f}M"


def accepted(codec: Any, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows whose prompt the chat template takes, and why it refuses each other one."""
    taken, reasons = [], []
    for row in rows:
        try:
            codec.check(row["prompt"])
            taken.append(row)
        except ChatFormatError as error:
            reasons.append(str(error))
    return taken, reasons


def tokens_of(codec: Any, rows: Sequence[Row], answers: str = "") -> list[tuple[int, int]]:
    """(tokens of the prompt, of its longest answer) of each row; `answers` names the key of its answer or answers, none
    where it is empty. Raises ChatFormatError."""
    prompts = codec.prompts([row["prompt"] for row in rows])
    texts = [row[answers] if isinstance(row[answers], list) else [row[answers]] for row in rows] if answers else []
    ids = iter(codec.completions([text for some in texts for text in some])) if answers else iter(())
    return [(len(prompt), max((len(next(ids)) for _ in texts[index]), default=0) if answers else 0)
            for index, prompt in enumerate(prompts)]
