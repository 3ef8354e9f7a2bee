"""Files as people have them: every format and what tools write, encodings, archives, the marks of a CSV file."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.curation.sources.formats import Unreadable
from rlhf.curation.sources.json_files import json_rows
from rlhf.curation.sources.read import parse_line, read_entry
from rlhf.curation.sources.spec import Entry
from rlhf.errors import UserError

TEXTS = ["Describe a café; “quoted”, please.", "naïve? yes, and\na second line", "20 % of 50 €", '"so" he said',
         '{"is": "JSON"}', "[1, 2]", "007", "NA", "  indented"]
ROWS = [{"ask": text, "reply": text.upper(), "n": number} for number, text in enumerate(TEXTS)]
ASKED = [row["ask"] for row in ROWS]


def read(folder: Path, files: str, **entry: Any) -> list[Any]:
    return [parse_line(row) if isinstance(row, str) else row
            for _, _, rows in read_entry(Entry(files=files, **entry), folder) for row in rows]


def asked(folder: Path, files: str, **entry: Any) -> list[Any]:
    return [row["ask"] for row in read(folder, files, **entry)]


def jsonl(encoding: str = "utf-8") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(encoding)


@pytest.mark.parametrize(("name", "save", "entry"), [
    ("a.csv", lambda frame, path: frame.to_csv(path), {}),
    ("a.csv", lambda frame, path: frame.to_csv(path, index=False, sep=";"), {"delimiter": ";"}),
    ("a.csv", lambda frame, path: frame.to_csv(path, index=False, sep="|", quoting=csv.QUOTE_ALL), {"delimiter": "|"}),
    ("a.csv", lambda frame, path: frame.to_csv(path, encoding="utf-8-sig"), {}),
    ("a.csv", lambda frame, path: frame.to_csv(path, encoding="utf-16"), {}),
    ("a.csv", lambda frame, path: frame.to_csv(path, encoding="cp1252", lineterminator="\r\n"), {"encoding": "cp1252"}),
    ("a.csv.gz", lambda frame, path: frame.to_csv(path), {}),
    ("a.csv.zip", lambda frame, path: frame.to_csv(path), {}),
    ("a.csv.xz", lambda frame, path: frame.to_csv(path), {}),
    ("a.csv.bz2", lambda frame, path: frame.to_csv(path), {}),
    ("a.csv.zst", lambda frame, path: frame.to_csv(path), {}),
    ("a.tsv", lambda frame, path: frame.to_csv(path, sep="\t"), {}),
    ("a.dat", lambda frame, path: frame.to_csv(path), {"format": "csv"}),
    ("a.json", lambda frame, path: frame.to_json(path, orient="records"), {}),
    ("a.json", lambda frame, path: frame.to_json(path, orient="records", indent=2, force_ascii=False), {}),
    ("a.json", lambda frame, path: frame.to_json(path, orient="table"), {}),
    ("a.json", lambda frame, path: frame.to_json(path, orient="index"), {"orient": "index"}),
    ("a.json", lambda frame, path: frame.to_json(path), {"orient": "columns"}),
    ("a.json", lambda frame, path: frame.to_json(path, orient="split"), {"orient": "split"}),
    ("a.json", lambda frame, path: frame.to_json(path, orient="records", lines=True), {}),
    ("a.jsonl.gz", lambda frame, path: frame.to_json(path, orient="records", lines=True), {}),
    ("a.parquet", lambda frame, path: frame.to_parquet(path), {}),
    ("a.feather", lambda frame, path: frame.to_feather(path), {}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_pandas_writes_is_read(tmp_path: Path, name: str, save: Any, entry: dict[str, Any]) -> None:
    save(pd.DataFrame(ROWS), tmp_path / name)
    assert [text.replace("\r\n", "\n") for text in asked(tmp_path, name, **entry)] == ASKED


def test_a_dictionary_of_lists_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"ask": ASKED, "reply": ASKED}))
    assert asked(tmp_path, "a.json", orient="columns") == ASKED
    with pytest.raises(UserError, match=r"orient: split .* or orient: columns"):
        asked(tmp_path, "a.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    text = {"jsonl": jsonl().decode(), "json": json.dumps(ROWS, ensure_ascii=False),
            "csv": pd.DataFrame(ROWS).to_csv(index=False)}[kind]
    (tmp_path / f"a.{kind}").write_bytes(text.encode(encoding))
    assert asked(tmp_path, f"a.{kind}") == ASKED
    with pytest.raises(UserError, match=r"begins with the byte order mark of utf-.*, encoding is cp1252"):
        asked(tmp_path, f"a.{kind}", encoding="cp1252")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp932"])
def test_an_encoding_that_would_garble_utf_8_is_refused(tmp_path: Path, encoding: str) -> None:
    """One of several files of a pattern is in UTF-8, and the description names the encoding of the others."""
    (tmp_path / "a.csv").write_text("text\nWas heißt Käse?\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"is UTF-8, encoding is {encoding}"):
        read(tmp_path, "a.csv", encoding=encoding)
    (tmp_path / "a.csv").write_text("text\nplain\n", encoding="ascii")
    assert read(tmp_path, "a.csv", encoding=encoding) == [{"text": "plain"}]


@pytest.mark.parametrize(("encoding", "text"), [
    ("cp1252", "Describe a café at closing time; “ready for bed”"), ("cp1251", "Расскажи мне о городе и его истории"),
    ("cp932", "日本の首都について教えてください。東京です。"), ("cp1250", "Zażółć gęślą jaźń i proszę o opis kawiarni"),
    ("gb18030", "请描述一下打烊时的咖啡馆。椅子在桌子上。")])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_another_encoding_is_refused_with_what_to_write_and_read_when_it_is_named(tmp_path: Path, kind: str,
                                                                                   encoding: str, text: str) -> None:
    written = {"jsonl": json.dumps({"text": text}, ensure_ascii=False), "csv": f"text\n{text}\n", "txt": text,
               "json": json.dumps([{"text": text}], ensure_ascii=False)}[kind]
    (tmp_path / f"a.{kind}").write_bytes(written.encode(encoding))
    with pytest.raises(UserError, match=rf"not UTF-8; .* probably encoding: {encoding}") as caught:
        read(tmp_path, f"a.{kind}")
    assert "\n" not in str(caught.value)
    assert read(tmp_path, f"a.{kind}", encoding=encoding) == [{"text": text}]


def test_one_broken_row_in_a_file_that_is_utf8_is_only_that(tmp_path: Path) -> None:
    lines = jsonl().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(lines[0] + b'{"ask": "caf\xe9"}\n' + b"".join(lines[1:]))
    found = asked(tmp_path, "a.jsonl")
    assert found[0:3] == [ASKED[0], "caf\ufffd", ASKED[1]]  # screening quarantines what holds U+FFFD


def test_a_format_comes_from_the_name_and_never_from_the_columns(tmp_path: Path) -> None:
    texts = ['{"prompt": "x"}', '"quoted"', "plain"]
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps(texts))
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n\n")
    for name in ("a.parquet", "a.csv", "a.json", "a.txt"):
        assert read(tmp_path, name) == [{"text": text} for text in texts], name


def test_a_zip_archive_of_one_file_is_read_and_one_of_many_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data/", "")
        archive.writestr("data/rows.jsonl", jsonl())
        archive.writestr("__MACOSX/data/._rows.jsonl", b"\0\0")
    assert asked(tmp_path, "a.zip") == ASKED
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("more.jsonl", jsonl())
    with pytest.raises(UserError, match=r"holds 2 files \(data/rows.jsonl, more.jsonl\); a zip archive must hold one"):
        asked(tmp_path, "a.zip")


@pytest.mark.parametrize(("suffix", "pack"), [
    (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
    (".zst", zstandard.ZstdCompressor().compress)])
def test_archives_of_several_members_are_read_whole(tmp_path: Path, suffix: str, pack: Any) -> None:
    half = len(ROWS) // 2
    lines = jsonl().splitlines(keepends=True)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b"".join(lines[:half])) + pack(b"".join(lines[half:])))
    assert asked(tmp_path, f"a.jsonl{suffix}") == ASKED


def test_a_truncated_archive_is_an_error_wherever_it_ends(tmp_path: Path) -> None:
    content = jsonl() * 2000
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", content)
    packed = {"a.jsonl.gz": gzip.compress(content), "a.jsonl.bz2": bz2.compress(content), "a.zip": buffer.getvalue(),
              "a.jsonl.xz": lzma.compress(content), "a.jsonl.zst": zstandard.ZstdCompressor().compress(content)}
    for name, whole in packed.items():
        for share in (0.3, 0.9, 0.999):
            (tmp_path / name).write_bytes(whole[:int(len(whole) * share)])
            with pytest.raises(UserError, match="cannot be read"):
                read(tmp_path, name)


def test_excel_s_files_are_read(tmp_path: Path) -> None:
    """A byte order mark, semicolons, Windows line ends, a last row of empty cells, the line sep=; and blanks."""
    (tmp_path / "a.csv").write_bytes("\ufeffsep=;\r\n ask ; score \r\n\"one\r\ntwo\";3,5\r\n;\r\n".encode())
    row, = read(tmp_path, "a.csv")
    assert row["ask"].replace("\r\n", "\n") == "one\ntwo"
    assert row["score"] == "3,5"
    (tmp_path / "b.csv").write_text("ask,score\none,1\n,\ntwo,2\n,\n,\n")
    assert [row["ask"] for row in read(tmp_path, "b.csv")] == ["one", "", "two"]  # row 3 stays row 3


def test_spark_s_quotation_marks_are_read_where_the_description_names_their_escape(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('ask,reply\n"say \\"hi\\", then go","C:\\new\\\\"\nuse \\alpha,$\\frac{a}{b}$\n')
    with pytest.raises(UserError, match=r'a\.csv: line 2: .*escape: "\\\\"'):
        list(read(tmp_path, "a.csv"))
    assert read(tmp_path, "a.csv", escape="\\") == [{"ask": 'say "hi", then go', "reply": "C:\\new\\"},
                                                    {"ask": "use \\alpha", "reply": "$\\frac{a}{b}$"}]
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is read as jsonl, which has no escape"):
        read(tmp_path, "a.jsonl", escape="\\")


def test_a_key_that_stands_twice_in_an_object_is_a_fault(tmp_path: Path) -> None:
    """JSON libraries keep the last one in silence."""
    with pytest.raises(ValueError, match="an object has a key twice: q"):
        parse_line('{"q": "one", "a": {"x": 1}, "q": "two"}')
    with pytest.raises(ValueError, match="an object has a key twice: x"):
        parse_line('{"q": "one", "a": [{"x": 1, "y": 2, "x": 1}]}')
    (tmp_path / "a.json").write_text('[{"q": 1}, {"q": 1, "q": 2}]')
    with pytest.raises(UserError, match=r"a\.json: an object has a key twice: q"):
        list(read(tmp_path, "a.json"))
    (tmp_path / "b.json").write_text('{"a": {"q": 1, "q": 2}}')
    with pytest.raises(UserError, match="key twice: q"):
        list(read(tmp_path, "b.json", orient="index"))


def test_rows_with_more_or_fewer_fields_are_unreadable_and_blank_lines_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ask,reply\n\nx,y\nx\nx,y,z\n\n\n")
    first, short, long = read(tmp_path, "a.csv")
    assert first == {"ask": "x", "reply": "y"}
    assert short == Unreadable("another number of fields than the header: 1, not 2", ["x"])
    assert long == Unreadable("another number of fields than the header: 3, not 2", ["x", "y", "z"])


def test_quotation_marks_can_be_plain_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('ask\treply\n"Yes\tshe said "no"\n')
    assert read(tmp_path, "a.tsv", quotes=False) == [{"ask": '"Yes', "reply": 'she said "no"'}]
    with pytest.raises(UserError, match=r"line 2: .*write quotes: false"):
        read(tmp_path, "a.tsv")


def test_a_header_name_may_stand_twice_where_nothing_uses_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ask,note,note\nx,1,2\n")
    assert asked(tmp_path, "a.csv", columns={"prompt": "ask"}) == ["x"]
    with pytest.raises(UserError, match="the header has column note 2 times"):
        asked(tmp_path, "a.csv", columns={"prompt": "ask", "user_id": "note"})


@pytest.mark.parametrize("options", [{"delimiter": ";"}, {"quotes": False}, {"rows": "data"}, {"orient": "index"}])
def test_an_option_that_a_format_lacks_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    with pytest.raises(UserError, match=f"is read as jsonl, which has no {next(iter(options))}"):
        read(tmp_path, "a.jsonl", **options)


def test_the_list_of_an_object_is_found_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"meta": {"rows": [1]}, "tags": ["x"], "data": ROWS, "end": 1}))
    assert asked(tmp_path, "a.json") == ASKED
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1))
    assert asked(tmp_path, "a.json", rows="test") == ASKED[:1]
    with pytest.raises(UserError, match="no list dev; there are train, test"):
        asked(tmp_path, "a.json", rows="dev")


def test_a_json_file_may_hold_one_row_or_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=2))
    assert asked(tmp_path, "a.json") == ASKED[:1]
    (tmp_path / "a.json").write_bytes(jsonl())
    assert asked(tmp_path, "a.json") == ASKED
    (tmp_path / "a.json").write_text("[]")
    assert asked(tmp_path, "a.json") == []


def test_folders_of_save_to_disk_and_arrow_streams_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(str(tmp_path / "two"))

    def rows(entry: Entry) -> list[Any]:
        return [row["ask"] for _, _, batch in read_entry(entry, tmp_path) for row in batch]

    assert rows(Entry(dataset="one")) == ASKED
    assert rows(Entry(dataset="two", split="dev")) == ASKED[1:2]
    with pytest.raises(UserError, match="no split 'test'; it has train, dev"):
        rows(Entry(dataset="two", split="test"))
    with pytest.raises(UserError, match=r"one: is a folder; .* write dataset: one"):
        rows(Entry(files="one"))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, data.data.table.schema) as out:
        out.write_table(data.data.table)
    assert asked(tmp_path, "a.arrow") == ASKED


def test_a_name_with_brackets_is_a_file_and_folders_do_not_fit_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    (folder / "b.jsonl").mkdir(parents=True)
    (folder / "a[1].jsonl").write_bytes(jsonl())
    assert asked(folder, "a[1].jsonl") == ASKED
    assert asked(folder, "*.jsonl") == ASKED
    assert asked(tmp_path, str(folder / "a[1].jsonl")) == ASKED


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                      | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                                  max_size=3), max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 1]), size=st.integers(1, 9),
       where=st.sampled_from(["", "rows"]))
def test_json_is_read_in_pieces_as_a_whole(tmp_path_factory: pytest.TempPathFactory, rows: list[Any],
                                           indent: int | None, size: int, where: str) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    content: Any = {"a": 1, where: rows, "z": {"y": []}} if where else rows
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    file.write_text(text, "utf-8", errors="surrogatepass")
    pieces = [text[start:start + size] for start in range(0, len(text), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.curation.sources.json_files.text_chunks", lambda *_: iter(pieces))
        assert list(json_rows(file, "", where, "")) == rows


def packed(kind: str) -> bytes:
    buffer = io.BytesIO()
    frame = pd.DataFrame(ROWS)
    if kind == "parquet":
        frame.to_parquet(buffer)
    elif kind == "feather":
        frame.to_feather(buffer)
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.jsonl", jsonl())
    else:
        return {"jsonl": jsonl(), "csv": frame.to_csv().encode(), "json": frame.to_json(orient="table").encode(),
                "jsonl.gz": gzip.compress(jsonl()), "jsonl.zst": zstandard.ZstdCompressor().compress(jsonl())}[kind]
    return buffer.getvalue()


KINDS = ("jsonl", "csv", "json", "parquet", "feather", "zip", "jsonl.gz", "jsonl.zst")
WHOLE = {kind: packed(kind) for kind in KINDS}


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_damaged_file_is_read_or_an_error_of_one_line(tmp_path_factory: pytest.TempPathFactory, kind: str,
                                                        data: st.DataObject) -> None:
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / f"a.{kind}").write_bytes(content[:end])
    message = ""
    try:
        for _, numbers, rows in read_entry(Entry(files=f"a.{kind}"), folder):
            assert len(numbers) == len(rows)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or f"a.{kind}" in message


def test_quotation_marks_that_swallow_rows_of_a_tab_separated_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('ask\treply\n"Why\tso\nhow\tso\nit is\tthis"\tx\n')
    with pytest.raises(UserError, match=r"a\.tsv: line \d: a value with tabs and line breaks.*quotes: false"):
        read(tmp_path, "a.tsv")
    assert len(read(tmp_path, "a.tsv", quotes=False)) == 3


def test_few_letters_beyond_ascii_do_not_show_an_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("ask,reply\nWelche Größe?,Grün\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"probably encoding: cp1252 \(or cp1250, .*gb18030"):
        read(tmp_path, "a.csv")


def test_an_old_mac_s_line_ends_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"ask,reply\ra,b\rc,d\r")
    with pytest.raises(UserError, match="its lines end with carriage returns"):
        read(tmp_path, "a.csv")
