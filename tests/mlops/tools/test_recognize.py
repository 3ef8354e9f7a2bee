"""How files of others are recognized by their first rows: as their publishers write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlops.config.sources import load_source
from mlops.tools.recognize import reading_of
from rlhf.curation.preview import look_at
from rlhf.curation.sources.spec import Source
from rlhf.errors import UserError

ASKED = "What does a cat eat in winter?"
GOOD, BAD = "It eats fish, meat and what the people of the house leave.", "Stones, I believe, and now and then a brick."
MIDDLE = "It eats meat."


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


TREE: dict[str, Any] = {"message_tree_id": "m1", "tree_state": "ready_for_export", "prompt": {
    "message_id": "m1", "text": ASKED, "role": "prompter", "user_id": "u", "replies": [
        {"message_id": "m2", "text": BAD, "role": "assistant", "rank": 1, "replies": []},
        {"message_id": "m3", "text": GOOD, "role": "assistant", "rank": 0, "replies": []}]}}
PAIRS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "openrlhf": {"input": ASKED, "chosen": GOOD, "rejected": BAD},
    "trl, conversations": {"prompt": [said("user", ASKED)], "chosen": [said("assistant", GOOD)],
                           "rejected": [said("assistant", BAD)]},
    "trl, implicit prompt": {"chosen": [said("user", ASKED), said("assistant", GOOD)],
                             "rejected": [said("user", ASKED), said("assistant", BAD)]},
    "ultrafeedback_binarized": {"prompt": ASKED, "prompt_id": "7", "score_chosen": 8.0, "score_rejected": 2.0,
                                "messages": [said("user", ASKED), said("assistant", GOOD)],
                                "chosen": [said("user", ASKED), said("assistant", GOOD)],
                                "rejected": [said("user", ASKED), said("assistant", BAD)]},
    "hh-rlhf": {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
                "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}"},
    "alpaca of LLaMA-Factory": {"instruction": "Answer.", "input": ASKED, "chosen": GOOD, "rejected": BAD},
    "openai": {"input": {"messages": [said("user", ASKED)]}, "preferred_output": [said("assistant", GOOD)],
               "non_preferred_output": [said("assistant", BAD)]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}], "chosen": {"from": "gpt", "value": GOOD},
                 "rejected": {"from": "gpt", "value": BAD}},
    "arena": {"conversation_a": [said("user", ASKED), said("assistant", BAD)], "judge": "arena_user_1", "turn": 1,
              "conversation_b": [said("user", ASKED), said("assistant", GOOD)], "winner": "model_b"},
    "safe_rlhf": {"prompt": ASKED, "response_0": BAD, "response_1": GOOD, "better_response_id": 1,
                  "safer_response_id": 0},
    "a vote by the column's name": {"question": ASKED, "Response A": GOOD, "Response B": BAD,
                                    "preference": "Response A"},
    "oasst tree": TREE,
    "ultrafeedback": {"instruction": ASKED, "completions": [
        {"model": "a", "response": MIDDLE, "overall_score": 5}, {"model": "b", "response": GOOD, "overall_score": 8.5},
        {"model": "c", "response": BAD, "overall_score": 2}]},
    "nectar": {"prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ", "answers": [
        {"answer": GOOD, "model": "a", "rank": 1}, {"answer": MIDDLE, "model": "b", "rank": 2},
        {"answer": BAD, "model": "c", "rank": 3}]},
    "lists of completions and ranks": {"prompt": ASKED, "responses": [BAD, GOOD, MIDDLE], "ranks": [3, 1, 2]},
    "lists of completions and scores, as text": {"prompt": ASKED, "responses": json.dumps([BAD, GOOD]),
                                                 "scores": "[1, 4]"},
    "numbered columns": {"prompt": ASKED, "completion_1": BAD, "completion_2": GOOD, "completion_3": MIDDLE,
                         "score_1": 1, "score_2": 9, "score_3": 5},
}


def kept(folder: Path, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What a run would keep of a file with the rows, read as recognized, by role."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"files": "rows.jsonl", **reading_of("pairs", rows, {}, "rows.jsonl").keys}
    other = [entry | {"from_rankings": True}]
    rules = {"max_lost_share": 1, "valid_share": 0}
    (folder / "rows.yaml").write_text(yaml.safe_dump({"rm": [entry], "sft": other, "ppo": other, "rules": rules}))
    source = load_source(folder / "rows.yaml")
    assert isinstance(source, Source)
    looks = look_at(source, folder, 1)
    assert not [look.refused for look in looks.values() if look.refused]
    return {role: look.kept for role, look in looks.items()}


def last_text(prompt: Any) -> str:
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


@pytest.mark.parametrize("name", PAIRS)
def test_comparisons_as_others_publish_them(tmp_path: Path, name: str) -> None:
    found = kept(tmp_path, [PAIRS[name]])
    row = found["rm"][0]
    best = [text for text, rank in zip(row["completions"], row["ranks"], strict=True) if rank == 1]
    assert best == [GOOD]
    assert BAD in row["completions"]
    assert len(row["completions"]) == (3 if MIDDLE in json.dumps(PAIRS[name]) else 2)
    assert last_text(row["prompt"]).endswith(ASKED)
    assert last_text(row["prompt"]).startswith("Answer." if "alpaca" in name else ASKED)
    assert found["sft"][0]["completion"] == GOOD
    assert found["sft"][0]["prompt"] == found["ppo"][0]["prompt"] == row["prompt"]


def test_a_row_for_each_completion_is_grouped(tmp_path: Path) -> None:
    rows = [{"prompt": ASKED, "response": text, "score": score} for text, score in ((BAD, 1), (GOOD, 5), (MIDDLE, 3))]
    found = kept(tmp_path, rows)
    assert sorted(zip(found["rm"][0]["ranks"], found["rm"][0]["completions"], strict=True)) == [
        (1, GOOD), (2, MIDDLE), (3, BAD)]
    assert [row["completion"] for row in found["sft"]] == [GOOD]
    assert len(found["ppo"]) == 1


def test_helpsteer_is_grouped_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": ASKED, "response": text, "helpfulness": score, "correctness": 1, "verbosity": 2}
            for text, score in ((BAD, 0), (GOOD, 4))]
    assert kept(tmp_path, rows)["sft"][0]["completion"] == GOOD


def test_flat_messages_of_openassistant_are_trees(tmp_path: Path) -> None:
    of_tree = {"message_tree_id": "m1", "user_id": "u", "lang": "en"}
    rows: list[dict[str, Any]] = [
        {"message_id": "m1", "parent_id": None, "text": ASKED, "role": "prompter", "rank": None},
        {"message_id": "m2", "parent_id": "m1", "text": BAD, "role": "assistant", "rank": 1},
        {"message_id": "m3", "parent_id": "m1", "text": GOOD, "role": "assistant", "rank": 0}]
    assert kept(tmp_path, [row | of_tree for row in rows])["sft"][0]["completion"] == GOOD


@pytest.mark.parametrize(("kind", "row", "keys", "unused"), [
    ("demonstrations", {"instruction": "Shorten.", "context": "A long text.", "response": GOOD, "category": "x"},
     {"layout": "dolly"}, []),
    ("demonstrations", {"instruction": "Shorten.", "input": "A long text.", "output": GOOD}, {"layout": "alpaca"}, []),
    ("demonstrations", {"prompt": "### Instruction:\nShorten.\n\n### Response:", "response": GOOD},
     {"layout": "dolly_hhrlhf"}, []),
    ("demonstrations", {"system": "Be short.", "prompt": ASKED, "completion": GOOD, "date": "2026"},
     {"columns": {"prompt": "prompt", "completion": "completion", "system": "system"}}, ["date"]),
    ("demonstrations", {"messages": [said("user", ASKED), said("assistant", GOOD)], "user_id": "u"},
     {"columns": {"messages": "messages", "user_id": "user_id"}}, []),
    ("prompts", {"Instruction": ASKED}, {"columns": {"prompt": "Instruction"}}, []),
    ("text", {"text": GOOD, "url": "u"}, {"columns": {"text": "text"}}, ["url"]),
    ("pairs", {"prompt": json.dumps([said("user", ASKED)]), "chosen": GOOD, "rejected": BAD},
     {"columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}, "json_columns": ["prompt"]}, []),
])
def test_each_kind_of_file(kind: str, row: dict[str, Any], keys: dict[str, Any], unused: list[str]) -> None:
    found = reading_of(kind, [row], {}, "f")
    assert (dict(found.keys), list(found.unused)) == (keys, unused)


def test_labelers_users_and_splits_are_recognized(tmp_path: Path) -> None:
    """Rows marked as test went into training."""
    rows = [{"prompt": f"{ASKED} {number}", "chosen": GOOD, "rejected": BAD, "annotator": f"a{number % 3}",
             "user_id": f"u{number}", "split": ("train", "test")[number % 2]} for number in range(6)]
    found = kept(tmp_path, rows)
    assert {row["split"] for row in found["rm"] if row["prompt"].endswith(("1", "3", "5"))} == {"valid"}
    assert len({row["labeler_id"] for row in found["rm"]}) == 3
    assert reading_of("pairs", [{**rows[0], "split": "holdout"}], {}, "f").unused == ["split"]


def test_a_tie_is_no_demonstration(tmp_path: Path) -> None:
    rows = [{"prompt": f"{ASKED} {number}", "response_a": GOOD, "response_b": BAD, "winner": winner}
            for number, winner in enumerate(("a", "tie", "a"))]
    found = kept(tmp_path, rows)
    assert [len(found[role]) for role in ("sft", "rm", "ppo")] == [2, 2, 3]


def test_a_column_that_the_user_names_wins() -> None:
    row = {"prompt": "old", "asked": ASKED, "chosen": GOOD, "rejected": BAD, "who": "ada"}
    found = reading_of("pairs", [row], {"prompt": "asked", "labeler_id": "who"}, "f")
    assert found.keys["columns"] == {"prompt": "asked", "chosen": "chosen", "rejected": "rejected", "labeler_id": "who"}
    assert found.unused == ["prompt"]


@pytest.mark.parametrize(("row", "line"), [
    ({"a": ASKED, "b": GOOD, "c": BAD}, "f: which column is the prompt? Say --columns prompt=NAME; columns: a, b, c"),
    ({"history": ASKED, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1}, "which column is the prompt?"),
    ({"prompt": ASKED, "response_a": GOOD, "response_b": BAD, "preference": 3},
     "f: preference = '3': which of response_a and response_b is that?"),
    ({"prompt": ASKED, "response": GOOD, "label": True}, "which column is the chosen?"),
])
def test_what_is_not_recognized_is_refused(row: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        reading_of("pairs", [row], {}, "f")
    assert line in str(caught.value)
