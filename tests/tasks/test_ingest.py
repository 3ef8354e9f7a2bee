"""Source descriptions, from the file to the folder: the command line, order, processes, real rows, clear errors."""

import gzip
import json
import multiprocessing.pool
import random
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rlhf.curation.assemble
from mlops.config.sources import load_source
from rlhf.curation.rules import RULES
from rlhf.data.prompts import prompt_text
from rlhf.errors import UserError
from rlhf.params import IngestParams
from tasks.ingest import as_table, folder_parser, main, make_folder
from tasks.validate import check_folder
from tasks.validate import folder_parser as validate_parser

REAL = Path(__file__).parents[2] / ".." / "shared" / "data"
WORDS = ["river", "stone", "cloud", "garden", "letter", "window", "market", "planet", "forest", "bridge", "candle",
         "doctor", "engine", "farmer", "guitar", "harbor", "island", "jacket", "kettle", "ladder", "mirror", "needle"]


def sentence(rng: random.Random) -> str:
    return "Tell me about the " + " and the ".join(rng.sample(WORDS, 6)) + "."


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A team's own files: demonstrations as CSV, rankings as Parquet, prompts as JSON Lines, and their description."""
    rng = random.Random(1)
    sft = [{"question": sentence(rng), "answer": f"Of {rng.choice(WORDS)} I know part {number}.",
            "by": f"u{number % 30}"}
           for number in range(300)]
    sft[7]["answer"] = ""
    sft[8]["question"] += " Write to ann@example.org."
    sft[9]["question"] = "Bitte erkläre mir, warum der Himmel am Abend rot wird und wie das Wetter morgen wird."
    pd.DataFrame(sft).to_csv(tmp_path / "sft.csv", index=False)
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Good.", "Bad."))
    rm = [{"prompt": [{"role": "user", "content": sentence(rng)}], "chosen": good, "rejected": bad, "annotator": "l1"}
          for _ in range(200)]
    pd.DataFrame(rm).to_parquet(tmp_path / "rm.parquet")
    write_rows(tmp_path / "ppo.jsonl", [{"prompt": sentence(rng)} for _ in range(200)])
    (tmp_path / "spec.yaml").write_text("""
sft:
  - files: sft.csv
    columns: {prompt: question, completion: answer, user_id: by}
    source: labeler
rm:
  - files: rm.parquet
    columns: {prompt: prompt, chosen: chosen, rejected: rejected, labeler_id: annotator}
ppo:
  - files: ppo.jsonl
rules: {valid_share: 0.2}
""")
    return tmp_path


def run(spec: Path, out: Path, seed: int = 1) -> dict[str, Any]:
    make_folder(folder_parser().parse_args(["--source", str(spec), "--out", str(out), "--seed", str(seed)]))
    return json.loads((out / "rules.json").read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def validated(out: Path) -> list[dict[str, Any]]:
    report = out.parent / "findings.json"
    check_folder(validate_parser().parse_args(
        ["--data", str(out), "--report", str(report), "--counts", "none", "--min-k", "2"]))
    return json.loads(report.read_text())


def test_a_team_s_files_become_datasets_that_validation_finds_nothing_in(team: Path) -> None:
    report = run(team / "spec.yaml", team / "out")
    assert report["sft"]["quarantined"] == {"empty completion": 1}
    assert report["sft"]["dropped"]["other_language"] == 1
    assert report["sft"]["dropped"]["personal_data"] in (0, 1)  # where the user is valid, the row stays
    bad, = rows_of(team / "out" / "quarantine.jsonl")
    assert (bad["dataset"], bad["row"], bad["reason"]) == ("sft", 8, "empty completion")
    for role in ("sft", "rm", "ppo"):
        counts = report[role]
        assert counts["read"] == counts["kept"] + sum(counts["quarantined"].values()) + sum(counts["dropped"].values())
        assert counts["kept"] == counts["train"] + counts["valid"] == len(rows_of(team / "out" / f"{role}.jsonl"))
    assert list(rows_of(team / "out" / "rm.jsonl")[0]) == ["prompt_id", "user_id", "labeler_id", "source", "split",
                                                           "use_case", "prompt", "completions", "ranks"]
    assert {row["labeler_id"] for row in rows_of(team / "out" / "rm.jsonl")} == {"l1"}
    assert [item for item in validated(team / "out") if item["rule"] != "personal_data_in_valid"] == []
    dropped = rows_of(team / "out" / "dropped.jsonl")
    assert {"dataset", "source", "row", "rule"} == set(dropped[0])
    assert "ann@example.org" not in (team / "out" / "dropped.jsonl").read_text()


def no_pool(*arguments: object, **options: object) -> None:
    raise AssertionError("a small source needs no processes")


def test_neither_order_nor_processes_change_a_byte(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 2)
        patch.setattr(rlhf.curation.assemble, "FEW", 0)  # also so few rows go through the pool
        run(team / "spec.yaml", team / "one")
    monkeypatch.setattr(multiprocessing.pool.Pool, "__init__", no_pool)
    rng = random.Random(2)
    for name, load, save in (("sft.csv", pd.read_csv, lambda frame, path: frame.to_csv(path, index=False)),
                             ("rm.parquet", pd.read_parquet, lambda frame, path: frame.to_parquet(path))):
        frame = load(team / name, **({"keep_default_na": False} if name == "sft.csv" else {}))
        save(frame.sample(frac=1, random_state=3), team / name)
    lines = (team / "ppo.jsonl").read_text().splitlines()
    rng.shuffle(lines)
    (team / "ppo.jsonl").write_text("\n".join(lines) + "\n")
    run(team / "spec.yaml", team / "two")
    for role in ("sft", "rm", "ppo"):
        assert (team / "one" / f"{role}.jsonl").read_bytes() == (team / "two" / f"{role}.jsonl").read_bytes()
    run(team / "spec.yaml", team / "three", seed=2)
    assert (team / "two" / "sft.jsonl").read_bytes() != (team / "three" / "sft.jsonl").read_bytes()


def test_a_hub_dataset_s_folder_of_messages_becomes_rankings(tmp_path: Path) -> None:
    """oasst1 as the hub holds it: a flat table of messages in Parquet."""
    rng = random.Random(1)
    table = []
    for tree in range(40):
        texts = [("prompter", None, None, sentence(rng)), ("assistant", 0, 1, f"Worse {tree}."),
                 ("assistant", 0, 0, f"Better {tree}."), ("prompter", 2, 0, f"Why the {rng.choice(WORDS)} {tree}?")]
        for place, (role, parent, rank, text) in enumerate(texts):
            table.append({"message_id": f"{tree}-{place}", "parent_id": None if parent is None else f"{tree}-{parent}",
                          "user_id": f"u{tree % 9}", "created_date": "2023-02-05", "text": text, "role": role,
                          "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
                          "synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.1},
                          "message_tree_id": f"{tree}-0", "tree_state": "ready_for_export"})
    (tmp_path / "oasst1" / "data").mkdir(parents=True)
    frame = pd.DataFrame(table).sample(frac=1, random_state=1)
    frame["rank"] = frame["rank"].astype("Int32")
    frame.to_parquet(tmp_path / "oasst1/data/train-00000-of-00001.parquet")
    entry = "[{dataset: oasst1, layout: oasst_messages, where: {prompt.lang: en}}]"
    (tmp_path / "spec.yaml").write_text(f"rm: {entry}\nppo: {entry}\n")
    report = run(tmp_path / "spec.yaml", tmp_path / "out")
    assert (report["rm"]["kept"], report["ppo"]["kept"]) == (40, 80)
    ranked = {row["prompt"]: row for row in rows_of(tmp_path / "out" / "rm.jsonl")}
    assert all(row["completions"][0].startswith("Better") and row["ranks"] == [1, 2] for row in ranked.values())
    assert any(prompt_text(row["prompt"]).startswith("Human: Tell") for row in rows_of(tmp_path / "out" / "ppo.jsonl"))
    assert validated(tmp_path / "out") == []


def test_what_is_wrong_with_a_tokenizer_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, said in (("empty", "the folder holds no tokenizer"), (f"{tmp_path}/none", "no such folder")):
        (tmp_path / "spec.yaml").write_text(f"ppo: [{{files: p.jsonl}}]\nrules: {{tokenizer: {name}}}\n")
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Name a bird."}) + "\n")
        with pytest.raises(SystemExit) as stop:
            main(["--source", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{name}': cannot be used: {said}" in error


def test_a_line_of_the_preview_is_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text("ppo: [{files: p.jsonl}]\n")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Name \u202e a bird."}, ensure_ascii=False) + "\n")
    main(["--source", str(tmp_path / "spec.yaml"), "--preview", "1"])
    assert "Name \\u202e a bird." in capsys.readouterr().out


def test_conversations_stay_conversations(tmp_path: Path) -> None:
    """Messages, transcripts and a system column become the same rows; marks in a message open no turn."""
    rng = random.Random(4)
    firsts = [sentence(rng) for _ in range(40)]
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text},
                          {"role": "assistant", "content": f"{number}.\n\nHuman: is a word.\n\nAssistant: too."},
                          {"role": "user", "content": f"And {text}"}, {"role": "assistant", "content": "Last."}]}
            for number, text in enumerate(firsts)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"system": "Be brief.", "chosen": "Good.", "rejected": f"Bad {number}.", "prompt": (
        f"\n\nHuman: {text}\n\nAssistant: Yes?\n\nHuman: {sentence(rng)}\n\nAssistant:")}
        for number, text in enumerate(firsts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "spec.yaml").write_text(
        "sft: [{files: chat.jsonl}]\nppo: [{files: chat.jsonl}]\nrm: [{files: pairs.jsonl}]\n")
    report = run(tmp_path / "spec.yaml", tmp_path / "out")
    assert [report[role]["kept"] for role in ("sft", "rm")] == [40, 40]
    came = {json.dumps(row["messages"][:-1]): row["messages"][-1]["content"] for row in rows}
    kept = {json.dumps(row["prompt"]): row["completion"] for row in rows_of(tmp_path / "out" / "sft.jsonl")}
    assert kept == came
    for row in rows_of(tmp_path / "out" / "rm.jsonl"):
        assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
        assert (row["prompt"][0]["content"], row["use_case"]) == ("Be brief.", "chat")
    assert validated(tmp_path / "out") == []


def test_the_embedded_source_by_description(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("embedded: {scale: 0.01, corpus_documents: 100, tax_items: 10}\n")
    make_folder(folder_parser().parse_args(["--source", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out")]))
    assert len(rows_of(tmp_path / "out" / "sft.jsonl")) == 144


@pytest.mark.parametrize(("text", "said"), [
    ("", "expected keys and values, found nothing"),
    ("stf: []", "unknown key stf; did you mean sft?"),
    ("rules: {}", "nothing to read; add at least one of sft, rm, ppo"),
    ("sft: {files: x}", "sft: must be a list"),
    ("sft: [{}]", r"sft\[1\]: must have either dataset or files"),
    ("sft: [{files: x, dataset: y}]", "must have either"),
    ("sft: [{files: x, layout: nectar}]", "has no data for sft; must be one of columns, dolly"),
    ("sft: [{files: x, layout: dully}]", "must be one of columns, dolly"),
    ("sft: [{files: x, columns: {promt: q}}]", r"unknown key sft\[1\]\.columns\.promt; did you mean prompt\?"),
    ("sft: [{files: x, columns: {prompt: q}}]", r"sft\[1\]\.columns: needs completion and prompt; or messages"),
    ("sft: [{files: x, columns: {prompt: [], completion: a}}]", r"sft\[1\]\.columns\.prompt: names no column"),
    ("sft: [{files: x, columns: {prompt: 3, completion: a}}]", "columns"),
    ("sft: [{files: x, columns: {prompt: q, completion: [a, b]}}]", "completion: must be one column; several are for"),
    ("sft: [{files: x, columns: {messages: m, completion: a}}]", "messages cannot be combined with completion"),
    ("sft: [{files: x, columns: {messages: m, prompt: q}}]", "messages cannot be combined with prompt"),
    ("rm: [{files: x, columns: {chosen: a, rejected: b, scores: s}}]", "chosen cannot be combined with scores"),
    ("rm: [{files: x, columns: {completions: a, ranks: r, scores: s}}]", "ranks cannot be combined with scores"),
    ("rm: [{files: x, columns: {prompt: p, completion: a, score: s}}]", "needs .* completion with score .* group_by"),
    ("rm: [{files: x, group_by: p, columns: {prompt: p, completion: a}}]", "needs completion and prompt and score"),
    ("rm: [{files: x, group_by: p}]", "group_by: is for rm, with columns"),
    ("ppo: [{files: x, group_by: p, columns: {prompt: p}}]", "group_by: is for rm, with columns"),
    ("rm: [{files: x, columns: {prompt: p, completions: [a, b], scores: [s]}}]", "2 completions, 1 scores"),
    ("rm: [{files: x, columns: {completions: [a, b]}, preference: {column: v, first: 1}}]", "preference: needs second"),
    ("rm: [{files: x, columns: {completions: [a, b]}, preference: {column: v, first: 1, second: 1}}]",
     "1 stands twice"),
    ("rm: [{files: x, columns: {completions: [a, b]}, preference: {colum: v, first: 1, second: 2}}]",
     "preference.colum: unknown key"),
    ("rm: [{files: x, columns: {completions: [a, b, c]}, preference: {column: v, first: 1, second: 2}}]",
     "3 columns, a preference needs 2"),
    ("rm: [{files: x, columns: {completions: a, ranks: r}, preference: {column: v, first: 1, second: 2}}]",
     "preference: cannot be combined with ranks"),
    ("sft: [{files: x, labeler: ann}]", "labeler: is for rm"),
    ("rm: [{files: x, labeler: ann, columns: {chosen: a, rejected: b, labeler_id: who}}]", "columns.labeler_id"),
    ("sft: [{files: x, columns: {prompt: p, completion: c}, use_cases: {a: chat}}]", "needs columns.use_case"),
    ("sft: [{files: x, revision: abc}]", "revision: cannot be combined with files"),
    ("sft: [{dataset: x, delimiter: ';'}]", "delimiter: cannot be combined with dataset"),
    ("sft: [{files: x, delimiter: ';;'}]", "delimiter = ';;': must be one character"),
    ("sft: [{files: x, encoding: utf-88}]", "encoding = 'utf-88': is no encoding"),
    ("sft: [{files: x, where: {a: {b: 1}}}]", r"where\.a: must be a value, a list of values, null, or not"),
    ("sft: [{files: x, where: {day: '> 2024-01-01'}}]", r"where\.day = '> 2024-01-01': < and > compare with a number"),
    ("sft: [{files: x, where: {day: {not: ['1', '<= x']}}}]", r"where\.day = '<= x'"),
    ("sft: [{files: x, escape: '\"'}]", r"escape = '\"': must be one character"),
    ("sft: [{files: x, source: crowd}]", "source = 'crowd': must be one of nothing, labeler, customer"),
    ("sft: [{files: spec.yaml}]", "names this description itself"),
    ("sft: [{files: '*'}]", "names this description itself"),
    ("sft: [{files: x, use_case: poetry}]", "use case 'poetry' must be one of generation"),
    ("ppo: [{files: x}]\nrules: {valid_share: 1.5}", "rules.valid_share = 1.5: must be float >= 0 and <= 1"),
    ("ppo: [{files: x}]\nrules: {language: jp}", "rules.language = 'jp': must be one of .* ja, "),
    ("ppo: [{files: x}]\nrules: {max_lost_shares: {leaks: 0.5}}", "rules.max_lost_shares: unknown rule 'leaks'"),
    ("ppo: [{files: x}]\nrules: {max_lost_shares: {leak: most}}", "rules.max_lost_shares"),
    ("embedded: {}\nsft: [{files: x}]", "cannot be combined with other keys"),
    ("embedded: {scale: 3}", "embedded.scale = 3: must be float > 0 and <= 1"),
])
def test_a_wrong_description_names_itself(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_source(tmp_path / "spec.yaml")
    assert str(caught.value).startswith(str(tmp_path / "spec.yaml"))


def test_a_source_that_fails_leaves_the_folder_as_it_was(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(team / "spec.yaml", team / "out")
    before = {path.name: path.read_bytes() for path in (team / "out").iterdir()}
    (team / "ppo.jsonl").write_text('{"question": "named otherwise"}\n' * 3)
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(team / "spec.yaml"), "--out", str(team / "out")])
    assert stop.value.code == 2
    assert "ppo.jsonl: no columns prompt; or messages; there are question; map them" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (team / "out").iterdir()} == before
    assert not (team / "out.making").exists()


def test_an_entry_that_yields_nothing_is_said_before_the_others_hide_it(team: Path) -> None:
    text = (team / "spec.yaml").read_text()
    (team / "spec.yaml").write_text(text.replace(
        "  - files: sft.csv\n", "  - {files: sft.csv, columns: {prompt: question, completion: answer}, "
        "where: {by: nobody}}\n  - files: sft.csv\n"))
    with pytest.raises(UserError, match=r"sft\.csv: no row for sft; where: \{'by': 'nobody'\} may fit none"):
        run(team / "spec.yaml", team / "out")


def test_texts_of_the_corpus_are_counted_and_values_that_are_not_known_are_shown(
        team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(team / "corpus.jsonl", [{"text": text, "keep": keep} for text, keep in (
        ("one", 1), (" ", 1), ("two", 1), ("three", 0))])
    spec = (team / "spec.yaml").read_text()
    (team / "spec.yaml").write_text(spec + "corpus: [{files: corpus.jsonl, columns: {text: text}, where: {keep: 1}}]\n")
    assert run(team / "spec.yaml", team / "out")["corpus"] == {"read": 3, "documents": 2, "empty": 1}
    assert "corpus: 3 texts read, 2 kept, 1 empty" in capsys.readouterr().out
    (team / "spec.yaml").write_text(spec + "corpus: [{files: corpus.jsonl, columns: {text: text}, where: {keep: 2}}]\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl: no text for corpus"):
        run(team / "spec.yaml", team / "out")
    write_rows(team / "prompts.jsonl", [{"prompt": f"Say what number {number} is good for.", "use_case": kind}
                                        for number, kind in enumerate(["poems"] * 3 + ["chat"] * 7)])
    (team / "spec.yaml").write_text("ppo: [{files: prompts.jsonl}]\n")
    with pytest.raises(UserError) as caught:
        run(team / "spec.yaml", team / "out")
    assert "quarantined: use_case is none of the ten, nor in the description's use_cases" in str(caught.value)
    assert "prompts.jsonl: row 1: (poems) " in str(caught.value)


def test_special_tokens_are_text_where_the_description_says_so(team: Path) -> None:
    write_rows(team / "prompts.jsonl", [{"prompt": "What does </s> mean in HTML?"}, {"prompt": "Name a fine bird."}])
    for rules, kept in (("{max_lost_share: 0.5}", 1), ("{special_tokens: keep}", 2)):
        (team / "spec.yaml").write_text(f"ppo: [{{files: prompts.jsonl}}]\nrules: {rules}\n")
        assert run(team / "spec.yaml", team / "out")["ppo"]["kept"] == kept


def test_a_loss_that_is_too_great_is_shown_and_replaces_nothing(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(team / "spec.yaml", team / "out")
    before = {path.name: path.read_bytes() for path in (team / "out").iterdir()}
    rng = random.Random(5)
    write_rows(team / "ppo.jsonl", [{"prompt": sentence(rng)} for _ in range(6)]
               + [{"prompt": "Warum ist der Himmel am Abend rot und am Tag blau?"}] * 4)
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(team / "spec.yaml"), "--out", str(team / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "ppo: 4 of 10 rows are lost (40%)" in said
    assert said.count("ppo.jsonl: row ") == 3  # examples
    assert "other_language" in said
    assert {path.name: path.read_bytes() for path in (team / "out").iterdir()} == before
    (team / "spec.yaml").write_text((team / "spec.yaml").read_text().replace(
        "valid_share: 0.2", "valid_share: 0.2, max_lost_shares: {other_language: 0.4}"))
    assert run(team / "spec.yaml", team / "out")["ppo"]["lost_share"] == 0.4


def test_rankings_of_a_prompt_by_one_labeler_merge_where_the_description_says_so(team: Path) -> None:
    pairs = [("a", "b", "l1"), ("b", "c", "l1"), ("c", "a", "l2"), ("a", "c", "l3"), ("c", "a", "l3")]
    write_rows(team / "rm.jsonl", [{"prompt": "Which letter?", "prompt_id": "p1", "chosen": one, "rejected": two,
                                    "labeler_id": labeler} for one, two, labeler in pairs])
    spec = "rm: [{files: rm.jsonl}]\nrules: {valid_share: 0, merge_rankings: %s}\n"
    (team / "spec.yaml").write_text(spec % "false")
    assert run(team / "spec.yaml", team / "out")["rm"]["kept"] == 5
    ids = [row["prompt_id"] for row in rows_of(team / "out" / "rm.jsonl")]
    assert len(set(ids)) == 5
    assert all(item.startswith("p1") for item in ids)
    (team / "spec.yaml").write_text(spec % "true")
    report = run(team / "spec.yaml", team / "out")["rm"]
    assert (report["kept"], report["dropped"]["merged"], report["lost_share"]) == (4, 1, 0.0)
    by_labeler = {row["labeler_id"]: row for row in rows_of(team / "out" / "rm.jsonl")}
    assert (by_labeler["l1"]["completions"], by_labeler["l1"]["ranks"]) == (["a", "b", "c"], [1, 2, 3])


def test_spellings_of_a_user_are_one_user(team: Path) -> None:
    rng = random.Random(6)
    write_rows(team / "ppo.jsonl", [{"prompt": sentence(rng), "user_id": name} for name in ("Jo", " jo", "JO ") * 4])
    (team / "spec.yaml").write_text("ppo: [{files: ppo.jsonl}]\nrules: {max_prompts_per_user: 10}\n")
    report = run(team / "spec.yaml", team / "out")["ppo"]
    assert (report["users"], report["dropped"]["user_cap"]) == (1, 2)


def test_a_quarantined_row_may_hold_what_json_cannot(team: Path) -> None:
    rows = pd.DataFrame([{"prompt": None, "written": pd.Timestamp("2026-11-20")},
                         {"prompt": sentence(random.Random(4)), "written": pd.Timestamp("2026-11-21")}])
    rows.to_parquet(team / "ppo.parquet")
    (team / "spec.yaml").write_text("ppo: [{files: ppo.parquet, columns: {prompt: prompt, user_id: written}}]\n"
                                     "rules: {max_lost_share: 0.5}\n")
    run(team / "spec.yaml", team / "out")
    bad, = rows_of(team / "out" / "quarantine.jsonl")
    assert bad["content"]["written"].startswith("2026-11-20")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_preview_shows_rows_as_they_came_in_and_as_they_would_be_kept(team: Path, capsys: pytest.CaptureFixture[str]
                                                                        ) -> None:
    before = everything(team)
    main(["--source", str(team / "spec.yaml"), "--preview", "9"])
    said = capsys.readouterr().out
    assert everything(team) == before
    assert "sft: sft.csv: prompt = question; completion = answer; user_id = by" in said
    assert "ppo: ppo.jsonl: columns with the fields' names" in said
    assert said.count("came in: ") == 27
    lines = said.splitlines()
    first = lines.index(f"  {team / 'sft.csv'} row 1")
    came, kept = (json.loads(lines[first + place].split(": ", 1)[1]) for place in (1, 2))
    assert (came["question"], came["by"]) == (kept["prompt"], kept["user_id"])
    assert lines[lines.index(f"  {team / 'sft.csv'} row 8") + 2] == "    quarantined: empty completion"
    assert "  quarantined: empty completion: 1" in lines
    assert any(line.startswith("sft: of 300 rows read ") for line in lines)


def test_a_preview_reads_only_the_first_rows_and_refuses_what_ingest_refuses(
        team: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = team / "spec.yaml"
    spec.write_text(spec.read_text().replace("user_id: by", "user_id: buy"))
    for arguments in (["--preview", "1"], ["--out", str(team / "out")]):
        with pytest.raises(SystemExit) as stop:
            main(["--source", str(spec), *arguments])
        assert stop.value.code == 2
        assert "sft.csv: column buy: no row has it; there are question, answer, by" in capsys.readouterr().err
    monkeypatch.setattr("rlhf.curation.preview.SAMPLE", 100)  # where more follow, they may have it
    main(["--source", str(spec), "--preview", "1"])
    said = capsys.readouterr().out
    assert "column buy: no row has it; there are question, answer, by; did you mean by? (of the first 100)" in said
    assert "sft: of 100 rows read" in said


def test_what_one_wrong_file_holds_is_said_in_one_line_and_nothing_is_replaced(
        team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A very long line, half an archive, an archive of many files, a description that names itself."""
    run(team / "spec.yaml", team / "out")
    before = everything(team / "out")
    whole = gzip.compress((team / "ppo.jsonl").read_bytes())
    (team / "long.jsonl").write_text(json.dumps({"prompt": "x" * 10 * 2**20}) + "\n")
    (team / "half.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with zipfile.ZipFile(team / "many.zip", "w") as archive:
        for name in ("a.jsonl", "b.jsonl"):
            archive.write(team / "ppo.jsonl", name)
    (team / "own.yaml").write_text("ppo: [{files: own.yaml, format: text}]\n")
    for name, said in (("long.jsonl", "line 1: longer than"), ("half.jsonl.gz", "cannot be read"),
                       ("many.zip", "holds 2 files"), ("own.yaml", "names this description itself")):
        (team / "own.yaml").write_text(f"ppo: [{{files: {name}}}]\n")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["--source", str(team / "own.yaml"), "--out", str(team / "out")])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2
        assert name in error
        assert said in error
        assert everything(team / "out") == before


def test_a_folder_with_other_things_in_it_is_left_alone(team: Path) -> None:
    (team / "mine").mkdir()
    (team / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is no dataset"):
        run(team / "spec.yaml", team / "mine")


def test_the_table_has_a_column_a_dataset() -> None:
    counts = {"read": 3, "quarantined": {"empty prompt": 1}, "dropped": dict.fromkeys(RULES, 0), "kept": 2,
              "train": 1, "valid": 1, "users": 2}
    assert [line.split() for line in as_table({"sft": counts, "ppo": counts}).splitlines()][2] == [
        "quarantined:", "empty", "prompt", "1", "1"]


def test_the_shipped_description_of_public_sets_is_sound() -> None:
    source = load_source(Path(__file__).parents[2] / "profiles" / "sources" / "public.yaml")
    assert not isinstance(source, IngestParams)
    assert [entry.dataset for entry in source.rm] == ["berkeley-nest/Nectar", "OpenAssistant/oasst1",
                                                      "Anthropic/hh-rlhf"]
    entries = (*source.sft, *source.rm, *source.ppo)
    assert all(len(entry.revision) == 40 for entry in entries)
    trees = [entry for entry in entries if entry.layout == "oasst_messages"]
    assert [list(entry.where) for entry in trees] == [["prompt.lang"]] * 2  # a tree itself has no lang


@pytest.mark.skipif(not REAL.is_dir(), reason="real public rows are not at hand")
def test_real_rows_of_dolly_hh_rlhf_and_openassistant(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(f"""
sft: [{{files: {REAL}/dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl, layout: dolly_hhrlhf}}]
rm:
  - {{files: {REAL}/hh_rlhf_harmless_base/test.jsonl.gz, layout: hh_rlhf}}
  - {{files: {REAL}/oasst_ranked_trees/en_100_tree.jsonl, layout: oasst_trees}}
ppo:
  - {{files: {REAL}/hh_rlhf_harmless_base/test.jsonl.gz, layout: hh_rlhf}}
  - {{files: {REAL}/oasst_ranked_trees/en_100_message.jsonl, layout: oasst_trees}}
  - {{files: {REAL}/oasst_ranked_trees/prompt_lottery_en_250_text.jsonl, columns: {{prompt: text}}}}
""")
    report = run(tmp_path / "spec.yaml", tmp_path / "out")
    assert report["sft"]["read"] == 1000
    with gzip.open(REAL / "hh_rlhf_harmless_base/test.jsonl.gz") as handle:
        pairs = sum(1 for _ in handle)
    assert pairs < report["rm"]["read"] < pairs + 1000
    assert all(report[role]["kept"] > 0.95 * report[role]["read"] for role in ("sft", "rm", "ppo"))
    # All warn: completions of hh-rlhf begin with "Human:", and the best one of a pair is its prompt.
    assert {item["rule"] for item in validated(tmp_path / "out")} <= {
        "personal_data_in_valid", "turn_marks", "repeated_prompt"}


@pytest.mark.parametrize("how", [["--out", "out"], ["--preview", "2"]])
def test_a_tokenizer_or_description_that_cannot_be_used_is_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "sft.jsonl", [{"prompt": "p?", "completion": "c."}])
    (tmp_path / "spec.yaml").write_text("sft: [{files: sft.jsonl}]\nrules: {tokenizer: ./nothing}\n")
    for source, said in (("spec.yaml", "rules.tokenizer = './nothing': cannot be used"), (".", "is a folder"),
                         ("none.yaml", "no such file")):
        with pytest.raises(SystemExit) as stop:
            main(["--source", source, *how])
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ingest: ")]
        assert len(lines) == 1
        assert said in lines[0]
    assert not (tmp_path / "out").exists()
