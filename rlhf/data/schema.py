"""The three datasets: keys, row counts and use-case mix of InstructGPT (Tables 1 and 6); reading and writing."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.files import write_atomic

KEYS = {
    "sft": ["prompt_id", "user_id", "source", "split", "use_case", "prompt", "completion"],
    "rm": ["prompt_id", "user_id", "labeler_id", "source", "split", "use_case", "prompt", "completions", "ranks"],
    "ppo": ["prompt_id", "user_id", "source", "split", "use_case", "prompt"],
}
SPLITS = ("train", "valid")
MIN_K, MAX_K = 4, 9

# Rows by split and source [InstructGPT Table 6].
PAPER_ROWS = {
    "sft": {("train", "labeler"): 11_295, ("train", "customer"): 1_430,
            ("valid", "labeler"): 1_550, ("valid", "customer"): 103},
    "rm": {("train", "labeler"): 6_623, ("train", "customer"): 26_584,
           ("valid", "labeler"): 3_488, ("valid", "customer"): 14_399},
    "ppo": {("train", "customer"): 31_144, ("valid", "customer"): 16_185},
}

# Percent of prompts [InstructGPT Table 1].
USE_CASE_PERCENT = {
    "generation": 45.6, "open_qa": 12.4, "brainstorming": 11.2, "chat": 8.4, "rewrite": 6.6, "summarization": 4.2,
    "classification": 3.5, "other": 3.5, "closed_qa": 2.6, "extract": 1.9,
}


def split_by_shares(total: int, shares: dict[Any, float]) -> dict[Any, int]:
    """Integers that add up to `total` in proportion to `shares` (largest remainder method)."""
    weight = sum(shares.values())
    exact = {key: total * share / weight for key, share in shares.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: (counts[key] - exact[key], str(key)))
    for key in by_remainder[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def expected_rows(dataset: str, scale: float = 1.0) -> dict[tuple[str, str], int]:
    """Number of rows of a dataset by (split, source); the paper's at scale 1."""
    return {key: max(1, round(count * scale)) for key, count in PAPER_ROWS[dataset].items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines; equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(", ", ": ")) + "\n" for row in rows)
    write_atomic(path, text.encode("utf-8"))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON Lines file. Raises UserError with file and row."""
    try:
        handle = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; run `dvc repro data.dvc` or `dvc pull`") from None
    with handle:
        for number, line in enumerate(handle, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: row {number}: not UTF-8 at byte {error.start}") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: row {number}: not JSON: {error.msg} at column {error.colno}") from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{path}: row {number}: not readable as JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: expected an object, found {type(row).__name__}")
            yield row
