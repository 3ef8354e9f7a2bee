"""Token ids of a whole dataset in an unnamed temporary file: written row by row, read by number, memory stays flat.

The file has no directory entry (O_TMPFILE): a killed stage leaves nothing behind, the next start writes it again, and
processes with the same scratch folder do not interfere. It is read with pread instead of mmap: pages of a mapping count
as memory of the process once they are touched, and an epoch touches all of them.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

Item = TypeVar("Item")
CHUNK = 256  # rows tokenized at once: the tokenizer's result takes about 100 bytes per token
BUFFER = 2**20


def chunks(items: Iterable[Item], count: int = CHUNK) -> Iterator[list[Item]]:
    """Lists of `count` items each; the last may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, count)):
        yield chunk


def _close(file: IO[bytes]) -> None:
    """Closes a file that nobody reads again; what it still holds may not fit on a full disk."""
    with suppress(OSError):
        file.close()


class TokenStore:
    """Rows of one or more lists of integers from 0 to 2^32 - 1; takes 12 bytes of memory per row.

    File format of a row: "H" or "I" (2 or 4 bytes per number, as its greatest one needs), number of lists, their
    lengths, their numbers. `folder`: of the file; None: the system's folder of temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=BUFFER)  # noqa: SIM115 (it lives as long as the store)
        weakref.finalize(self, _close, self._file)
        self._ends = array("q", [0])
        self._lengths = array("i")
        self._written = True

    def append(self, parts: Sequence[Sequence[int]], length: int) -> None:
        """Adds a row; batches of similar length go by `length`. Raises OverflowError if a number is out of range."""
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
        start = 1 + numbers[0]
        parts = []
        for length in numbers[1:start]:
            parts.append(numbers[start:start + length])
            start += length
        return parts

    def raw(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of the file. Raises OSError if it is shorter."""
        content = os.pread(self._file.fileno(), end - start, start)
        if len(content) != end - start:
            raise OSError(f"the token store ends at byte {start + len(content)}, {end} were written")
        return content

    def lengths(self) -> Sequence[int]:
        """The `length` of each row as an array of 4-byte integers."""
        return self._lengths


class Column(Sequence[Item], Generic[Item]):
    """A sequence over a store's rows: `read` converts the lists of a row into an item on access.

    `numbers`: its rows; None: all. A slice is a column too, so it takes no memory.
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
    """The only list of a row; the `read` of columns whose rows have one list."""
    return parts[0]


def lengths_of(sequences: Sequence[Any]) -> Sequence[int]:
    """The length of each sequence; a column's are known without reading the store."""
    if not isinstance(sequences, Column):
        return [len(item) for item in sequences]
    numbers, lengths = sequences.numbers, sequences.store.lengths()
    return lengths if numbers == range(len(lengths)) else array("i", (lengths[number] for number in numbers))
