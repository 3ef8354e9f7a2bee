"""A look at a source before it is made: its first rows as they came in and as they would be kept, counts of a sample.

The sample is the first rows of each entry, so rules that compare rows see only these.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf.curation.assemble import batches_of
from rlhf.curation.loss import is_too_much, lost_rows, reason_kind
from rlhf.curation.rules import RULES, STAYS, Rows, apply_rules
from rlhf.curation.screen import Screened, screen_rows
from rlhf.curation.sources.map_rows import check_columns
from rlhf.curation.sources.paths import Seen
from rlhf.curation.sources.read import name_of
from rlhf.curation.sources.records import Group
from rlhf.curation.sources.spec import Entry, RulesParams, Source
from rlhf.data.schema import KEYS, SPLITS
from rlhf.errors import UserError

SAMPLE, FURTHER = 2000, 20_000  # rows of each entry
LONG, ITEMS = 160, 6  # what is shown of a text and of a list


@dataclass
class _Sample:
    """The sample of a role: its rows for the rules, and the first ones of each entry of each entry."""

    rows: Rows = field(default_factory=Rows)
    read: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    shown: list[tuple[Entry, str, Any, list[int | str]]] = field(default_factory=list)
    screened: dict[int, Screened] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    whole: bool = True  # all rows of all entries were read


def preview(source: Source, root: Path, seed: int, count: int) -> Iterator[str]:
    """The lines to show: for each role and entry its columns and `count` first rows, then what the rules do.

    Writes nothing but a temporary folder. Raises UserError if a source cannot be read.
    """
    roles = [role for role in KEYS if getattr(source, role)]
    with TemporaryDirectory() as folder:
        samples = {role: _sample(role, source, root, seed, count, Path(folder)) for role in roles}
    decided = apply_rules({role: samples[role].rows for role in roles}, source.rules, seed)
    for role in roles:
        splits, fates = decided[role]
        yield from _of_role(role, samples[role], splits, fates, source.rules)


def _sample(role: str, source: Source, root: Path, seed: int, count: int, folder: Path, most: int | None = None
            ) -> _Sample:
    sample, most = _Sample(), most or SAMPLE
    for entry in getattr(source, role):
        seen, left, shown = Seen(), most, 0
        for place, numbers, rows in batches_of(entry, root, folder, seen, left):
            for number, row in islice(zip(numbers, rows, strict=True), left):
                screened, bad, found = screen_rows(role, entry, source.rules, seed, [number], [row])
                seen.merge(found)
                results: list[int | str] = [f"quarantined: {item.reason}" for item in bad]
                for item in screened:
                    results.append(len(sample.rows.keys))
                    if shown < count:
                        sample.screened[len(sample.rows.keys)] = item
                    sample.rows.add(item)
                sample.read += len(screened) + len(bad)
                sample.quarantined.update(reason_kind(item.reason) for item in bad)
                if results and shown < count:
                    sample.shown.append((entry, f"{place} row {number}", row, results))
                    shown += 1
            left -= len(numbers)
            sample.whole &= left > 0
            if left <= 0:
                break
        try:
            check_columns(seen, role, entry, name_of(entry))
        except UserError as error:
            if left > 0:  # all rows have been read
                raise
            sample.notes[id(entry)] = f"{error} (of the first {most:,})"
        if not shown:
            sample.notes.setdefault(id(entry), f"{name_of(entry)}: no row in the first {most:,}")
    return sample


def _of_role(role: str, sample: _Sample, splits: np.ndarray, fates: np.ndarray, rules: RulesParams) -> Iterator[str]:
    names, said = list(RULES), None
    for entry, place, row, results in sample.shown:
        if entry is not said:
            yield f"{role}: {name_of(entry)}: {mapping_of(entry)}"
            said = entry
        yield f"  {place}"
        yield f"    came in: {_json(row)}"
        for result in results:
            if isinstance(result, str):
                yield f"    {result}"
            elif fates[result] != STAYS:
                yield f"    dropped: {names[fates[result]]}"
            else:
                item = sample.screened[result]
                line = item.head + f', "split": "{SPLITS[splits[result]]}", '.encode() + item.tail
                yield f"    kept: {_json(json.loads(line))}"
    yield from sample.notes.values()
    dropped = Counter(names[fate] for fate in fates[fates != STAYS].tolist())
    yield f"{role}: of {sample.read:,} rows read {int((fates == STAYS).sum()):,} would be kept"
    yield from (f"  quarantined: {reason}: {number:,}" for reason, number in sample.quarantined.most_common())
    yield from (f"  dropped: {rule}: {number:,}" for rule, number in dropped.most_common())
    counts = {"read": sample.read, "quarantined": sample.quarantined, "dropped": dropped,
              "kept": int((fates == STAYS).sum())}
    if sample.read and is_too_much(counts, rules):
        yield (f"  would be refused: {lost_rows(counts):,} rows are lost, more than the rules allow (max_lost_share = "
               f"{rules.max_lost_share:g})")


def mapping_of(entry: Entry) -> str:
    """How an entry's rows become records, in a line."""
    parts = [f"{name} = {' + '.join(entry.column_paths(name))}" for name in entry.columns]
    if not parts:
        parts = ["columns with the fields' names" if entry.layout == "columns" else f"layout {entry.layout}"]
    if entry.groups():
        parts.append(f"grouped by {' and '.join(entry.groups())}")
    if entry.preference:
        parts.append(", ".join(f"{name} {value}" for name, value in entry.preference.items()))
    parts += [f"where {name} = {value}" for name, value in entry.where.items()]
    return "; ".join(parts)


def _json(row: Any) -> str:
    if isinstance(row, Group):
        row = row.rows
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError:
            return row[:LONG]
    return json.dumps(_short(row), ensure_ascii=False, default=_short)


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LONG else f"{value[:LONG]}… ({len(value):,} characters)"
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        more = [f"… ({len(value)} items)"] if len(value) > ITEMS else []
        return [*map(_short, value[:ITEMS]), *more]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return f"{len(value)} bytes" if isinstance(value, bytes) else _short(str(value))


@dataclass(frozen=True)
class Look:
    """The first rows of a role: how many were read, those that would be kept, why a run would refuse them.

    `whole`: these are all rows. Else later ones may be better, and `refused` is no verdict. `lost`: the most frequent
    reasons why rows are not kept.
    """

    read: int
    kept: list[dict[str, Any]]
    refused: str = ""
    whole: bool = True
    lost: str = ""


def look_at(source: Source, root: Path, seed: int, further: bool = False) -> dict[str, Look]:
    """The first SAMPLE rows of each entry as a run would keep them, by role; `further`: the first FURTHER. Raises
    UserError if a source cannot be read."""
    roles = [role for role in KEYS if getattr(source, role)]
    most = FURTHER if further else SAMPLE
    with TemporaryDirectory() as folder:
        samples = {role: _sample(role, source, root, seed, most, Path(folder), most) for role in roles}
    decided = apply_rules({role: samples[role].rows for role in roles}, source.rules, seed)
    found = {}
    for role, sample in samples.items():
        splits, fates = decided[role]
        kept = [json.loads(item.head + f', "split": "{SPLITS[splits[index]]}", '.encode() + item.tail)
                for index, item in sorted(sample.screened.items()) if fates[index] == STAYS]
        dropped = Counter(list(RULES)[fate] for fate in fates[fates != STAYS].tolist())
        counts = {"read": sample.read, "quarantined": sample.quarantined, "dropped": dropped, "kept": len(kept)}
        reasons = [*sample.quarantined.most_common(2), *dropped.most_common(2)]
        why = ", ".join(f"{reason} {number:,}" for reason, number in reasons)
        refused = next(iter(sample.notes.values()), "")
        if not kept:
            refused = refused or f"none of its first {sample.read:,} rows can be used ({why})"
        elif is_too_much(counts, source.rules):
            refused = (f"{lost_rows(counts):,} of its first {sample.read:,} rows are lost ({why}), more than "
                       f"rules.max_lost_share = {source.rules.max_lost_share:g}")
        found[role] = Look(sample.read, kept, refused, sample.whole, why)
    return found
