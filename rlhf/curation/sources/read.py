"""Streams the rows of an entry through `datasets`: from the hub, or from files, compressed or not.

JSON Lines are read as lines and taken apart here: `datasets` would infer one type for the whole file, and nested rows
(reply trees) have none. Nothing is downloaded whole and no file is held in memory.
"""

import csv
import json
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from rlhf.curation.sources.spec import Entry
from rlhf.errors import UserError

BATCH = 1000
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv",
           ".tsv": "tsv"}
COMPRESSED = (".gz", ".zst")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Row = dict[str, Any]


def name_of(entry: Entry) -> str:
    """How messages call the entry."""
    if entry.files:
        return entry.files
    return f"{entry.dataset}/{entry.data_dir}" if entry.data_dir else entry.dataset


def read_entry(entry: Entry, root: Path) -> Iterator[tuple[str, list[int], list[Any]]]:
    """Batches of (place, row numbers from 1, rows); a row is a dict, or bytes-like text of one JSON line.

    `root`: the folder that file patterns are relative to. Raises UserError: nothing there, unreadable, broken off.
    """
    if entry.dataset:
        yield from _hub(entry, root)
        return
    files = sorted(glob(str(root / entry.files), recursive=True)) if entry.files else []
    if not files:
        raise UserError(f"{root / entry.files}: no such file; a pattern is relative to the source's description")
    for file in files:
        yield from _file(entry, Path(file))


def _format(entry: Entry, file: Path) -> str:
    if entry.format != "auto":
        return entry.format
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    kind = FORMATS.get(Path(name).suffix)
    if kind is None:
        raise UserError(f"{file}: unknown kind of file; give format: jsonl, parquet, csv or tsv")
    return kind


def _file(entry: Entry, file: Path) -> Iterator[tuple[str, list[int], list[Any]]]:
    kind = _format(entry, file)
    if kind == "parquet" and file.suffix in COMPRESSED:
        raise UserError(f"{file}: Parquet is compressed inside; unpack this file first (its parts are read at random)")
    if file.stat().st_size == 0:
        return
    with _one_line(file):
        if kind == "jsonl":
            stream = _stream("text", file, encoding_errors="replace")
        elif kind == "parquet":
            stream = _stream("parquet", file)
        else:
            separator = "," if kind == "csv" else "\t"
            stream = _stream("csv", file, sep=separator, keep_default_na=False, na_filter=False,
                             features=_all_text(_header(file, separator)))
        for first, rows in _batches(stream):
            yield str(file), list(range(first + 1, first + 1 + len(rows))), rows


def _stream(builder: str, file: Path, **options: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(builder, data_files={"train": [str(file)]}, split="train", streaming=True, **options)


def _batches(stream: Any) -> Iterator[tuple[int, list[Any]]]:
    first = 0
    for batch in stream.iter(batch_size=BATCH):
        columns = list(batch)
        size = len(batch[columns[0]])
        if columns == ["text"]:
            rows: list[Any] = batch["text"]
        else:
            rows = [{name: batch[name][index] for name in columns} for index in range(size)]
        yield first, rows
        first += size


def _header(file: Path, separator: str) -> list[str]:
    import fsspec

    with fsspec.open(file, "rt", compression="infer", encoding="utf-8", newline="") as handle:
        return next(csv.reader(handle, delimiter=separator))


def _all_text(columns: list[str]) -> Any:
    from datasets import Features, Value

    return Features({name: Value("string") for name in columns})


def _hub(entry: Entry, root: Path) -> Iterator[tuple[str, list[int], list[Any]]]:
    from datasets import load_dataset

    folder = root / entry.dataset
    local = folder.is_dir()
    if not local and not _COMMIT.fullmatch(entry.revision):
        raise UserError(f"{entry.dataset}: revision {entry.revision!r} must be a commit, 40 hex digits (a branch "
                        "moves, and the run could not be reproduced)")
    place = name_of(entry)
    with _one_line(place):
        stream = load_dataset(str(folder) if local else entry.dataset, entry.config or None,
                              data_dir=entry.data_dir or None, revision=None if local else entry.revision,
                              split=None, streaming=True)
        for name in entry.split.split("+"):
            if name not in stream:
                raise UserError(f"{place}: no split {name!r}; it has {', '.join(stream)}")
            for first, rows in _batches(stream[name]):
                yield f"{place}:{name}", list(range(first + 1, first + 1 + len(rows))), rows


class _one_line:
    """Turns what a broken file, a missing dataset or the network raises into one line that names the place."""

    def __init__(self, place: Path | str) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, (UserError, GeneratorExit, KeyboardInterrupt, SystemExit)):
            return
        if isinstance(error, MemoryError):
            return
        chain = error
        while chain.__cause__ is not None:
            chain = chain.__cause__
        said = " ".join(str(chain).split())[:300] or type(chain).__name__
        raise UserError(f"{self.place}: cannot be read: {type(chain).__name__}: {said}") from error


def parse_line(line: str) -> Row:
    """One JSON line as a row; a line that is only text is {"text": it}. Raises ValueError, which says what is wrong."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not readable as JSON: nested too deep") from None
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row
