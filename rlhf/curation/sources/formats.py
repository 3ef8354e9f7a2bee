"""The rows of one file by its format, which its name or the description says, never its content.

Rows are read one after another; only JSON in pandas' orients index, columns and split is held as a whole.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.curation.sources.json_files import is_json_lines, json_rows
from rlhf.curation.sources.paths import separator_advice
from rlhf.curation.sources.spec import Entry
from rlhf.curation.sources.text_files import COMPRESSED, MAX_LINE, plain_name, text_lines
from rlhf.errors import UserError

BATCH = 1000
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
           ".feather": "arrow", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
ADVICE = {".xlsx": "save it as CSV UTF-8", ".xls": "save it as CSV UTF-8", ".pkl": "save it as Parquet",
          ".pickle": "save it as Parquet", ".tar": "unpack it first", ".tgz": "unpack it first"}
_EXCEL_HINT = re.compile(r'"?sep=(.)"?')
_FIT = {**dict.fromkeys(("delimiter", "quotes", "escape"), ("csv", "tsv")), "rows": ("json",), "orient": ("json",),
        "encoding": ("jsonl", "json", "csv", "tsv", "text")}


@dataclass(frozen=True)
class Unreadable:
    """A row that has been read and is none: why, and what it holds."""

    reason: str
    content: Any


def format_of(entry: Entry, file: Path) -> str:
    """The format of a file. Raises UserError if its name says none, or if the description says what it cannot have."""
    kind: str = entry.format
    if kind == "auto":
        suffix = Path(plain_name(file).lower()).suffix
        if suffix not in FORMATS:
            advice = ADVICE.get(suffix, "give format: jsonl, json, parquet, arrow, csv, tsv or text")
            raise UserError(f"{file}: unknown kind of file; {advice}")
        kind = FORMATS[suffix]
    for key, kinds in _FIT.items():
        if getattr(entry, key) != Entry.__dataclass_fields__[key].default and kind not in kinds:
            raise UserError(f"{file}: is read as {kind}, which has no {key}; remove {key} from the description")
    if kind in ("parquet", "arrow") and file.suffix.lower() in COMPRESSED:
        raise UserError(f"{file}: {kind} is compressed inside; unpack this file first (its parts are read at random)")
    return kind


def file_rows(entry: Entry, file: Path) -> Iterator[Any]:
    """The rows in order: a dict, the text of a JSON line, or Unreadable. Raises UserError or the format's error."""
    kind = format_of(entry, file)
    if file.stat().st_size == 0:
        return
    if kind == "json" and not entry.rows and not entry.orient and is_json_lines(file, entry.encoding):
        kind = "jsonl"
    if kind == "jsonl":
        yield from _json_lines(file, entry)
    elif kind == "json":
        yield from map(_json_row, json_rows(file, entry.encoding, entry.rows, entry.orient))
    elif kind == "text":
        yield from ({"text": line.rstrip("\r\n")} for line in text_lines(file, entry.encoding) if line.strip())
    elif kind == "parquet":
        yield from _parquet(file)
    elif kind == "arrow":
        yield from _arrow(file)
    else:
        yield from _csv(file, entry, entry.delimiter or ("," if kind == "csv" else "\t"))


def _json_row(item: Any) -> Any:
    if isinstance(item, str):
        return {"text": item}
    return item if isinstance(item, dict) else Unreadable("not an object", item)


def _json_lines(file: Path, entry: Entry) -> Iterator[str]:
    for number, line in enumerate(text_lines(file, entry.encoding)):
        if number == 0 and line.lstrip().startswith("["):
            raise UserError(f"{file}: is a JSON array, not JSON Lines; write format: json")
        yield line.rstrip("\r\n")


def _parquet(file: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH):
            yield from batch.to_pylist()


def _arrow(file: Path) -> Iterator[Any]:
    """Arrow's file format (Feather too) or its stream format; each batch is checked, for Arrow trusts its numbers."""
    from pyarrow import ArrowInvalid, ipc, memory_map

    with memory_map(str(file)) as source:
        try:
            table = ipc.open_file(source)
        except ArrowInvalid:
            source.seek(0)
            table = ipc.open_stream(source)
            batches = iter(table)
        else:
            batches = map(table.get_batch, range(table.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
            yield from batch.to_pylist()


def _csv(file: Path, entry: Entry, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(MAX_LINE)
    lines = text_lines(file, entry.encoding)
    first = next(lines, None)
    if first is None:
        return
    hint = _EXCEL_HINT.fullmatch(first.strip())
    if hint:
        delimiter = entry.delimiter or hint[1]
        first = next(lines, "")
    reader = csv.reader(_unescaped(_with_first(first, lines), entry.escape), delimiter=delimiter, strict=entry.quotes,
                        quoting=csv.QUOTE_MINIMAL if entry.quotes else csv.QUOTE_NONE)
    try:
        names = [name.strip() for name in next(reader)]
        _check_header(file, entry, names)
        empty = 0  # rows of empty cells; a spreadsheet's last rows are often such
        for cells in reader:
            if not any(cells):
                empty += bool(cells)
                continue
            yield from (dict.fromkeys(names, "") for _ in range(empty))
            empty = 0
            if delimiter == "\t" and entry.quotes and any("\t" in cell and "\n" in cell for cell in cells):
                raise UserError(f"{file}: line {reader.line_num + bool(hint)}: a value with tabs and line breaks, from "
                                "one quotation mark to the next; where these are plain characters write quotes: false")
            if len(cells) == len(names):
                yield dict(zip(names, cells, strict=True))
            else:
                yield Unreadable(f"another number of fields than the header: {len(cells)}, not {len(names)}", cells)
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(f"{file}: its lines end with carriage returns, as an old Mac's; save it with line feeds"
                            ) from None
        alone = not entry.delimiter and delimiter not in first
        advice = separator_advice([first.strip()]) if alone else ""
        if not advice and entry.quotes:
            advice = "; where quotation marks are plain characters write quotes: false" if entry.escape else \
                "; where quotation marks are plain characters write quotes: false, where \\\" stands for one in a " \
                "value (as Spark writes it) escape: \"\\\\\""
        raise UserError(f"{file}: line {reader.line_num + bool(hint)}: {error}{advice}") from None


def _unescaped(lines: Iterator[str], escape: str) -> Iterator[str]:
    """The lines with quotation marks doubled where `escape` stands before them; elsewhere it is a plain character.

    Of several before a mark two stand for one, as Spark writes a value that ends with one.
    """
    if not escape:
        yield from lines
        return
    run = re.compile(f'({re.escape(escape)}+)"')
    for line in lines:
        yield run.sub(lambda match: escape * (len(match[1]) // 2) + '"' * (1 + len(match[1]) % 2), line)


def _with_first(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


def _check_header(file: Path, entry: Entry, names: list[str]) -> None:
    """Raises UserError for a name that stands twice in the header and is used."""
    used = entry.paths() or names
    for name, count in Counter(names).items():
        if count > 1 and name and name in used:
            raise UserError(f"{file}: the header has column {name} {count} times; give each a name of its own")
