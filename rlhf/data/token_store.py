"""Token ids of a whole dataset in a file without a name: written row by row, read by number, so memory stays flat.

The file has no entry in its folder (O_TMPFILE): a stage that is killed, at any moment, leaves nothing behind, the next
start writes it anew, and processes that share a scratch folder do not meet. It is read with pread and not mapped:
pages of a mapping count as the process's own memory once they were touched, and an epoch touches all.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

Item = TypeVar("Item")
CHUNK = 256  # rows that are tokenized together: what the tokenizer returns is some 100 bytes a token
BUFFER = 2**20


def chunks(items: Iterable[Item], count: int = CHUNK) -> Iterator[list[Item]]:
    """`count` items after the other, the last list shorter."""
    rest = iter(items)
    while some := list(islice(rest, count)):
        yield some


class TokenStore:
    """Rows of one or more lists of whole numbers from 0 to 2^32 - 1; twelve bytes of memory a row.

    A row in the file: "H" or "I" (two or four bytes a number, what its greatest one needs), the number of lists, their
    lengths, their numbers. `folder`: where the file lies; None: where temporary files do.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=BUFFER)  # noqa: SIM115 (it lives as long as the store)
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._lengths = array("i")
        self._written = True

    def append(self, parts: Sequence[Sequence[int]], length: int) -> None:
        """Adds a row; `length` is what batches of like length are made by. OverflowError: a number is out of range."""
        numbers = [len(parts), *map(len, parts)]
        for part in parts:
            numbers += part
        try:
            packed = array("H", numbers)
        except OverflowError:
            packed = array("I", numbers)
        self._file.write(packed.typecode.encode())
        self._file.write(packed)
        self._ends.append(self._ends[-1] + 1 + len(packed) * packed.itemsize)
        self._lengths.append(length)
        self._written = False

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, number: int) -> list[list[int]]:
        if not self._written:
            self._file.flush()
            self._written = True
        if not 0 <= number < len(self):
            raise IndexError(number)
        raw = self.raw(self._ends[number], self._ends[number + 1])
        packed = array(chr(raw[0]))
        packed.frombytes(memoryview(raw)[1:])
        numbers = packed.tolist()
        place = 1 + numbers[0]
        parts = []
        for length in numbers[1:place]:
            parts.append(numbers[place:place + length])
            place += length
        return parts

    def raw(self, start: int, end: int) -> bytes:
        """Bytes of the file. Raises OSError where it is shorter."""
        found = os.pread(self._file.fileno(), end - start, start)
        if len(found) != end - start:
            raise OSError(f"the token store ends at byte {start + len(found)}, {end} were written")
        return found

    def lengths(self) -> Sequence[int]:
        """The `length` of each row, four bytes each; NumPy takes it as it is."""
        return self._lengths


class Column(Sequence[Item], Generic[Item]):
    """A store's rows as a list would show them: `read` makes an item of a row's lists when it is asked for.

    `numbers`: the rows that it shows; None: all. A slice is a column too, so that it costs no memory.
    """

    def __init__(self, store: TokenStore, read: Callable[[list[list[int]]], Item], numbers: range | None = None
                 ) -> None:
        self.store, self.read, self._numbers = store, read, numbers

    @property
    def numbers(self) -> range:
        return range(len(self.store)) if self._numbers is None else self._numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> Item: ...

    @overload
    def __getitem__(self, number: slice) -> "Column[Item]": ...

    def __getitem__(self, number: int | slice) -> "Item | Column[Item]":
        if isinstance(number, slice):
            return Column(self.store, self.read, self.numbers[number])
        return self.read(self.store[self.numbers[number]])


def only(parts: list[list[int]]) -> list[int]:
    """The list of rows that have one."""
    return parts[0]


def lengths_of(sequences: Sequence[Any]) -> Sequence[int]:
    """Length of each sequence: what a store knows without reading, or counted."""
    if not isinstance(sequences, Column):
        return [len(item) for item in sequences]
    shown, lengths = sequences.numbers, sequences.store.lengths()
    return lengths if shown == range(len(lengths)) else array("i", (lengths[number] for number in shown))
