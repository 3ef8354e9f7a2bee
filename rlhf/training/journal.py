"""The journal: one CSV row a step, flushed as it is written. It is the record; trackers mirror it."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.files import writes


class Journal:
    """Appends rows with fixed columns to a CSV file whose first column is the step.

    On resume it is cut back to the checkpoint's step, so that a killed and resumed run leaves the bytes of one
    that was never killed. Numbers are written with `repr`-exact shortest form. Of several processes that train
    together only the first writes.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_after: int | None = None) -> None:
        """`resume_after`: keep rows up to and including this step; None starts the file anew."""
        self.columns = ["step", *columns]
        if not writes():
            return
        kept: list[dict[str, str]] = []
        if resume_after is not None and path.exists():
            kept = [row for row in read_journal(path) if int(row["step"]) <= resume_after]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)
        self.path = path
        self._handle = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._handle, self.columns, lineterminator="\n")

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row and flushes it. Raises ValueError where columns are missing or unknown."""
        if set(values) != set(self.columns[1:]):
            raise ValueError(f"journal columns differ: {sorted(set(values) ^ set(self.columns[1:]))}")
        if not writes():
            return
        self._writer.writerow({"step": step, **values})
        self._handle.flush()

    def sync(self) -> None:
        """Makes the rows durable; called before a checkpoint that counts on them."""
        if writes():
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        if writes():
            self._handle.close()


def read_journal(path: Path) -> list[dict[str, str]]:
    """The whole rows of a journal; a half-written last row is left out."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(complete.splitlines()))
