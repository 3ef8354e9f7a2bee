"""The append-only file of a batch's labels: one JSON line per label, on disk before the submission is confirmed.

A correction is a later line. A submission that arrives twice (a double click, a lost confirmation) is stored once. A
line that a crash cut short is removed before the next one is written.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlops.labeling.batch import Item, read_batch
from mlops.labeling.guide import FLAG_QUESTIONS
from rlhf.errors import UserError
from rlhf.files import sync_folder

LIKERT = range(1, 8)
LABELS = "labels.jsonl"


@dataclass(frozen=True)
class Label:
    """One labeler's judgement of an item, in the item's own order of completions.

    `ranks`: 1 is best, ties share a rank, dense. `overall`: 1 to 7 per completion, or empty. `flags`: per completion
    the keys of guide.FLAG_QUESTIONS that are answered with yes, or empty.
    """

    submission_id: str
    item_id: str
    labeler_id: str
    ranks: tuple[int, ...]
    overall: tuple[int, ...] = ()
    flags: tuple[tuple[str, ...], ...] = field(default=())

    def row(self) -> dict[str, Any]:
        return {"submission_id": self.submission_id, "item_id": self.item_id, "labeler_id": self.labeler_id,
                "ranks": list(self.ranks), "overall": list(self.overall), "flags": [list(item) for item in self.flags]}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Label":
        return cls(row["submission_id"], row["item_id"], row["labeler_id"], tuple(row["ranks"]), tuple(row["overall"]),
                   tuple(tuple(item) for item in row["flags"]))


def check(label: Label, items: Mapping[str, Item]) -> None:
    """Raises UserError, one line, for an invalid label."""
    where = f"label {label.submission_id}: "
    item = items.get(label.item_id)
    if item is None:
        raise UserError(f"{where}no item {label.item_id} in this batch")
    count = len(item.completions)
    if len(label.ranks) != count:
        raise UserError(f"{where}{len(label.ranks)} ranks for {count} completions")
    if sorted(set(label.ranks)) != list(range(1, len(set(label.ranks)) + 1)):
        raise UserError(f"{where}ranks {list(label.ranks)}: 1 is best, ties share a rank, none is left out")
    if label.overall and (len(label.overall) != count or any(value not in LIKERT for value in label.overall)):
        raise UserError(f"{where}overall {list(label.overall)}: expected {count} numbers from 1 to 7")
    if label.flags and len(label.flags) != count:
        raise UserError(f"{where}flags for {len(label.flags)} of {count} completions")
    if unknown := sorted({flag for flags in label.flags for flag in flags} - set(FLAG_QUESTIONS)):
        raise UserError(f"{where}unknown flag {unknown[0]}; known: {', '.join(FLAG_QUESTIONS)}")


@dataclass(frozen=True)
class LabelStore:
    """The file of a batch's labels. Several processes may add labels at the same time."""

    path: Path

    def add(self, *labels: Label) -> int:
        """Appends labels that are not stored yet; on return they survive a crash. Returns how many were appended."""
        with self._locked() as file:
            known = {row["submission_id"] for row in _whole_lines(file.read())}
            new = list({label.submission_id: label for label in labels if label.submission_id not in known}.values())
            file.seek(0, os.SEEK_END)
            file.writelines(json.dumps(label.row(), ensure_ascii=False).encode() + b"\n" for label in new)
            file.flush()
            os.fsync(file.fileno())
        return len(new)

    def forget(self, which: Callable[[Label], bool]) -> None:
        """Removes labels: only simulated ones, which can be made again; never people's."""
        with self._locked() as file:
            rows = list(_whole_lines(file.read()))
            remaining = [row for row in rows if not which(Label.read(row))]
            if len(remaining) < len(rows):
                file.truncate(0)
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in remaining)

    def all(self) -> list[Label]:
        """All labels in order of arrival, corrections included."""
        if not self.path.exists():
            return []
        return [Label.read(row) for row in _whole_lines(self.path.read_bytes())]

    def current(self) -> dict[tuple[str, str], Label]:
        """{(item, labeler): the latest label}."""
        return {(label.item_id, label.labeler_id): label for label in self.all()}

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        """The open file, locked, without a last line that a crash cut short."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if new:
                sync_folder(self.path.parent)
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.seek(0)
            yield file


def _whole_lines(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


@dataclass(frozen=True)
class Batch:
    """A batch's folder: its assignments and labels."""

    folder: Path

    @property
    def store(self) -> LabelStore:
        return LabelStore(self.folder / LABELS)

    def assigned(self) -> int:
        return len(read_batch(self.folder)[1])

    def missing(self) -> list[tuple[str, str]]:
        """(item, labeler) of the assignments that have no label, in order."""
        known = self.store.current()
        return [key for item in read_batch(self.folder)[1] if (key := (item.item_id, item.labeler_id)) not in known]
