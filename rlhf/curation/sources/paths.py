"""Columns by name: `a.b` is key b of column a, `list[].text` the text of each object of a list, `turns[0]` an item."""

import ast
import io
import itertools
import json
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from rlhf.errors import UserError
from rlhf.files import unique_keys

Row = Mapping[str, Any]

MAX_NAMES = 40  # of columns in a message
_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d*)\]")
_COMPARISON = re.compile(r"(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)")
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "1.0": True,
          "false": False, "no": False, "off": False, "0": False, "0.0": False}


@lru_cache(maxsize=512)
def steps_of(path: str) -> tuple[str | int | None, ...]:
    """The steps of a path: a key, an index, or None for each item of a list."""
    return tuple(name if name else int(index) if index else None for name, index in _STEP.findall(path))


def as_list(value: Any) -> Any:
    """A list that is written as text, in JSON or as Python shows it (a cell of a CSV file); else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, RecursionError):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        if _joins_texts(value.strip()):
            raise ValueError("a list of texts without commas, as numpy prints it, cannot be read; save the column as "
                             f"JSON: {value.strip()[:40]}") from None
        return found


def _joins_texts(source: str) -> bool:
    """Whether two texts stand side by side, which Python would join: a list that numpy has printed."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    return any(one == other == tokenize.STRING for one, other in itertools.pairwise(kinds))


def value_at(row: Row, path: str) -> Any:
    """The value at a path, None if it is not there. A column of exactly this name takes precedence."""
    return row[path] if path in row else _walk(row, steps_of(path))


def _walk(value: Any, steps: Sequence[str | int | None]) -> Any:
    for number, step in enumerate(steps):
        value = as_list(value)
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, Mapping) else None
        elif isinstance(value, Mapping) and step is None:
            continue  # a list of objects that was saved as an object of lists
        elif isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return None
        elif step is None:
            return [_walk(item, steps[number + 1:]) for item in value]
        else:
            value = value[step] if -len(value) <= step < len(value) else None
    return value


def _missing(value: Any, steps: Sequence[str | int | None]) -> tuple[int, list[str]] | None:
    """None if there is something at the steps; else how many of them there are, and the keys at that place."""
    for number, step in enumerate(steps):
        value = as_list(value)
        if isinstance(step, str):
            if not isinstance(value, Mapping) or step not in value:
                return number, sorted(map(str, value)) if isinstance(value, Mapping) else []
            value = value[step]
        elif isinstance(value, Mapping) and step is None:
            continue
        elif isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return number, []
        elif step is None:
            found = [_missing(item, steps[number + 1:]) for item in value]
            if not found or None in found:
                return None if found else (number, [])
            depth, keys = _deepest(item for item in found if item)
            return number + 1 + depth, keys
        elif not -len(value) <= step < len(value):
            return number, []
        else:
            value = value[step]
    return None


def _deepest(missing: Iterable[tuple[int, list[str]]]) -> tuple[int, list[str]]:
    """How many steps led furthest, and all keys at these places (at most MAX_NAMES and one)."""
    found = list(missing)
    depth = max(item[0] for item in found)
    return depth, sorted({key for item in found if item[0] == depth for key in item[1]})[:MAX_NAMES + 1]


_COMMA_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:\.\d{3})+|\d+)?(?:,\d+)?(?:[eE][+-]?\d+)?")  # 1.000,5 is a thousand


def as_number(value: Any, decimal: str = ".") -> float | None:
    """The number that a value is or says, true and false being 1 and 0; None if it is none, or NaN."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return float(text.lower() == "true")
        if decimal == "," and not _COMMA_NUMBER.fullmatch(text):
            return None  # 0.5 beside 0,5: one of them is written otherwise
        value = text.replace(".", "").replace(",", ".") if decimal == "," else text
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number != number else number


def same(value: Any, wanted: Any) -> bool:
    """Whether a value is the one that a description writes, compared as text or number.

    `wanted`: null is an absent or empty value, a list any of its values, "> 0" a comparison of numbers, true and false
    are also the texts that say so (in CSV).
    """
    if isinstance(wanted, list):
        return any(same(value, item) for item in wanted)
    if isinstance(wanted, Mapping):
        return not same(value, wanted["not"])
    if wanted is None or value is None:
        return wanted is None and (value is None or value == "" or value != value)
    if isinstance(wanted, bool):
        said = _TRUTH.get(value.strip().lower()) if isinstance(value, str) else value
        return said in (0, 1) and bool(said) == wanted
    if isinstance(value, bool) and isinstance(wanted, str) and not _COMPARISON.fullmatch(wanted.strip()):
        return wanted.strip().lower() == str(value).lower()
    if isinstance(wanted, str):
        comparison = _COMPARISON.fullmatch(wanted.strip())
        if comparison:
            return _compares(as_number(value), comparison[1], float(comparison[2]))
        if isinstance(value, str):
            return value.strip() == wanted.strip()
    if isinstance(wanted, int | float) or isinstance(value, int | float):
        number = as_number(value)
        return number is not None and number == as_number(wanted)
    return str(value) == str(wanted)


def is_bad_comparison(wanted: Any) -> bool:
    """Whether a text of a description seems to compare with something else than a number, as "> 2024-01-01" does."""
    return isinstance(wanted, str) and bool(re.fullmatch(r"(<=|>=|<|>)\s*[^\s<>][^<>]*", wanted.strip())) and \
        not _COMPARISON.fullmatch(wanted.strip())


def _compares(value: float | None, sign: str, limit: float) -> bool:
    if value is None:
        return False
    return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[sign]


@dataclass
class Seen:
    """Which columns rows have, and which paths of a description lead to something."""

    columns: dict[str, None] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    deepest: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, row: Row, paths: Iterable[str]) -> None:
        """Notes the columns of a row, and which of the paths it has."""
        if not self.columns.keys() >= row.keys():
            self.columns.update(dict.fromkeys(map(str, row)))
        for path in paths:
            if path in self.paths:
                continue
            missing = None if path in row else _missing(row, steps_of(path))
            if missing is None:
                self.paths.add(path)
            else:
                self.deepest[path] = _deepest([missing, self.deepest.get(path, (0, []))])

    def merge(self, other: "Seen") -> None:
        self.columns |= other.columns
        self.paths |= other.paths
        for path, missing in other.deepest.items():
            self.deepest[path] = _deepest([missing, self.deepest.get(path, (0, []))])

    def check(self, place: str, paths: Sequence[str]) -> None:
        """Raises UserError for a path that no row has; it lists what is there."""
        absent = [path for path in paths if path not in self.paths]
        if not absent:
            return
        path = absent[0]
        depth, keys = self.deepest.get(path, (0, []))
        there = keys if depth and keys else list(self.columns)
        inside = f"{_text(steps_of(path)[:depth])} has" if depth and keys else "there are"
        name = steps_of(path)[depth] if depth < len(steps_of(path)) else path
        close = get_close_matches(str(name), there, n=1)
        advice = f"; did you mean {close[0]}?" if close else separator_advice(there)
        listed = ", ".join(there[:MAX_NAMES]) + (" ..." if len(there) > MAX_NAMES else "")
        more = f" (nor {', '.join(absent[1:])})" if len(absent) > 1 else ""
        raise UserError(f"{place}: column {path}: no row has it{more}; {inside} {listed}{advice}")


def _text(steps: Sequence[str | int | None]) -> str:
    return "".join(f".{step}" if isinstance(step, str) else f"[{'' if step is None else step}]"
                   for step in steps).removeprefix(".")


def separator_advice(names: list[str]) -> str:
    """Advice where a file's only column seems to be several that another delimiter separates."""
    mark = next((mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]), None)
    if mark is None:
        return ""
    return f"; they seem to be separated by {mark!r}: write delimiter: {json.dumps(mark)}"
