"""Streams the rows of an entry with `datasets`: from the hub or from files, compressed or not.

JSON Lines are read as text lines and parsed here: `datasets` infers one type for the whole file, which nested rows
(reply trees) do not have. No dataset is downloaded whole and no file is held in memory.
"""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    """The name of the entry in messages."""
    if entry.files:
        return entry.files
    return f"{entry.dataset}/{entry.data_dir}" if entry.data_dir else entry.dataset


def read_entry(entry: Entry, root: Path) -> Iterator[tuple[str, list[int], list[Any]]]:
    """Batches of (place, row numbers from 1, rows); a row is a dict, or the text of one JSON line.

    `root`: the folder that file patterns are relative to. Raises UserError for missing, unreadable or truncated files.
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
    with _user_errors(file):
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
    with _user_errors(place):
        stream = load_dataset(str(folder) if local else entry.dataset, entry.config or None,
                              data_dir=entry.data_dir or None, revision=None if local else entry.revision,
                              split=None, streaming=True)
        for name in entry.split.split("+"):
            if name not in stream:
                raise UserError(f"{place}: no split {name!r}; it has {', '.join(stream)}")
            for first, rows in _batches(stream[name]):
                yield f"{place}:{name}", list(range(first + 1, first + 1 + len(rows))), rows


@contextmanager
def _user_errors(place: Path | str) -> Iterator[None]:
    """Turns any error of a broken file, a missing dataset or the network into a UserError that names the place."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        message = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError(f"{place}: cannot be read: {type(cause).__name__}: {message}") from error


def parse_line(line: str) -> Row:
    """One JSON line as a row; a line that is only a string is {"text": string}. Raises ValueError with the reason."""
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
