"""From rows as they were read to records, by the layout of their entry; a row that does not fit is quarantined."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.curation.sources.columns import COMMON_FIELDS, FIELDS, needed, read_json_columns
from rlhf.curation.sources.formats import Unreadable
from rlhf.curation.sources.layouts import LAYOUTS
from rlhf.curation.sources.paths import Row, Seen, same, separator_advice, value_at
from rlhf.curation.sources.read import parse_line
from rlhf.curation.sources.records import Group, Record, check_media
from rlhf.curation.sources.spec import Entry
from rlhf.curation.transcripts import ContentError
from rlhf.errors import UserError


@dataclass(frozen=True)
class Mapped:
    """What became of rows, each with its number, and the columns that were there.

    `quarantined`: reason, row, and whether it fits its layout: what it says is at fault.
    """

    records: list[tuple[int, Record]]
    quarantined: list[tuple[int, str, Any, bool]]
    seen: Seen


def row_of(row: Any, entry: Entry) -> Row | None:
    """The row as key and value, None for an empty line. Raises ValueError with the reason if it is none."""
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    if isinstance(row, str):
        if not row.strip():
            return None
        if "\ufffd" in row:
            raise ValueError("not UTF-8, or it holds U+FFFD")
        row = parse_line(row)
    return read_json_columns(row, entry)


def wanted(row: Row, entry: Entry) -> bool:
    """Whether the row has the values in the entry's `where`."""
    return all(same(value_at(row, path), value) for path, value in entry.where.items())


def map_rows(role: str, entry: Entry, numbers: Sequence[int], rows: Sequence[Any]) -> Mapped:
    """The records of a batch of rows, or of groups of rows. A pure function."""
    mapped = Mapped([], [], Seen())
    layout, paths = LAYOUTS[entry.layout], entry.paths()
    for number, item in zip(numbers, rows, strict=True):
        row: Any = item
        try:
            if not isinstance(item, Group):
                row = row_of(item, entry)
                if row is None:
                    continue
                mapped.seen.add(row, paths)
                if not wanted(row, entry):
                    continue
            for part in row.rows if isinstance(row, Group) else [row]:
                check_media(part)
            found = [(number, record) for record in layout(row, entry.read_as(role), entry)]
            mapped.records.extend([(number, _part(record, role)) for number, record in found] if entry.from_rankings
                                  else found)
        except (ValueError, AttributeError, TypeError) as error:  # a row that does not fit its layout
            content = row.rows if isinstance(row, Group) else getattr(item, "content", item)
            mapped.quarantined.append((number, str(error), content, isinstance(error, ContentError)))
    return mapped


def _part(record: Record, role: str) -> Record:
    """What a role takes of a comparison: SFT its best completion, PPO its prompt. Raises ValueError where SFT would
    take one that nobody preferred."""
    if role == "sft" and len(set(record.ranks)) == 1:
        raise ContentError("all completions tie, none is the best")
    best = (record.completions[record.ranks.index(min(record.ranks))],) if role == "sft" else ()
    return replace(record, completions=best, ranks=())


def check_columns(seen: Seen, role: str, entry: Entry, place: str) -> None:
    """Raises UserError for a column of the description that none of an entry's rows has."""
    if not seen.columns:
        return
    seen.check(place, entry.paths())
    if entry.layout != "columns" or entry.columns:
        return
    role = entry.read_as(role)
    known = [field for field in (*FIELDS[role], *COMMON_FIELDS) if field in seen.columns]
    if not any(set(fields) <= set(known) for fields in needed(role, entry)):
        ways = "; or ".join(" and ".join(fields) for fields in needed(role, entry))
        there = ", ".join(list(seen.columns)[:40])
        advice = separator_advice(list(seen.columns)) or "; map them with columns: {field: column}"
        raise UserError(f"{place}: no columns {ways}; there are {there}{advice}")
