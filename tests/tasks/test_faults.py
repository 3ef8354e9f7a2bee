"""Fault injection: each defect of a list, put into good data, is reported by its rule alone, with the row.

The good data is the embedded world's at a small scale; it goes through `python -m tasks.validate --data`.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.schema import write_rows
from rlhf.world.datasets import ppo_rows, rm_rows, sft_rows
from rlhf.world.facts import World
from tasks.validate import main

SCALE = 0.004
ROW = 7  # where most defects go: a train row of every dataset
Row = dict[str, Any]
Edit = Callable[[Row], Any]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three clean datasets."""
    folder = tmp_path_factory.mktemp("good")
    world = World(1)
    for name, maker in (("sft", sft_rows), ("rm", rm_rows), ("ppo", ppo_rows)):
        write_rows(folder / f"{name}.jsonl", maker(world, SCALE))
    (folder / "source.json").write_text('{"source": "embedded"}\n')
    return folder


@pytest.fixture
def data(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "data"))


def findings(data: Path, *flags: str) -> tuple[int, list[tuple[str, int | None, str]]]:
    """(exit code, [(dataset, row, rule)]) of the command on a folder."""
    out = data.parent / "out.json"
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(data), "--report", str(out), "--scale", str(SCALE), *flags])
    code = stop.value.code
    assert isinstance(code, int)
    report = json.loads(out.read_text()) if out.exists() else []
    assert all(list(entry) == ["dataset", "row", "rule", "message"] and entry["message"] for entry in report)
    return code, [(entry["dataset"], entry["row"], entry["rule"]) for entry in report]


def lines_of(data: Path, name: str) -> list[bytes]:
    return (data / f"{name}.jsonl").read_bytes().splitlines(keepends=True)


def edit_row(data: Path, name: str, row: int, edit: Edit) -> None:
    """Changes one row as JSON; what cannot be encoded is written as an escape."""
    lines = lines_of(data, name)
    value = json.loads(lines[row - 1])
    edit(value)
    lines[row - 1] = json.dumps(value).encode() + b"\n"
    (data / f"{name}.jsonl").write_bytes(b"".join(lines))


def edit_bytes(data: Path, name: str, row: int, edit: Callable[[bytes], bytes]) -> None:
    lines = lines_of(data, name)
    lines[row - 1] = edit(lines[row - 1])
    (data / f"{name}.jsonl").write_bytes(b"".join(lines))


def row_of(data: Path, name: str, split: str, place: int = 0) -> tuple[int, Row]:
    """The place-th row of a split: (its number, the row)."""
    rows = [(number, json.loads(line)) for number, line in enumerate(lines_of(data, name), start=1)]
    return [item for item in rows if item[1]["split"] == split][place]


def put(**values: Any) -> Edit:
    return lambda row: row.update(values)


def rename(row: Row) -> None:
    row["instruction"] = row.pop("prompt")


def reorder(row: Row) -> None:
    row["prompt_id"] = row.pop("prompt_id")


def ranking(*ranks: Any, texts: str = "abcdefghij") -> Edit:
    return put(ranks=list(ranks), completions=[f"{text} is here." for text in texts[: len(ranks)]])


# name: (dataset, what happens to row 7, rule)
ROW_DEFECTS: dict[str, tuple[str, Edit, str]] = {
    "number as prompt": ("sft", put(prompt=3), "value_types"),
    "null completion": ("sft", put(completion=None), "value_types"),
    "list as prompt": ("ppo", put(prompt=["a", "b"]), "value_types"),
    "text as ranks": ("rm", put(ranks="1, 2, 3, 4"), "value_types"),
    "fraction as rank": ("rm", ranking(1, 2.5, 3, 4), "value_types"),
    "boolean as rank": ("rm", ranking(True, 2, 3, 4), "value_types"),
    "nested completions": ("rm", put(completions=[["a"], ["b"], ["c"], ["d"]], ranks=[1, 2, 3, 4]), "value_types"),
    "missing key": ("sft", lambda row: row.pop("user_id"), "exact_keys"),
    "extra key": ("ppo", put(score=1), "exact_keys"),
    "renamed key": ("rm", rename, "exact_keys"),
    "row of another dataset": ("ppo", put(completion="a."), "exact_keys"),
    "keys in another order": ("sft", reorder, "key_order"),
    "unknown split": ("ppo", put(split="test"), "known_split"),
    "unknown source": ("sft", put(source="crowd"), "known_source"),
    "labeler's prompt for PPO": ("ppo", put(source="labeler"), "known_source"),
    "unknown use case": ("rm", put(use_case="openqa"), "known_use_case"),
    "empty prompt": ("sft", put(prompt=""), "filled_prompt"),
    "blank prompt": ("ppo", put(prompt=" \n\t"), "filled_prompt"),
    "zero-width prompt": ("rm", put(prompt="\u200b"), "filled_prompt"),
    "empty prompt_id": ("sft", put(prompt_id=""), "filled_prompt_id"),
    "empty user_id": ("ppo", put(user_id=""), "filled_user_id"),
    "empty labeler_id": ("rm", put(labeler_id=" "), "filled_labeler_id"),
    "empty completion": ("sft", put(completion=""), "filled_completion"),
    "one empty completion of several": ("rm", put(completions=["a.", "", "c.", "d."], ranks=[1, 4, 2, 3]),
                                        "filled_completions"),
    "K = 3": ("rm", ranking(1, 2, 3), "completion_count"),
    "K = 10": ("rm", ranking(*range(1, 11)), "completion_count"),
    "no completion at all": ("rm", ranking(), "completion_count"),
    "a rank too few": ("rm", lambda row: row["ranks"].pop(), "rank_count"),
    "rank gap": ("rm", ranking(1, 2, 4, 4), "dense_ranks"),
    "rank outside K": ("rm", ranking(1, 2, 3, 9), "dense_ranks"),
    "rank 0": ("rm", ranking(0, 1, 2, 3), "dense_ranks"),
    "negative rank": ("rm", ranking(-1, 1, 2, 3), "dense_ranks"),
    "ties only": ("rm", ranking(1, 1, 1, 1), "some_preference"),
    "equal completions, different ranks": ("rm", ranking(1, 2, 3, 4, texts="abba"), "equal_texts_equal_ranks"),
    "e-mail in a prompt": ("sft", put(prompt="write to jane.doe@qorvexlume-post.net for me"), "personal_data"),
    "phone number in a prompt": ("ppo", put(prompt="call (415) 555-2671 and ask"), "personal_data"),
    "card number in a completion": ("rm", put(completions=["pay 4539 5789 2140 6176.", "b.", "c.", "d."],
                                              ranks=[1, 2, 3, 4]), "personal_data"),
    "account number in a prompt": ("sft", put(prompt="send it to DE89 3704 0044 0532 0130 00"), "personal_data"),
    "IP address in a prompt": ("sft", put(prompt="who has 203.0.113.77 today"), "personal_data"),
    "street address in a prompt": ("ppo", put(prompt="how far is 221 Baker Street from here"), "personal_data"),
    "German prompt": ("sft", put(prompt="schreibe eine geschichte über den hund im wald."), "language"),
    "Chinese prompt": ("ppo", put(prompt="请写一个关于狗的故事"), "language"),
    "special token in a prompt": ("sft", put(prompt="hello<|im_start|>assistant"), "special_tokens"),
    "end of text in a completion": ("rm", put(completions=["a.<|endoftext|>", "b.", "c.", "d."], ranks=[1, 2, 3, 4]),
                                    "special_tokens"),
    "control character": ("sft", put(completion="a bell \u0007."), "characters"),
    "null character in a text": ("ppo", put(prompt="what is \u0000 here"), "characters"),
    "replacement character": ("sft", put(completion="caf\ufffd."), "characters"),
    "lone surrogate": ("ppo", put(prompt="what is \ud83d?"), "surrogates"),
}

BYTE_DEFECTS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "NaN as a rank": ("rm", lambda raw: raw[: raw.index(b'"ranks"')] + b'"ranks": [1, NaN, 2, 3]}\n', "finite_numbers"),
    "Infinity as a prompt": ("sft", lambda raw: raw.replace(b'"prompt": "', b'"prompt": -Infinity, "x": "'),
                             "finite_numbers"),
    "a key twice": ("sft", lambda raw: b'{"split": "train", ' + raw[1:], "unique_keys"),
    "invalid UTF-8": ("sft", lambda raw: raw.replace(b'"prompt": "', b'"prompt": "\xff\xfe'), "utf8"),
    "CR LF": ("ppo", lambda raw: raw[:-1] + b"\r\n", "line_ends"),
    "null byte": ("sft", lambda raw: raw.replace(b'"prompt": "', b'"prompt": "\x00'), "null_bytes"),
    "broken JSON": ("rm", lambda raw: raw[: len(raw) // 2] + b"\n", "json"),
    "deep nesting": ("sft", lambda raw: b"[" * 100_000 + b"\n", "json"),
    "a list for a row": ("ppo", lambda raw: b"[1, 2]\n", "json_object"),
    "blank line": ("ppo", lambda raw: b"\n", "no_blank_line"),
    "a line of 10 MB": ("sft", lambda raw: raw.replace(b'"prompt": "', b'"prompt": "' + b"a" * 10_000_000),
                        "line_length"),
}


def test_there_are_enough_of_them() -> None:
    assert len(ROW_DEFECTS) + len(BYTE_DEFECTS) >= 40


def test_clean_data_raises_nothing(data: Path) -> None:
    assert findings(data) == (0, [])


@pytest.mark.parametrize("defect", ROW_DEFECTS)
def test_a_defect_of_a_row(data: Path, defect: str) -> None:
    name, edit, rule = ROW_DEFECTS[defect]
    edit_row(data, name, ROW, edit)
    keep_only(data, name)
    assert findings(data) == (1, [(name, ROW, rule)])


@pytest.mark.parametrize("defect", BYTE_DEFECTS)
def test_a_defect_of_the_bytes(data: Path, defect: str) -> None:
    name, edit, rule = BYTE_DEFECTS[defect]
    edit_bytes(data, name, ROW, edit)
    keep_only(data, name)
    assert findings(data) == (1, [(name, ROW, rule)])


def keep_only(data: Path, *names: str) -> None:
    """Removes the other datasets: a check of one is faster."""
    for name in ("sft", "rm", "ppo"):
        if name not in names:
            (data / f"{name}.jsonl").unlink()


def test_a_byte_order_mark(data: Path) -> None:
    edit_bytes(data, "rm", 1, lambda raw: b"\xef\xbb\xbf" + raw)
    keep_only(data, "rm")
    assert findings(data) == (1, [("rm", 1, "no_bom")])


@pytest.mark.parametrize(("name", "lost"), [("sft", -1), ("rm", 0)])
def test_a_row_too_few_is_about_the_file(data: Path, name: str, lost: int) -> None:
    lines = lines_of(data, name)
    del lines[lost]
    (data / f"{name}.jsonl").write_bytes(b"".join(lines))
    keep_only(data, name)
    assert findings(data) == (1, [(name, None, "row_counts")])
    assert findings(data, "--counts", "none") == (0, [])


def test_broken_endings_are_faults_but_for_the_embedded_source(data: Path) -> None:
    edit_row(data, "sft", ROW, put(completion="the dog went to the island and"))
    keep_only(data, "sft")
    assert findings(data, "--counts", "none") == (0, [])
    (data / "source.json").unlink()
    code, found = findings(data, "--counts", "none")
    assert code == 1
    assert ("sft", ROW, "truncated") in found


def test_a_row_too_many(data: Path) -> None:
    _, row = row_of(data, "ppo", "train")
    with (data / "ppo.jsonl").open("a") as handle:
        handle.write(json.dumps({**row, "prompt_id": "new", "prompt": "what is new?"}) + "\n")
    keep_only(data, "ppo")
    assert findings(data) == (1, [("ppo", None, "row_counts")])


def test_an_empty_file(data: Path) -> None:
    (data / "ppo.jsonl").write_bytes(b"")
    keep_only(data, "ppo")
    assert findings(data) == (1, [("ppo", None, "row_counts")])
    assert findings(data, "--counts", "none") == (1, [("ppo", None, "some_rows")])


@pytest.mark.parametrize(("key", "rule"), [("prompt_id", "unique_prompt_id"), ("prompt", "unique_prompt")])
def test_a_value_that_another_row_has(data: Path, key: str, rule: str) -> None:
    value = row_of(data, "sft", "train")[1][key]
    edit_row(data, "sft", ROW, put(**{key: value}))
    keep_only(data, "sft")
    assert findings(data) == (1, [("sft", ROW, rule)])


def test_a_user_over_the_cap(data: Path) -> None:
    for number in range(1, len(lines_of(data, "ppo")) + 1):
        edit_row(data, "ppo", number, put(user_id="busy" if number <= 30 else f"user-{number}"))
    keep_only(data, "ppo")
    code, found = findings(data, "--max-prompts-per-user", "28")
    assert (code, found) == (1, [("ppo", 29, "prompts_per_user"), ("ppo", 30, "prompts_per_user")])


def test_a_user_in_two_splits(data: Path) -> None:
    busy = row_of(data, "rm", "train")[1]["user_id"]
    number, _ = row_of(data, "rm", "valid")
    edit_row(data, "rm", number, put(user_id=busy))
    assert findings(data) == (1, [("rm", number, "user_in_one_split")])


def test_a_user_on_two_sides_of_two_datasets(data: Path) -> None:
    busy = row_of(data, "sft", "train")[1]["user_id"]
    number, _ = row_of(data, "ppo", "valid")
    edit_row(data, "ppo", number, put(user_id=busy))
    assert findings(data) == (1, [("ppo", number, "user_leak")])


LONG = "please tell me a long story about the {} that lived in a house by the sea and never came back again"


@pytest.mark.parametrize(("written", "there", "here", "change", "rule"), [
    ("sft", "train", "valid", str, "prompt_leak"),
    ("rm", "train", "valid", str, "prompt_leak"),
    ("ppo", "train", "valid", str, "prompt_leak"),
    ("ppo", "train", "valid", lambda text: text.upper() + "!", "near_duplicate_leak"),
    ("sft", "train", "valid", lambda text: text + " now", "near_duplicate_leak"),
])
def test_a_train_prompt_in_valid(data: Path, written: str, there: str, here: str, change: Callable[[str], str],
                                 rule: str) -> None:
    edit_row(data, written, ROW, put(prompt=LONG.format("dog")))
    number, _ = row_of(data, written, "valid", 3)
    edit_row(data, written, number, put(prompt=change(LONG.format("dog"))))
    assert findings(data) == (1, [(written, number, rule)])


@pytest.mark.parametrize("name", ["sft", "rm"])
@pytest.mark.parametrize(("change", "rule"), [(str, "prompt_leak"), (str.upper, "near_duplicate_leak")])
def test_a_valid_prompt_in_ppo_train(data: Path, name: str, change: Callable[[str], str], rule: str) -> None:
    number, _ = row_of(data, name, "valid")
    edit_row(data, name, number, put(prompt=LONG.format("cat")))
    edit_row(data, "ppo", ROW, put(prompt=change(LONG.format("cat"))))
    assert findings(data) == (1, [("ppo", ROW, rule)])


def test_a_train_prompt_of_one_dataset_in_valid_of_another(data: Path) -> None:
    edit_row(data, "sft", ROW, put(prompt=LONG.format("cow")))
    number, _ = row_of(data, "rm", "valid")
    edit_row(data, "rm", number, put(prompt=LONG.format("cow")))
    assert findings(data) == (1, [("rm", number, "prompt_leak")])


def test_personal_data_of_a_valid_row_is_a_rule_of_its_own(data: Path) -> None:
    number, _ = row_of(data, "ppo", "valid")
    edit_row(data, "ppo", number, put(prompt="write to jane.doe@qorvexlume-post.net for me"))
    assert findings(data) == (1, [("ppo", number, "personal_data_in_valid")])


def test_a_truncated_gzip(data: Path) -> None:
    raw = (data / "sft.jsonl").read_bytes()
    keep_only(data)
    packed = gzip.compress(raw, mtime=0)
    (data / "sft.jsonl.gz").write_bytes(packed)
    assert findings(data) == (0, [])
    (data / "sft.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    code, found = findings(data, "--counts", "none")
    assert code == 1
    assert {rule for *_, rule in found} <= {"whole_file", "json"}
    assert found[-1][2] == "whole_file"


def test_pairs_are_declared(data: Path) -> None:
    edit_row(data, "rm", ROW, ranking(1, 2))
    keep_only(data, "rm")
    assert findings(data) == (1, [("rm", ROW, "completion_count")])
    assert findings(data, "--min-k", "2") == (0, [])


def test_several_defects_are_all_reported(data: Path) -> None:
    edit_row(data, "sft", 3, put(prompt=""))
    edit_row(data, "sft", 4, put(completion="see jane@qorvexlume-post.net"))
    edit_bytes(data, "ppo", 5, lambda raw: b"?\n")
    assert findings(data) == (1, [("sft", 3, "filled_prompt"), ("sft", 4, "personal_data"), ("ppo", 5, "json")])


def test_what_is_unusable_ends_with_2(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "none of sft.jsonl")):
        with pytest.raises(SystemExit) as stop:
            main(["--data", str(folder), "--report", str(tmp_path / "o.json")])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    keep_only(data, "ppo")
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(data), "--report", str(data / "ppo.jsonl" / "o.json"), "--scale", str(SCALE)])
    assert stop.value.code == 2


def test_the_quarantine_holds_the_raw_rows(data: Path, tmp_path: Path) -> None:
    edit_row(data, "ppo", 5, put(prompt=""))
    edit_bytes(data, "ppo", 9, lambda raw: b"\xff\n")
    keep_only(data, "ppo")
    before = lines_of(data, "ppo")[4].decode().rstrip("\n")
    findings(data, "--quarantine", str(tmp_path / "q.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["row"], row["rules"]) for row in rows] == [
        ("ppo", 5, ["filled_prompt"]), ("ppo", 9, ["utf8"])]
    assert rows[0]["line"] == before
    assert rows[1]["line"] == "\\xff"
