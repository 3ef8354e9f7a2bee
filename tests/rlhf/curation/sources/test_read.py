"""Every file format, compressed or not, gives the same rows; a broken file is an error of one line."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import zstandard

from rlhf.curation.sources.read import parse_line, read_entry
from rlhf.curation.sources.spec import Entry
from rlhf.curation.sources.trees import build_trees
from rlhf.errors import UserError

ROWS = [{"q": f"ask {number}, \"so\"\nand on", "a": "007" if number % 2 else "NA"} for number in range(2500)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
        return
    if kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        plain = path.with_name("plain")
        with plain.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)


def read(entry: Entry, root: Path) -> list[Any]:
    return [(number, parse_line(row) if isinstance(row, str) else row)
            for _, numbers, rows in read_entry(entry, root) for number, row in zip(numbers, rows, strict=True)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.csv", "rows.csv.gz",
                                  "rows.csv.zst", "rows.tsv", "rows.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    assert read(Entry(files="rows.*"), tmp_path) == list(enumerate(ROWS, start=1))


def test_nested_rows_of_different_structure_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1}, {"a": [{"b": []}]}, {"a": [{"b": [{"c": None}]}]}, {"a": "x", "more": {}}]
    write(tmp_path / "rows.jsonl", rows)
    assert [row for _, row in read(Entry(files="rows.jsonl"), tmp_path)] == rows


def test_a_pattern_reads_its_files_by_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [{"q": name}])
    assert read(Entry(files="*.jsonl"), tmp_path) == [(1, {"q": "a"}), (1, {"q": "b"})]


def test_a_folder_with_the_layout_of_a_hub_dataset_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    pd.DataFrame([{"q": "train row"}]).to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    pd.DataFrame([{"q": "test row"}]).to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    assert read(Entry(dataset="set", split="train+test"), tmp_path) == [(1, {"q": "train row"}), (1, {"q": "test row"})]
    assert caplog.messages == []
    assert read(Entry(dataset="set"), tmp_path) == [(1, {"q": "train row"})]
    assert caplog.messages == ["set: split train is read, test not; name others with split"]
    with pytest.raises(UserError, match=r"no split 'valid'; it has (train, test|test, train)"):
        read(Entry(dataset="set", split="valid"), tmp_path)


def test_a_folder_that_datasets_takes_for_a_pattern_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "train.jsonl").write_text('{"prompt": "what is it?", "completion": "a fish."}\n')
    with pytest.raises(UserError, match=r"set\[1\]: the datasets library takes \[ in a folder's path for a pattern"):
        read(Entry(dataset="set[1]"), tmp_path)


def test_a_hub_dataset_needs_a_commit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="revision 'main' must be a commit"):
        read(Entry(dataset="somebody/something", revision="main"), tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("rows.jsonl.gz", gzip.compress(b'{"q": 1}\n' * 50_000, mtime=0)[:-40], "cannot be read: EOFError"),
    ("rows.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"q": 1}\n' * 50_000)[:-8] + b"12345678",
     "cannot be read"),
    ("rows.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"q": 1}\n' * 50_000)[:-8], "cannot be read"),
    ("rows.jsonl.bz2", bz2.compress(b'{"q": 1}\n' * 50_000)[:-40], "cannot be read: EOFError"),
    ("rows.jsonl.xz", lzma.compress(b'{"q": 1}\n' * 50_000)[:-40], "cannot be read: EOFError"),
    ("rows.zip", b"PK\x03\x04 half of it", "cannot be read: BadZipFile"),
    ("rows.jsonl", gzip.compress(b'{"q": 1}', mtime=0), "is gzip; its name must end in .gz"),
    ("rows.jsonl", b'{"q": "' + b"x" * 10_000_000 + b'"}\n', "line 1: longer than 8,000,000 characters"),
    ("rows.csv", b'q,a\n1,"' + b"x\n" * 5_000_000, "line .*: field larger than field limit"),
    ("rows.json", b'[{"q": "' + b"x" * 10_000_000 + b'"}]', "longer than 8,000,000 characters"),
    ("rows.csv", b'q,a\n1,"2', "unexpected end of data; where quotation marks are plain characters write quotes"),
    ("rows.csv", b'"q";"a"\n1;2\n', 'write delimiter: ";"'),
    ("rows.csv", b'q,q\n1,2\n', "the header has column q 2 times"),
    ("rows.jsonl", b'[{"q": 1}]', "is a JSON array, not JSON Lines; write format: json"),
    ("rows.json", b'[{"q": 1}, {"q": ]', "not JSON: Expecting value"),
    ("rows.json", b'[{"q": 1}', "not JSON: expected , or ], found the end of the file"),
    ("rows.json", b'[{"q": 1}]\n[{"q": 2}]', "more follows the end of the array"),
    ("rows.json", b'{"a": [{"q": 1}], "b": [{"q": 1}]}', "lists of rows in a, b; name one: rows: a"),
    ("rows.json", b'{"q": {"0": "x"}, "a": {"0": "y"}}', "write orient: index .* or orient: columns"),
    ("rows.jsonl", "q".encode("utf-16-le") * 50, "UTF-16 without a byte order mark: write encoding: utf-16-le"),
    ("rows.parquet", b"PAR1 nothing", "cannot be read"),
    ("rows.parquet.gz", b"x", "unpack this file first"),
    ("rows.xlsx", b"x", "unknown kind of file"),
    ("rows.csv", b'q,a\n"\xff\xfe",2\n', "line 2, byte 2: not UTF-8"),
])
def test_a_broken_file_is_an_error_of_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(Entry(files=name), tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error_and_an_empty_one_has_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read(Entry(files="none.jsonl"), tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert read(Entry(files="empty.jsonl"), tmp_path) == []


def test_a_line_that_is_only_a_string_is_a_text_row() -> None:
    assert parse_line('"How are you?"') == {"text": "How are you?"}


def test_trees_are_built_from_messages_in_any_order(tmp_path: Path) -> None:
    def message(name: str, parent: str | None, role: str, rank: int | None = None) -> dict[str, Any]:
        return {"message_id": name, "parent_id": parent, "message_tree_id": name[0], "text": name, "role": role,
                "rank": rank, "deleted": False, "lang": "en", "user_id": "u", "detoxify": {"toxicity": 0.1}}

    table = [message("a0", None, "prompter"), message("a1", "a0", "assistant", 1), message("b0", None, "prompter"),
             message("a2", "a0", "assistant", 0), message("a3", "a2", "prompter"), message("b1", "b0", "assistant", 0),
             message("c9", "gone", "assistant", 0)]
    for order in (range(7), reversed(range(7))):
        places = list(order)
        batches = [("set:train", [place + 1], [table[place]]) for place in places]
        (name, numbers, trees), = build_trees(batches, tmp_path)
        assert (name, numbers) == ("set:train", [1, 3, 7])
        assert trees[2].reason == "answers a message that is not there"  # and is counted as quarantined
        first, second = (item["prompt"] for item in trees[:2])
        assert [reply["text"] for reply in first["replies"]] == ["a1", "a2"]
        assert [reply["text"] for reply in first["replies"][1]["replies"]] == ["a3"]
        assert [reply["rank"] for reply in second["replies"]] == [0]
    assert not list(tmp_path.glob("*.sqlite*"))


def test_an_archive_that_is_made_to_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.curation.sources.text_files.FREE_BYTES", 10_000_000)
    row = b'{"q": "' + b"a" * 1_000_000 + b'"}\n'
    for name, packed in {"rows.jsonl.gz": gzip.compress(row * 100, mtime=0), "rows.jsonl.bz2": bz2.compress(row * 100),
                         "rows.jsonl.xz": lzma.compress(row * 100)}.items():
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(UserError, match=rf"{name}: becomes more than 200 times as large when it is unpacked"):
            read(Entry(files=name), tmp_path)
    (tmp_path / "few.jsonl.gz").write_bytes(gzip.compress(row * 5, mtime=0))
    assert len(read(Entry(files="few.jsonl.gz"), tmp_path)) == 5
