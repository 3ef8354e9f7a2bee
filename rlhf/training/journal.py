"""The journal: one CSV row per step, flushed at once. It is the record of a training; MLflow gets an upload of it."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.files import is_writer


class Journal:
    """Appends rows with fixed columns to a CSV file whose first column is the step.

    On resume it is truncated to the checkpoint's step, so that a killed and resumed run leaves the same bytes as an
    uninterrupted one. Numbers are written in the shortest form that reads back exactly (`repr`). Of several processes
    only the main one writes.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_after: int | None = None,
                 sometimes: Sequence[str] = ()) -> None:
        """`resume_after`: keep the rows up to and including this step; None starts a new file. `sometimes`: further
        columns, blank in rows without a value."""
        self.columns, self.sometimes = ["step", *columns, *sometimes], frozenset(sometimes)
        if not is_writer():
            return
        rows: list[dict[str, str]] = []
        if resume_after is not None and path.exists():
            rows = [row for row in read_journal(path) if int(row["step"]) <= resume_after]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(path)
        self.path = path
        self._handle = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._handle, self.columns, lineterminator="\n")

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and flushes one row. Raises ValueError if columns are missing or unknown."""
        if wrong := (set(values) ^ set(self.columns[1:])) - (self.sometimes - set(values)):
            raise ValueError(f"journal columns differ: {sorted(wrong)}")
        if not is_writer():
            return
        self._writer.writerow({"step": step, **values})
        self._handle.flush()

    def sync(self) -> None:
        """Makes the rows durable; called before a checkpoint is saved."""
        if is_writer():
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        if is_writer():
            self._handle.close()


def read_journal(path: Path) -> list[dict[str, str]]:
    """The complete rows of a journal; a partially written last row is dropped."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(complete.splitlines()))
