"""Streams the rows of an entry: from files, from folders of datasets, or with `datasets` from the hub.

JSON Lines are read as text lines and parsed here: `datasets` infers one type for the whole file, which nested rows
(reply trees) do not have. No dataset is downloaded whole.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from rlhf.curation.sources.formats import BATCH, file_rows
from rlhf.curation.sources.spec import Entry
from rlhf.errors import UserError
from rlhf.files import unique_keys

log = logging.getLogger(__name__)

_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BATCH_CHARS = 32_000_000  # of JSON lines, so that long ones do not fill the memory

Row = dict[str, Any]
Batch = tuple[str, list[int], list[Any]]


def name_of(entry: Entry) -> str:
    """The name of the entry in messages."""
    if entry.files:
        return entry.files
    return f"{entry.dataset}/{entry.data_dir}" if entry.data_dir else entry.dataset


def read_entry(entry: Entry, root: Path) -> Iterator[Batch]:
    """Batches of (place, row numbers from 1, rows); a row is a dict, the text of one JSON line, or Unreadable.

    `root`: the folder that file patterns are relative to. Raises UserError for missing, unreadable or truncated files.
    """
    if entry.dataset:
        yield from _hub(entry, root)
        return
    for file in files_of(entry, root):
        with _user_errors(file):
            yield from _batches(str(file), file_rows(entry, file))


def files_of(entry: Entry, root: Path) -> list[Path]:
    """The files of an entry in the order of their names. Raises UserError if there is none."""
    exact = root / entry.files
    if exact.is_file():
        return [exact]
    if exact.is_dir():
        raise UserError(f"{exact}: is a folder; name its files, such as {entry.files.rstrip('/')}/*.parquet, or write "
                        f"dataset: {entry.files}")
    names = glob(entry.files, root_dir=root, recursive=True)
    files = sorted(path for path in (root / name for name in names) if path.is_file())
    if not files:
        raise UserError(f"{exact}: no such file; a pattern is relative to the source's description")
    return files


def _batches(place: str, rows: Iterable[Any]) -> Iterator[Batch]:
    numbers: list[int] = []
    batch: list[Any] = []
    size = 0
    for number, row in enumerate(rows, start=1):
        numbers.append(number)
        batch.append(row)
        size += len(row) if isinstance(row, str) else 0
        if len(batch) == BATCH or size > _BATCH_CHARS:
            yield place, numbers, batch
            numbers, batch, size = [], [], 0
    if batch:
        yield place, numbers, batch


def _hub(entry: Entry, root: Path) -> Iterator[Batch]:
    folder = root / entry.dataset
    local = folder.is_dir()
    if not local and not _COMMIT.fullmatch(entry.revision):
        raise UserError(f"{entry.dataset}: no such folder; and of a dataset of the hub the revision "
                        f"{entry.revision!r} must be a commit, 40 hex digits (a branch moves, and the run could not "
                        "be reproduced)")
    place = name_of(entry)
    with _user_errors(place):
        splits = _saved(folder / entry.data_dir, entry) if local else None
        if splits is None:
            if local and (found := sorted(set("*?[") & set(str(folder.resolve())))):
                raise UserError(f"{folder.resolve()}: the datasets library takes {found[0]} in a folder's path for a "
                                "pattern: rename it, or name its files with `files` instead of `dataset`")
            from datasets import load_dataset

            splits = load_dataset(str(folder) if local else entry.dataset, entry.config or None,
                                  data_dir=entry.data_dir or None, revision=None if local else entry.revision,
                                  split=None, streaming=True)
        wanted = entry.split.split("+")
        for name in wanted:
            if name not in splits:
                raise UserError(f"{place}: no split {name!r}; it has {', '.join(splits)}")
        if others := [name for name in splits if name not in wanted]:
            log.warning("%s: split %s is read, %s not; name others with split", place, entry.split, ", ".join(others))
        for name in wanted:
            yield from _batches(f"{place}:{name}", _table_rows(splits[name]))


def _saved(folder: Path, entry: Entry) -> Mapping[str, Any] | None:
    """The splits of a folder that `save_to_disk` wrote; None for another folder."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(folder))
    return {entry.split: saved} if isinstance(saved, Dataset) else saved


def _table_rows(stream: Any) -> Iterator[Any]:
    """The rows of a dataset as they are stored: images and sounds are not decoded."""
    for table in stream.with_format("arrow").iter(batch_size=BATCH):
        yield from table.to_pylist()


@contextmanager
def _user_errors(place: Path | str) -> Iterator[None]:
    """Turns any error of a broken file, a missing dataset or the network into a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not type(error).__module__.startswith("pyarrow"):
            raise  # pyarrow's is of a damaged file that asks for a size of its own making
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        message = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError(f"{place}: cannot be read: {type(cause).__name__}: {message}") from error


def parse_line(line: str) -> Row:
    """One JSON line as a row; a line that is only a string is {"text": string}. Raises ValueError with the reason."""
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not readable as JSON: nested too deep") from None
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row
