"""Rows that are read again in each pass and never held in memory: of a file, of a split, a sample."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.data.schema import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows(Iterable[Row]):
    """The rows of a JSON Lines file or another re-iterable source for which `keep` is true; without `keep` all."""

    source: Path | Iterable[Row]
    keep: Callable[[Row], bool] | None = None

    def __iter__(self) -> Iterator[Row]:
        rows = read_rows(self.source) if isinstance(self.source, Path) else iter(self.source)
        return rows if self.keep is None else filter(self.keep, rows)


@dataclass(frozen=True)
class Drawn(Iterable[Row]):
    """The rows with the numbers `draw(number of rows)`, which must be ascending."""

    rows: Iterable[Row]
    draw: Callable[[int], list[int]]

    @cached_property
    def numbers(self) -> list[int]:
        return self.draw(sum(1 for _ in self.rows))

    def __iter__(self) -> Iterator[Row]:
        wanted = iter(self.numbers)
        following = next(wanted, None)
        for number, row in enumerate(self.rows):
            if following is None:
                return
            if number == following:
                yield row
                following = next(wanted, None)


def of_split(rows: Iterable[Row], split: str) -> Rows:
    """The rows of a split."""
    return Rows(rows, lambda row: row["split"] == split)
