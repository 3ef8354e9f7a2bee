"""Each rule reports the defect made for it, with its row and nothing else; failing leaves earlier outputs alone."""

import copy
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlops.config.loader import load_params
from mlops.validation.docs import make_context
from mlops.validation.reader import read_frame, read_line, read_lines
from mlops.validation.run import Finding, Outcome, check, validate_files
from mlops.validation.suites import RULES, WARNINGS, suite_of
from rlhf.data.schema import PAPER_ROWS, USE_CASE_PERCENT, expected_rows, split_by_shares, write_rows
from rlhf.errors import UserError
from rlhf.params import ValidateParams
from tasks.stage import Stage
from tasks.validate import token_counter, validate
from tests.rlhf.model.families import build

REPO = Path(__file__).resolve().parents[2]
SCALE = 0.01
LIMITS = ValidateParams(max_prompts_per_user=20)

Row = dict[str, Any]
Rows = list[Row]


def make_rows(dataset: str, scale: float = SCALE) -> Rows:
    """A clean dataset: the expected counts, unique prompts, ten prompts a user."""
    rows: Rows = []
    for (split, source), count in expected_rows(dataset, scale).items():
        use_cases = [name for name, number in split_by_shares(count, USE_CASE_PERCENT).items() for _ in range(number)]
        for place, use_case in enumerate(use_cases):
            number = len(rows) + 1
            row = {"prompt_id": f"{dataset}-{number}", "user_id": f"{source}-{split}-{place // 10}",
                   "labeler_id": "labeler-1", "source": source, "split": split, "use_case": use_case,
                   "prompt": f"what is {dataset} {number}?"}
            if dataset != "rm":
                del row["labeler_id"]
            extra: dict[str, Row] = {"sft": {"completion": "a number."}, "ppo": {},
                                     "rm": {"completions": ["one", "two", "two", "three"], "ranks": [1, 2, 2, 3]}}
            rows.append(row | copy.deepcopy(extra[dataset]))
    return rows


def run_rules(tmp_path: Path, dataset: str, rows: Rows, scale: float = SCALE) -> list[Finding]:
    file = tmp_path / f"{dataset}.jsonl"
    write_rows(file, rows)
    suite = suite_of(dataset, RULES[dataset](scale, LIMITS), LIMITS)
    return check(make_context(tmp_path), suite, {dataset: file}, read_frame(dataset, file))[1]


@pytest.mark.parametrize("dataset", PAPER_ROWS)
def test_a_clean_dataset_passes(tmp_path: Path, dataset: str) -> None:
    assert run_rules(tmp_path, dataset, make_rows(dataset)) == []


def put(line: int, **values: Any) -> Callable[[Rows], None]:
    """Overwrites values of the row at a line of the file."""
    return lambda rows: rows[line - 1].update(values)


def drop_key(rows: Rows) -> None:
    del rows[6]["prompt"]


def swap_keys(rows: Rows) -> None:
    rows[6] = {"user_id": rows[6].pop("user_id")} | rows[6]


def repeat(key: str) -> Callable[[Rows], None]:
    return lambda rows: rows[8].update({key: rows[2][key]})


def one_user(rows: Rows) -> None:
    for row in rows[:22]:
        row["user_id"] = "busy"


def rank(*ranks: int, completions: list[str] | None = None) -> Callable[[Rows], None]:
    return put(7, ranks=list(ranks), completions=completions or ["one", "two", "three", "four"])


def chat(*said: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]


DEFECTS: dict[str, tuple[str, Callable[[Rows], Any], str, list[int]]] = {
    "missing key": ("sft", drop_key, "exact_keys", [7]),
    "number as prompt": ("sft", put(7, prompt=3), "value_types", [7]),
    "row lost": ("sft", lambda rows: rows.pop(), "row_counts", []),
    "split of a user's only row changed": (
        "sft", lambda rows: rows[0].update(user_id="alone", split="valid"), "row_counts", []),
    "unknown source": ("sft", put(7, source="crowd"), "known_source", [7]),
    "labeler prompt for ppo": ("ppo", put(7, source="labeler"), "known_source", [7]),
    "unknown split": ("ppo", lambda rows: rows[6].update(split="test", user_id="alone"), "known_split", [7]),
    "unknown use case": ("sft", put(7, use_case="openqa"), "known_use_case", [7]),
    "empty prompt": ("sft", put(7, prompt=""), "filled_prompt", [7]),
    "zero-width prompt": ("ppo", put(7, prompt="\u200b"), "filled_prompt", [7]),
    "empty prompt_id": ("ppo", put(7, prompt_id=" "), "filled_prompt_id", [7]),
    "empty user_id": ("ppo", put(7, user_id=""), "filled_user_id", [7]),
    "long prompt": ("ppo", put(7, prompt="é" * 401), "prompt_length", [7]),
    "repeated prompt_id": ("rm", repeat("prompt_id"), "unique_prompt_id", [9]),
    "repeated prompt": ("sft", repeat("prompt"), "unique_prompt", [9]),
    "repeated comparison": ("rm", repeat("prompt"), "unique_comparison", [9]),
    "repeated comparison, presented otherwise": ("rm", lambda rows: rows[8].update(
        rows[2] | {"completions": ["three", "two", "one", "two"], "ranks": [3, 2, 1, 2]}), "unique_comparison", [9]),
    "user in two splits": (
        "ppo", lambda rows: rows[-1].update(user_id=rows[0]["user_id"]), "user_in_one_split",
        [sum(expected_rows("ppo", SCALE).values())]),
    "user over the limit": ("rm", one_user, "prompts_per_user", [21, 22]),
    "empty completion": ("sft", put(7, completion=" \n"), "filled_completion", [7]),
    "long completion": ("sft", put(7, completion="a" * 401), "completion_length", [7]),
    "empty labeler": ("rm", put(7, labeler_id=""), "filled_labeler_id", [7]),
    "three completions": ("rm", rank(1, 2, 3, completions=["a", "b", "c"]), "completion_count", [7]),
    "ten completions": ("rm", rank(*range(1, 11), completions=list("abcdefghij")), "completion_count", [7]),
    "no completions": ("rm", put(7, completions=[], ranks=[]), "completion_count", [7]),
    "rank lost": ("rm", rank(2, 3, 3), "rank_count", [7]),
    "one of the completions blank": (
        "rm", rank(1, 2, 3, 4, completions=["a", "\u200b", "c", "d"]), "filled_completions", [7]),
    "one of the completions long": (
        "rm", rank(1, 2, 3, 4, completions=["a", "b" * 401, "c", "d"]), "completion_length", [7]),
    "rank 0": ("rm", rank(0, 1, 1, 2), "dense_ranks", [7]),
    "gap in the ranks": ("rm", rank(1, 2, 2, 4), "dense_ranks", [7]),
    "all tied": ("rm", rank(1, 1, 1, 1), "some_preference", [7]),
    "equal completions, other ranks": (
        "rm", rank(1, 2, 3, 4, completions=["a", "b", "b", "c"]), "equal_texts_equal_ranks", [7]),
    "completions that differ in case": (
        "rm", rank(1, 2, 3, 4, completions=["a b", "c", "A  b\n", "d"]), "similar_texts_equal_ranks", [7]),
    "best completion is the prompt": (
        "rm", rank(2, 1, 3, 4, completions=["a", "WHAT is rm 7", "c", "d"]), "repeated_prompt", [7]),
    "turn in a completion": (
        "rm", rank(1, 2, 3, 4, completions=["a", "b\n\nHuman: c", "d", "e"]), "turn_marks", [7]),
    "hidden character in a completion": (
        "rm", rank(1, 2, 3, 4, completions=["a", "b", "sp\u200bam", "e"]), "characters", [7]),
    "two prompts of one id": ("rm", put(9, prompt_id="rm-3"), "unique_prompt_id", [9]),
    "prompt said back": ("sft", put(7, completion="what is sft 7? A number."), "repeated_prompt", [7]),
    "instruction template": ("sft", put(7, prompt="### Instruction:\nsay seven"), "turn_marks", [7]),
    "user in two splits in other letters": (
        "ppo", lambda rows: rows[-1].update(user_id=f" {rows[0]['user_id'].upper()}\u200b"), "user_in_one_split",
        [sum(expected_rows("ppo", SCALE).values())]),
    "a conversation as a transcript": (
        "sft", put(7, prompt="Human: what is seven?\n\nAssistant: a number.\n\nHuman: more?"), "transcripts", [7]),
    "a transcript with an open answer": (
        "ppo", put(7, prompt="Human: what is seven?\n\nAssistant:"), "transcripts", [7]),
    "a conversation that ends with an answer": (
        "ppo", put(7, prompt=chat("what is seven?", "a number.")), "value_types", [7]),
    "a message of nobody": ("ppo", put(7, prompt=[{"role": "human", "content": "what?"}]), "value_types", [7]),
    "a blank message": ("sft", put(7, prompt=chat("what is seven?", "\u200b", "more?")), "value_types", [7]),
    "hidden character in a message": (
        "sft", put(7, prompt=chat("what is sev\u200ben?", "one.", "more?")), "characters", [7]),
    "template in a message": (
        "ppo", put(7, prompt=chat("### Instruction:\nsay seven", "a number.", "more?")), "turn_marks", [7]),
    "last turn said back": (
        "sft", put(7, prompt=chat("what is seven?", "a number.", "what is eight?"), completion="What is eight?"),
        "repeated_prompt", [7]),
    "repeated conversation": (
        "ppo", lambda rows: [row.update(prompt=chat("what is seven?", "a number.", "more?")) for row in rows[2:4]],
        "unique_prompt", [4]),
    "one completion for many prompts": (
        "sft", lambda rows: [row.update(completion="I am sorry, I cannot help.") for row in rows[:20]],
        "shared_completion", []),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_right_rule_reports_the_row(tmp_path: Path, defect: str) -> None:
    dataset, spoil, name, lines = DEFECTS[defect]
    rows = make_rows(dataset)
    spoil(rows)
    findings = run_rules(tmp_path, dataset, rows)
    assert [(finding.rule, finding.rows) for finding in findings] == [(name, lines)]
    message = str(findings[0])
    assert message.startswith(f"{tmp_path / dataset}.jsonl: {name}: ")
    assert "\n" not in message
    assert all(f"row {line} (" in message for line in lines)
    assert "()" not in message
    assert findings[0].severity == ("warn" if name in WARNINGS else "stop")


def test_conversations_are_no_fault_also_with_the_marks_of_a_transcript_in_a_message(tmp_path: Path) -> None:
    for dataset in PAPER_ROWS:
        rows = make_rows(dataset)
        rows[0]["prompt"] = [{"role": "system", "content": "Be brief."}, *chat("what is seven?", "a number.", "more?")]
        rows[1]["prompt"] = chat("Human: one\n\nAssistant: two\n\nHuman: three", "what do you mean?", "nothing.")
        rows[2]["prompt"] = chat("what is two?")
        rows[3]["prompt"] = "Human: what is two?"
        assert run_rules(tmp_path, dataset, rows) == []


def test_half_a_surrogate_in_a_message_is_named() -> None:
    row = make_rows("ppo")[0] | {"prompt": chat("what is \ud800?", "a number.", "more?")}
    line = json.dumps(row).encode()
    assert read_line(1, line, list(row), len(line)).rule == "surrogates"


def test_a_line_of_any_length_is_skipped_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops.validation.reader.MAX_LINE_BYTES", 400)
    good = json.dumps(make_rows("ppo")[0]).encode()
    keys = list(make_rows("ppo")[0])
    file = tmp_path / "ppo.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n".join([good, b"a" * 5000, good, b"b" * 401, b"c" * 1201]), mtime=0))
    lines = list(read_lines(file, keys))
    assert [(line.number, line.rule) for line in lines] == [
        (1, ""), (2, "line_length"), (3, ""), (4, "line_length"), (5, "line_length")]
    assert "5,001 bytes" in lines[1].problem
    assert "1,201 bytes" in lines[4].problem


def test_a_conversation_leaks_like_a_text(tmp_path: Path) -> None:
    sft, ppo = make_rows("sft"), make_rows("ppo")
    sft[0]["prompt"] = ppo[-1]["prompt"] = chat("what is seven?", "a number.", "and eight?")
    sft[1]["prompt"], ppo[-2]["prompt"] = "what is nine?", chat("what is nine?")
    findings = any_folder(tmp_path, ValidateParams(counts="none"), sft=sft, ppo=ppo).findings
    assert {(finding.rule, *finding.rows) for finding in findings} == {("prompt_leak", len(ppo) - 1, len(ppo))}


def test_several_rankings_of_a_prompt_are_no_fault(tmp_path: Path) -> None:
    """Other labelers, other completions, and the same user, who is not over the cap on prompts for it."""
    rows = make_rows("rm")
    shared = {key: rows[0][key] for key in ("prompt_id", "user_id", "source", "split", "use_case", "prompt")}
    for number, row in enumerate(rows[:30]):
        row.update(shared, labeler_id=f"labeler-{number}")
    rows[30].update(shared, completions=["one", "two", "four", "three"])
    assert run_rules(tmp_path, "rm", rows) == []


def any_folder(tmp_path: Path, limits: ValidateParams, **datasets: Rows) -> Outcome:
    files = {name: tmp_path / f"{name}.jsonl" for name in datasets}
    for name, rows in datasets.items():
        write_rows(files[name], rows)
    return validate_files(make_context(tmp_path / "docs"), files, 1.0, limits, say=lambda line: None)


def test_an_empty_file_beside_a_whole_one_is_a_fault(tmp_path: Path) -> None:
    outcome = any_folder(tmp_path, ValidateParams(counts="none"), sft=make_rows("sft"), rm=[])
    assert [(finding.file.name, finding.rule, finding.stops) for finding in outcome.findings] == [
        ("rm.jsonl", "some_rows", True)]


def test_broken_endings_are_reported_as_ingest_does(tmp_path: Path) -> None:
    rows = make_rows("sft")
    rows[6]["completion"] = "You need flour, butter and the"
    outcome = any_folder(tmp_path, ValidateParams(counts="none"), sft=rows)
    assert [(finding.rule, finding.rows, finding.stops) for finding in outcome.findings] == [("truncated", [7], False)]


def test_a_conversation_that_the_model_s_template_refuses_is_found_by_its_row(tmp_path: Path) -> None:
    build("gemma", tmp_path / "model")  # its template raises on system turns
    rows = {name: make_rows(name)[:30] for name in PAPER_ROWS}
    for name, place in (("sft", 4), ("rm", 8)):
        rows[name][place]["prompt"] = [{"role": "system", "content": "Be brief."}, *chat(f"what is {name} {place}?")]
    for name, found in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", found)
    counter, _ = token_counter(str(tmp_path / "model"))
    outcome = validate_files(
        make_context(tmp_path / "docs"), {name: tmp_path / f"{name}.jsonl" for name in rows}, 1.0,
        ValidateParams(counts="none"), count_tokens=counter, max_tokens=500, say=lambda line: None)
    assert [(item.file.name, item.rule, item.rows, item.stops) for item in outcome.findings] == [
        ("sft.jsonl", "chat_template", [5], True), ("rm.jsonl", "chat_template", [9], True)]
    assert "refuses a conversation of system, user: no system role" in outcome.findings[0].message


def test_the_language_of_the_data_is_named(tmp_path: Path) -> None:
    rows = make_rows("ppo")[:10]
    for number, row in enumerate(rows):
        row["prompt"] = f"Wie viele Beine hat die Spinne, die in Zimmer {number} an der Wand sitzt?"
    assert not any_folder(tmp_path, ValidateParams(counts="none", language="de"), ppo=rows).findings
    [finding] = any_folder(tmp_path, ValidateParams(counts="none"), ppo=rows).findings
    assert (finding.rule, len(finding.rows)) == ("language", 10)
    with pytest.raises(UserError, match=r"validate\.language: 'deutsch' is no ISO 639-1 code"):
        any_folder(tmp_path, ValidateParams(counts="none", language="deutsch"), ppo=rows)


def test_rules_of_other_datasets_and_of_either_counts_are_known_by_name(tmp_path: Path) -> None:
    """A profile's `warn: [truncated]` stopped the rounds, which check rankings only."""
    limits = ValidateParams(counts="none", warn=["truncated", "row_counts", "some_rows"])
    assert not any_folder(tmp_path, limits, rm=make_rows("rm")[:20]).findings
    with pytest.raises(UserError, match=r"validate\.warn: unknown rule 'truncate'"):
        any_folder(tmp_path, ValidateParams(warn=["truncate"]), rm=make_rows("rm")[:20])


def test_a_labeler_who_ranks_by_position_is_named_with_the_statistic(tmp_path: Path) -> None:
    rows = make_rows("rm")[:90]
    for number, row in enumerate(rows):
        row["labeler_id"] = f"labeler-{number % 3}"
        if number % 3 and number % 2:
            row["ranks"] = [3, 2, 2, 1]
    [finding] = any_folder(tmp_path, ValidateParams(counts="none"), rm=rows).findings
    assert (finding.rule, finding.stops) == ("labelers", False)
    assert "labeler labeler-0 ranks by position: mean order correlation +0.83 in 30 rankings" in finding.message


SHAPES: list[tuple[str, Callable[[Rows], Any], str, str]] = [
    ("ppo", drop_key, "exact_keys", "prompt is missing"),
    ("ppo", put(7, answer="x"), "exact_keys", "'answer' is unknown"),
    ("ppo", swap_keys, "key_order", "in another order: user_id, prompt_id, source, split, use_case, prompt"),
    ("ppo", put(7, user_id=None), "value_types", "user_id is null, not text"),
    ("rm", put(7, completions="one"), "value_types", "completions is text, not a list"),
    ("rm", put(7, completions=["one", None]), "value_types", "completions holds null, not only text"),
    ("rm", put(7, ranks=[1, "2"]), "value_types", "ranks holds text, not only an integer"),
    ("rm", put(7, ranks=[True, 2]), "value_types", "ranks holds a boolean, not only an integer"),
    ("rm", put(7, ranks=[1, 2.5]), "value_types", "ranks holds a number, not only an integer"),
    ("rm", put(7, ranks={"one": 1}), "value_types", "ranks is an object, not a list"),
]


@pytest.mark.parametrize(("dataset", "spoil", "name", "said"), SHAPES)
def test_what_is_wrong_with_the_shape(tmp_path: Path, dataset: str, spoil: Callable[[Rows], Any], name: str,
                                      said: str) -> None:
    rows = make_rows(dataset)
    spoil(rows)
    write_rows(tmp_path / "data.jsonl", rows)
    frame = read_frame(dataset, tmp_path / "data.jsonl")
    assert (frame.at[7, "line"], frame.at[7, "problem"]) == (name, said)
    assert frame[["prompt_id", "prompt", "split"]].isna().all(axis=1).tolist() == [
        line == 7 and name != "key_order" for line in range(1, len(rows) + 1)]  # keys in another order are usable


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "ppo.jsonl"
    rows = [json.dumps(row) for row in make_rows("ppo")]
    rows[6] = rows[6].replace("what is ppo 7?", "what is \\ud83d?")
    file.write_text("\n".join(rows))
    assert read_frame("ppo", file).at[7, "problem"] == "prompt holds half of a surrogate pair, which is not text"


def test_blank_text_in_any_alphabet() -> None:
    from mlops.validation.expectations import is_visible

    assert [text for text in ("", " \n\t", "\u00a0", "\u3000\u200b", "\x00") if is_visible(text)] == []
    assert all(map(is_visible, ("a", " é ", "字", "🙂", "?")))


def test_use_case_mix(tmp_path: Path) -> None:
    rows = make_rows("sft", 0.1)
    assert run_rules(tmp_path, "sft", rows, 0.1) == []
    for row in [row for row in rows if row["use_case"] == "chat"][:30]:
        row["use_case"] = "extract"
    findings = run_rules(tmp_path, "sft", rows, 0.1)
    assert [finding.rule for finding in findings] == ["use_case_mix"]
    assert "chat 6.3 %, expected 8.4 %; extract 4.0 %, expected 1.9 %" in str(findings[0])


@pytest.mark.parametrize("dataset", PAPER_ROWS)
def test_an_empty_file_and_one_without_a_sound_row(tmp_path: Path, dataset: str) -> None:
    assert [finding.rule for finding in run_rules(tmp_path, dataset, [])] == ["row_counts"]
    rows: Rows = [{"text": "x"} for _ in make_rows(dataset)]
    findings = run_rules(tmp_path, dataset, rows)
    assert [(finding.rule, len(finding.rows)) for finding in findings] == [("exact_keys", len(rows))]
    assert "row 1 (prompt_id is missing, " in str(findings[0])
    assert f"and {len(rows) - 3:,} more" in str(findings[0])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with this code, small clean data and the metrics of an earlier run."""
    for name in ("tasks", "mlops", "rlhf", "dvc.yaml"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tiny.yaml").write_text(f"ingest: {{scale: {SCALE}}}\n")
    (tmp_path / "params.yaml").write_text("seed: 1\nprofile: tiny\n")
    for dataset in PAPER_ROWS:
        write_rows(tmp_path / "data" / f"{dataset}.jsonl", make_rows(dataset))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(root: Path) -> None:
    validate(Stage("validate", load_params(root), root, root / "scratch" / "validate" / "hash"))


def test_success_writes_the_same_metrics_twice(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(root)
    written = (root / "metrics" / "validate.json").read_bytes()
    run_here(root)
    assert (root / "metrics" / "validate.json").read_bytes() == written
    metrics = json.loads(written)
    assert metrics["validate/success"] == 1
    assert metrics["validate/expectations"] == 38 + 46 + 34 + 3  # the mix is left out of so small datasets
    assert [metrics[f"validate/{name}_rows"] for name in PAPER_ROWS] == [
        sum(expected_rows(name, SCALE).values()) for name in PAPER_ROWS]
    assert metrics["validate/rm_tied_pairs"] == round(1 / 6, 4)
    assert "passed" in capsys.readouterr().out


def test_data_docs_show_values_as_text_and_load_nothing(root: Path) -> None:
    rows = make_rows("sft")
    rows[6]["prompt"] = rows[8]["prompt"] = "<script>alert(1)</script>"
    write_rows(root / "data" / "sft.jsonl", rows)
    with pytest.raises(UserError, match="unique_prompt"):
        run_here(root)
    docs = root / "reports" / "data_docs"
    pages = {page: page.read_text() for page in docs.rglob("*.html")}
    assert docs / "index.html" in pages
    assert len(pages) == 1 + 2 * 4
    assert any("&lt;script&gt;alert(1)" in page for page in pages.values())
    for page in pages.values():
        assert "<script" not in page
        assert "<link" not in page


def test_data_docs_of_the_same_data_have_the_same_bytes(root: Path) -> None:
    """They are an output of the stage: two machines must record the same hash."""
    found = []
    for _ in range(2):
        run_here(root)
        found.append({str(path.relative_to(root)): path.read_bytes() for path in sorted((root / "reports").rglob("*"))
                      if path.is_file()})
    assert found[0] == found[1]
    assert {"reports/data_docs/index.html", "reports/quarantine.jsonl", "reports/validate.json"} <= found[0].keys()


def test_several_failures_get_a_line_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows("sft")
    rows[6]["prompt"] = ""
    write_rows(root / "data" / "sft.jsonl", rows)
    write_rows(root / "data" / "ppo.jsonl", make_rows("ppo")[1:])
    with pytest.raises(UserError, match=r"^data/sft.jsonl, data/ppo.jsonl: 2 rules failed; first: .*row 7 \(''\)"):
        run_here(root)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:3] for line in lines] == [
        ["validate", "data/sft.jsonl", "filled_prompt"], ["validate", "data/ppo.jsonl", "row_counts"]]


def test_the_command_fails_with_one_line_and_leaves_the_metrics(root: Path) -> None:
    (root / "metrics").mkdir()
    (root / "metrics" / "validate.json").write_text("earlier\n")
    rows = make_rows("rm")
    rows[41]["ranks"] = [1, 2, 2, 4]
    write_rows(root / "data" / "rm.jsonl", rows)
    done = subprocess.run([sys.executable, "-m", "tasks.validate"], cwd=root, capture_output=True, text=True,
                          check=False, env=os.environ | {"INSTRUCTFLOW_UPLOADER": "off"})
    assert done.returncode == 2
    assert done.stderr == (
        "validate: data/rm.jsonl: dense_ranks: ranks are 1, 2, ... without a gap, ties share a rank; 1 row breaks it: "
        "row 42 (ranks (1, 2, 2, 4), completions ('one', 'two', 'two', 'three')); fix or remove the row\n")
    assert (root / "metrics" / "validate.json").read_text() == "earlier\n"
    assert (root / "reports" / "data_docs" / "index.html").exists()
