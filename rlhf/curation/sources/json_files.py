"""JSON files that are not JSON Lines: an array of rows, or an object that holds them, one row in memory at a time.

pandas' orients are read too: records and table are such files, index, columns and split must be named.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.curation.sources.text_files import MAX_LINE, text_chunks, text_lines
from rlhf.errors import UserError
from rlhf.files import unique_keys

_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_BLANK = " \t\r\n"
_TAIL = 16  # characters in which a number or a word that was cut off goes on


class _Scanner:
    """Takes JSON values and marks from a file's text, of which it holds only the part that is being read."""

    def __init__(self, file: Path, encoding: str) -> None:
        self.file = file
        self.chunks = text_chunks(file, encoding)
        self.text, self.at, self.ended = "", 0, False

    def _read_more(self) -> None:
        chunk = next(self.chunks, None)
        self.ended = chunk is None
        self.text, self.at = self.text[self.at:] + (chunk or ""), 0

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._read_more()

    def take(self, marks: str) -> str:
        """The next mark, which must be one of `marks`. Raises UserError."""
        found = self.peek()
        if not found or found not in marks:
            raise self.error(f"expected {' or '.join(marks)}, found {found or 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value. Raises UserError if it is none, or longer than MAX_LINE."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                rest = self.text[end:end + _TAIL]
                if self.ended or (rest and (rest[0] not in ".eE" or len(rest) == _TAIL)):  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _TAIL
                if self.ended or not cut_off:
                    raise self.error(error.msg) from None
            except RecursionError:
                raise self.error("nested too deep") from None
            except ValueError as error:  # of unique_keys
                raise UserError(f"{self.file}: {error}") from None
            if len(self.text) - self.at > MAX_LINE:
                raise self.error(f"a value is longer than {MAX_LINE:,} characters")
            self._read_more()

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; after each its value must be taken."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            self.take(":")
            yield str(key)
            if self.take(",}") == "}":
                return

    def error(self, message: str) -> UserError:
        return UserError(f"{self.file}: not JSON: {message}")


def is_json_lines(file: Path, encoding: str) -> bool:
    """Whether a file whose name says .json has an object on each of its first lines."""
    found = 0
    try:
        for line in text_lines(file, encoding):
            if line.strip():
                if not line.lstrip().startswith("{") or not isinstance(json.loads(line), dict):
                    return False
                found += 1
                if found == 2:
                    return True
    except (UserError, json.JSONDecodeError, RecursionError):  # what reads the file says what is wrong with it
        return False
    return False


def json_rows(file: Path, encoding: str, key: str, orient: str) -> Iterator[Any]:
    """The rows of an array, or of the list in an object; `key` names the list where the object has several.

    `orient`: pandas' index, columns or split; these files are read as a whole. Raises UserError.
    """
    if orient:
        yield from _oriented(file, encoding, orient)
        return
    scanner = _Scanner(file, encoding)
    first = scanner.peek()
    if not first:
        return
    if first == "[":
        if key:
            raise UserError(f"{file}: is an array; remove rows: {key}")
        yield from scanner.items()
    elif first == "{":
        name = key or _only_list(file, encoding)
        if name is None:
            yield scanner.value()
        else:
            yield from _list_at(scanner, name)
            return
    else:
        raise scanner.error(f"expected [ or {{, found {first}")
    if scanner.peek():
        raise scanner.error("more follows the end of the array; write one object a line, in a file .jsonl")


def _list_at(scanner: _Scanner, name: str) -> Iterator[Any]:
    others = []
    for key in scanner.members():
        if key == name and scanner.peek() == "[":
            yield from scanner.items()
            name = "\0"  # a second one is another
        else:
            others.append(key)
            scanner.value()
    if name != "\0":
        raise UserError(f"{scanner.file}: no list {name}; there are {', '.join(others)}")


def _only_list(file: Path, encoding: str) -> str | None:
    """The key of the object's only list of rows; None if the object is itself a row. Raises UserError."""
    scanner = _Scanner(file, encoding)
    lists, kinds = [], set()
    for key in scanner.members():
        if scanner.peek() == "[":
            is_list = False
            for number, item in enumerate(scanner.items()):
                is_list = is_list or (number == 0 and isinstance(item, dict))
            lists += [key] if is_list else []
            kinds.add(list)
        else:
            kinds.add(type(scanner.value()))
    if scanner.peek():
        raise scanner.error("more follows the end of the object; write one object a line, in a file .jsonl")
    if len(lists) > 1:
        raise UserError(f"{file}: has lists of rows in {', '.join(lists)}; name one: rows: {lists[0]}")
    if not lists and kinds == {dict}:
        raise UserError(f"{file}: an object of objects; write orient: index (a row under each key) or "
                        "orient: columns (a column under each key, pandas' default)")
    if not lists and kinds == {list}:
        raise UserError(f"{file}: an object of lists; write orient: split (columns, index, data) or "
                        "orient: columns (a list for each column)")
    return lists[0] if lists else None


def _oriented(file: Path, encoding: str, orient: str) -> Iterator[Any]:
    scanner = _Scanner(file, encoding)
    try:
        whole = json.loads("".join([scanner.text, *scanner.chunks]), object_pairs_hook=unique_keys)
        if orient == "index":
            yield from whole.values()
        elif orient == "split":
            names = whole["columns"]
            yield from (dict(zip(names, row, strict=True)) for row in whole["data"])
        else:
            lists = {name: list(column.values()) if isinstance(column, dict) else column
                     for name, column in whole.items()}
            yield from (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: does not fit orient: {orient}: {error}") from None
