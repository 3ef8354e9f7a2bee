"""Groups rows by a column without holding them in memory: a row for each response makes one ranking a prompt."""

import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.curation.sources.formats import Unreadable
from rlhf.curation.sources.map_rows import row_of, wanted
from rlhf.curation.sources.paths import Seen, value_at
from rlhf.curation.sources.records import Group, same_id
from rlhf.curation.sources.spec import Entry
from rlhf.curation.transcripts import turns_of

BATCH = 200
Batch = tuple[str, list[int], list[Any]]


def build_groups(batches: Iterable[Batch], entry: Entry, by: list[str], folder: Path, seen: Seen) -> Iterator[Batch]:
    """Batches of groups, each at the place and with the number of its first row, in the order of reading.

    A row that cannot be read, or has no value to group by, comes by itself as Unreadable. The rows are stored in a
    temporary database in `folder`, pickled, since Parquet's have bytes and dates: only this function writes and reads
    it. `seen` learns which columns they have.
    """
    file = folder / "groups.sqlite"
    file.unlink(missing_ok=True)
    database = sqlite3.connect(file, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE row (key TEXT, number INTEGER, place TEXT, seq INTEGER PRIMARY KEY, body BLOB)")
        database.execute("BEGIN")
        for place, numbers, rows in batches:
            bad: list[tuple[int, Unreadable]] = []
            for number, row in zip(numbers, rows, strict=True):
                try:
                    parsed = row_of(row, entry)
                    if parsed is None:
                        continue
                    seen.add(parsed, entry.paths())
                    if not wanted(parsed, entry):
                        continue
                    key = _key(parsed, by)
                except ValueError as error:
                    bad.append((number, Unreadable(str(error), getattr(row, "content", row))))
                    continue
                database.execute("INSERT INTO row (key, number, place, body) VALUES (?, ?, ?, ?)",
                                 (key, number, place, pickle.dumps(parsed)))
            if bad:
                yield place, [number for number, _ in bad], [row for _, row in bad]
        database.execute("COMMIT")
        database.execute("CREATE TABLE first AS SELECT key, MIN(seq) AS start FROM row GROUP BY key")
        database.execute("CREATE INDEX by_key ON row (key, seq)")
        yield from _groups(database)
    finally:
        database.close()
        file.unlink(missing_ok=True)


def _key(row: Any, by: list[str]) -> str:
    values = [value_at(row, path) for path in by]
    for path, value in zip(by, values, strict=True):
        if value is None or value == "":
            raise ValueError(f"no {path} to group by")
    return repr([_turns_or_id(value) for value in values])


def _turns_or_id(value: Any) -> Any:
    """A value to group by: of messages what is said, whatever else they hold, and of one turn its text."""
    if not isinstance(value, list):
        return same_id(value)
    try:
        turns = turns_of(value, "keep")
    except ValueError:
        return same_id(value)
    return turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else turns


def _groups(database: sqlite3.Connection) -> Iterator[Batch]:
    numbers: list[int] = []
    groups: list[Any] = []
    place, start = "", None
    for first, where, number, body in database.execute(
            "SELECT start, place, number, body FROM first JOIN row USING (key) ORDER BY start, seq"):
        if first != start:
            if groups and (where != place or len(groups) >= BATCH):
                yield place, numbers, groups
                numbers, groups = [], []
            place, start = where, first
            numbers.append(number)
            groups.append(Group([]))
        groups[-1].rows.append(pickle.loads(body))
    if groups:
        yield place, numbers, groups
