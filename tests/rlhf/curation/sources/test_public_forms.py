"""Files in the form of public sets, each by its description alone. All rows are written for these tests."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mlops.config.sources import load_source
from rlhf.curation.assemble import assemble
from rlhf.curation.sources.spec import Source
from rlhf.data.prompts import prompt_text

Rows = list[dict[str, Any]]


def as_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def as_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")


def as_jsonl_gz(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_parquet(path: Path, rows: Rows) -> None:
    pd.DataFrame(rows).to_parquet(path)


def as_csv(path: Path, rows: Rows) -> None:
    pd.DataFrame(rows).to_csv(path, index=False)


def said(*texts: str, key: str = "value", role: str = "from") -> Rows:
    names = ("human", "gpt") if role == "from" else ("user", "assistant")
    return [{role: names[place % 2], key: text} for place, text in enumerate(texts)]


def chat(*texts: str) -> Rows:
    return said(*texts, role="role", key="content")


def made(folder: Path, role: str, **entry: Any) -> Rows:
    """The rows of a role by a description of one entry, none of which may be lost."""
    (folder / "spec.yaml").write_text(yaml.safe_dump({role: [entry], "rules": {"valid_share": 0}}, allow_unicode=True))
    source = load_source(folder / "spec.yaml")
    assert isinstance(source, Source)
    assemble(source, folder, folder / "made", seed=1)
    for name in ("quarantine.jsonl", "dropped.jsonl"):
        assert (folder / "made" / name).read_text() == "", name
    return [json.loads(line) for line in (folder / "made" / f"{role}.jsonl").read_text("utf-8").splitlines()]


Ranking = dict[str, dict[str, int]]


def ultrafeedback() -> Rows:
    def answer(text: str, overall: float) -> dict[str, Any]:
        rating = {"Rating": "4", "Rationale": "It follows what was asked."}
        return {"model": "a-model", "principle": "helpfulness", "custom_system_prompt": "You are helpful.",
                "response": text, "critique": "Fine.", "overall_score": overall, "fine-grained_score": 4.0,
                "annotations": {"helpfulness": {**rating, "Type": ["1"], "Rationale For Rating": "It helps."},
                                "honesty": rating, "instruction_following": rating, "truthfulness": rating}}

    return [{"source": "sharegpt", "instruction": "How does a sundial tell the hour?", "models": ["m1", "m2", "m3"],
             "completions": [answer("By its shadow.", 8.5), answer("It rings.", 1.0), answer("By the sun.", 7.0)],
             "correct_answers": ["None"], "incorrect_answers": ["None"]}]


def helpsteer() -> Rows:
    def row(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 3, "coherence": 4,
                "complexity": 2, "verbosity": 1}

    talk = ("Name a tree.\n<extra_id_1>Assistant\nThe birch.\n<extra_id_1>User\nAnother one, please.")
    return [row("Explain what a keel is.", "It keeps a ship upright.", 4), row("Explain what a keel is.", "Wood.", 1),
            row(talk, "The alder.", 3), row(talk, "The birch again.", 0)]


def arena(judge: str = "arena_user_973", winner: str = "model_b") -> Rows:
    return [{"question_id": "58210e39", "model_a": "m-1", "model_b": "m-2", "winner": winner, "judge": judge,
             "conversation_a": chat("What is a fjord?", "A kind of car."),
             "conversation_b": chat("What is a fjord?", "A narrow arm of the sea between cliffs."), "turn": 1,
             "anony": True, "language": "English", "tstamp": 1682351591.1322,
             "openai_moderation": {"flagged": False}, "toxic_chat_tag": {"t5-large": {"flagged": False}}}]


def mt_bench() -> Rows:
    def row(turn: int, a: Rows, b: Rows) -> dict[str, Any]:
        return {"question_id": 81 + turn, "model_a": "m-1", "model_b": "m-2", "winner": "model_a", "judge": "expert_0",
                "conversation_a": a, "conversation_b": b, "turn": turn}

    return [row(1, chat("Write a verse on rain.", "It falls, it sings.", "Make it longer.", "It falls."),
                chat("Write a verse on rain.", "Rain.", "Make it longer.", "No."))]


PAIR = {"What is a fjord?": {"A kind of car.": 2, "A narrow arm of the sea between cliffs.": 1}}
PANDALM: Rows = [{"idx": 1, "instruction": "Shorten the sentence.", "input": "The very big dog slept.",
                  "response1": "A big dog slept.", "response2": "Dog.", "annotator1": 1, "annotator2": 2,
                  "annotator3": 0}]
TREES: list[tuple[str, Callable[[Path, Rows], None], Rows, dict[str, Any], Ranking]] = [
    ("ultrafeedback", as_jsonl, ultrafeedback(), {"layout": "ultrafeedback"},
     {"How does a sundial tell the hour?": {"By its shadow.": 1, "It rings.": 3, "By the sun.": 2}}),
    ("ultrafeedback by columns", as_parquet, ultrafeedback(), {
        "columns": {"prompt": "instruction", "completions": "completions[].response",
                    "scores": "completions[].overall_score"}},
     {"How does a sundial tell the hour?": {"By its shadow.": 1, "It rings.": 3, "By the sun.": 2}}),
    ("helpsteer", as_jsonl_gz, helpsteer(), {"layout": "helpsteer"},
     {"Explain what a keel is.": {"It keeps a ship upright.": 1, "Wood.": 2},
      "Human: Name a tree.\n\nAssistant: The birch.\n\nHuman: Another one, please.": {
          "The alder.": 1, "The birch again.": 2}}),
    ("helpsteer3 preference", as_jsonl, [
        {"domain": "general", "language": "english", "context": chat("What is a fjord?"), "response1": "A kind of car.",
         "response2": "A narrow arm of the sea between cliffs.", "overall_preference": 2,
         "individual_preference": [{"score": 2, "reasoning": "Clear.", "feedback1": "x", "feedback2": "y"}]}], {
        "columns": {"prompt": "context", "completions": ["response1", "response2"]},
        "preference": {"column": "overall_preference", "first": "< 0", "second": "> 0", "tie": 0}}, PAIR),
    ("chatbot arena", as_parquet, arena(), {"layout": "arena"}, PAIR),
    ("mt-bench", as_parquet, mt_bench(), {"layout": "arena"},
     {"Write a verse on rain.": {"It falls, it sings.": 1, "Rain.": 2}}),
    ("arena 55k", as_csv, [
        {"id": 30192, "model_a": "m-1", "model_b": "m-2", "prompt": json.dumps(["What is a fjord?"]),
         "response_a": json.dumps(["A kind of car."]),
         "response_b": json.dumps(["A narrow arm of the sea between cliffs."]), "winner_model_a": 0,
         "winner_model_b": 1, "winner_tie": 0}], {"layout": "arena"}, PAIR),
    ("arena 140k, content parts", as_parquet, [
        {"id": "a1", "model_a": "m-1", "model_b": "m-2", "winner": "model_b", "evaluation_session_id": "s",
         "evaluation_order": 1, "language": "en", **{
             f"conversation_{side}": [{"role": role, "content": [
                 {"type": "text", "text": text, "image": None, "mimeType": None}]}
                 for role, text in (("user", "What is a fjord?"), ("assistant", answer))]
             for side, answer in (("a", "A kind of car."), ("b", "A narrow arm of the sea between cliffs."))}}],
     {"layout": "arena"}, PAIR),
    ("pandalm", as_json, PANDALM, {
        "columns": {"prompt": ["instruction", "input"], "completions": ["response1", "response2"]},
        "preference": {"column": "annotator2", "first": 1, "second": 2, "tie": 0}, "labeler": "annotator2"},
     {"Shorten the sentence.\n\nThe very big dog slept.": {"A big dog slept.": 2, "Dog.": 1}}),
    ("webgpt", as_jsonl, [
        {"question": {"dataset": "eli5", "id": "q1", "full_text": "What is a fjord?"}, "quotes_0": {"title": [],
         "extract": []}, "answer_0": "A kind of car.", "tokens_0": {"prefix": [1], "completion": [2]},
         "score_0": -0.5, "quotes_1": {"title": [], "extract": []},
         "answer_1": "A narrow arm of the sea between cliffs.", "score_1": 0.5}],
     {"columns": {"prompt": "question.full_text", "completions": ["answer_0", "answer_1"],
                  "scores": ["score_0", "score_1"]}}, PAIR),
    ("summarize from feedback", as_jsonl, [
        {"info": {"id": "t3", "post": "What is a fjord?", "title": "T", "subreddit": "r"}, "split": "train",
         "summaries": [{"text": " A kind of car.", "policy": "sup2", "note": None},
                       {"text": " A narrow arm of the sea between cliffs.", "policy": "ref", "note": None}],
         "choice": 1, "worker": "w1", "batch": "b", "extra": {"confidence": 8}}],
     {"columns": {"prompt": "info.post", "completions": "summaries[].text", "labeler_id": "worker", "split": "split"},
      "preference": {"column": "choice", "first": 0, "second": 1}}, PAIR),
    ("shp", as_jsonl, [
        {"post_id": "p1", "domain": "askculinary_train", "history": "What is a fjord?",
         "human_ref_A": "A kind of car.", "human_ref_B": "A narrow arm of the sea between cliffs.", "labels": 0,
         "score_A": 3, "score_B": 90, "score_ratio": 30.0}],
     {"columns": {"prompt": "history", "completions": ["human_ref_A", "human_ref_B"],
                  "scores": ["score_A", "score_B"]}}, PAIR),
    ("saferlhf", as_jsonl, [
        {"prompt": "What is a fjord?", "response_0": "A kind of car.",
         "response_1": "A narrow arm of the sea between cliffs.", "is_response_0_safe": True,
         "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0}],
     {"columns": {"prompt": "prompt", "completions": ["response_0", "response_1"]},
      "preference": {"column": "better_response_id", "first": 0, "second": 1}}, PAIR),
    ("orca dpo pairs", as_parquet, [
        {"system": "You are a geographer.", "question": "What is a fjord?", "rejected": "A kind of car.",
         "chosen": "A narrow arm of the sea between cliffs."}],
     {"columns": {"system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"}},
     {"System: You are a geographer.\n\nHuman: What is a fjord?": PAIR["What is a fjord?"]}),
    ("ultrafeedback binarized", as_parquet, [
        {"prompt": "What is a fjord?", "prompt_id": "ab12", "score_chosen": 8.0, "score_rejected": 2.0,
         "messages": chat("What is a fjord?", "A narrow arm of the sea between cliffs."),
         "chosen": chat("What is a fjord?", "A narrow arm of the sea between cliffs."),
         "rejected": chat("What is a fjord?", "A kind of car.")}], {}, PAIR),
    ("openai preference", as_jsonl, [
        {"input": {"messages": chat("What is a fjord?"), "tools": [], "parallel_tool_calls": True},
         "preferred_output": [{"role": "assistant", "content": "A narrow arm of the sea between cliffs."}],
         "non_preferred_output": [{"role": "assistant", "content": "A kind of car."}]}],
     {"layout": "openai_messages"}, PAIR),
    ("llama-factory sharegpt preference", as_json, [
        {"conversations": said("What is a fjord?"), "chosen": {"from": "gpt",
         "value": "A narrow arm of the sea between cliffs."}, "rejected": {"from": "gpt", "value": "A kind of car."}}],
     {"layout": "sharegpt"}, PAIR),
    ("llama-factory alpaca preference", as_json, [
        {"instruction": "What is", "input": "a fjord?", "chosen": "A narrow arm of the sea between cliffs.",
         "rejected": "A kind of car."}],
     {"layout": "alpaca"}, {"What is\n\na fjord?": PAIR["What is a fjord?"]}),
    ("trl unpaired, grouped", as_jsonl, [
        {"prompt": chat("What is a fjord?"), "completion": [{"role": "assistant", "content": text}], "label": good}
        for text, good in (("A kind of car.", False), ("A narrow arm of the sea between cliffs.", True))],
     {"group_by": "prompt", "columns": {"prompt": "prompt", "completion": "completion", "score": "label"}}, PAIR),
]
FILES = {as_jsonl: "rows.jsonl", as_json: "rows.json", as_jsonl_gz: "rows.jsonl.gz", as_parquet: "rows.parquet",
         as_csv: "rows.csv"}


@pytest.mark.parametrize(("name", "save", "rows", "entry", "wanted"), TREES, ids=[case[0] for case in TREES])
def test_rankings_in_the_form_of_a_public_set(tmp_path: Path, name: str, save: Any, rows: Rows, entry: dict[str, Any],
                                              wanted: Ranking) -> None:
    save(tmp_path / FILES[save], rows)
    found = made(tmp_path, "rm", files=FILES[save], **entry)
    assert {prompt_text(row["prompt"]): dict(zip(row["completions"], row["ranks"], strict=True))
            for row in found} == wanted
    for layout in [entry["layout"]] if "layout" in entry else []:
        prompts = made(tmp_path, "ppo", files=FILES[save], layout=layout) if "input" not in rows[0] else []
        assert not prompts or {prompt_text(row["prompt"]) for row in prompts} == set(wanted)


ALPACA: Rows = [{"instruction": "Name a bird.", "input": "", "output": "The wren.", "text": "Below is ..."},
                {"instruction": "Shorten it.", "input": "A very big dog.", "output": "A big dog.", "text": "Below ..."}]
SHARED = [{"id": "QWJhYvA_0", "conversations": said("Name a bird.", "The wren.", "Another one.", "The tit.")}]
CHATS: list[tuple[str, Callable[[Path, Rows], None], Rows, dict[str, Any], dict[str, str]]] = [
    ("alpaca", as_json, ALPACA, {"layout": "alpaca"},
     {"Name a bird.": "The wren.", "Shorten it.\n\nA very big dog.": "A big dog."}),
    ("alpaca with history", as_json, [ALPACA[0] | {"system": "Be brief.", "history": [["Name a tree.", "The elm."]]}],
     {"layout": "alpaca"},
     {"System: Be brief.\n\nHuman: Name a tree.\n\nAssistant: The elm.\n\nHuman: Name a bird.": "The wren."}),
    ("sharegpt", as_json, SHARED, {"layout": "sharegpt"},
     {"Human: Name a bird.\n\nAssistant: The wren.\n\nHuman: Another one.": "The tit."}),
    ("sharegpt, system and KTO", as_json, [
        SHARED[0] | {"system": "Be brief.", "tools": "", "kto_tag": True}, SHARED[0] | {"kto_tag": False}],
     {"layout": "sharegpt", "where": {"kto_tag": True}},
     {"System: Be brief.\n\nHuman: Name a bird.\n\nAssistant: The wren.\n\nHuman: Another one.": "The tit."}),
    ("openai messages", as_jsonl, [{"messages": [
        {"role": "developer", "content": "Be brief."}, {"role": "user", "content": [
            {"type": "text", "text": "Name a bird."}]}, {"role": "assistant", "content": "The wren.", "weight": 1}]}],
     {"layout": "openai_messages"}, {"System: Be brief.\n\nHuman: Name a bird.": "The wren."}),
    ("openorca", as_parquet, [{"id": "niv.1", "system_prompt": "", "question": "Name a bird.",
                               "response": "The wren."}],
     {"columns": {"system": "system_prompt", "prompt": "question", "completion": "response"}},
     {"Name a bird.": "The wren."}),
    ("trl prompt and completion", as_jsonl, [{"prompt": chat("Name a bird."), "completion": [
        {"role": "assistant", "content": "The wren."}]}], {}, {"Name a bird.": "The wren."}),
    ("kto", as_csv, [{"prompt": "Name a bird.", "completion": text, "label": good}
                     for text, good in (("The wren.", True), ("No.", False))], {"where": {"label": True}},
     {"Name a bird.": "The wren."}),
]


@pytest.mark.parametrize(("name", "save", "rows", "entry", "wanted"), CHATS, ids=[case[0] for case in CHATS])
def test_demonstrations_in_the_form_of_a_public_set(tmp_path: Path, name: str, save: Any, rows: Rows,
                                                    entry: dict[str, Any], wanted: dict[str, str]) -> None:
    save(tmp_path / FILES[save], rows)
    assert {prompt_text(row["prompt"]): row["completion"]
            for row in made(tmp_path, "sft", files=FILES[save], **entry)} == wanted
    entry = {key: value for key, value in entry.items() if key != "columns"} | (
        {"columns": {key: value for key, value in entry["columns"].items() if key != "completion"}}
        if "columns" in entry else {})
    assert {prompt_text(row["prompt"]) for row in made(tmp_path, "ppo", files=FILES[save], **entry)} == set(wanted)


def test_an_arena_user_is_who_asked_and_a_judge_elsewhere_is_only_the_labeler(tmp_path: Path) -> None:
    as_parquet(tmp_path / "rows.parquet", arena())
    row, = made(tmp_path, "rm", files="rows.parquet", layout="arena")
    assert (row["user_id"], row["labeler_id"]) == ("arena_user_973", "arena_user_973")
    as_parquet(tmp_path / "rows.parquet", mt_bench())
    row, = made(tmp_path, "rm", files="rows.parquet", layout="arena")
    assert row["user_id"] != "expert_0"
    assert row["labeler_id"] == "expert_0"


def test_three_annotators_in_columns_of_their_own_are_three_entries(tmp_path: Path) -> None:
    as_json(tmp_path / "rows.json", PANDALM)
    for number, ranks in ((1, [1, 2]), (2, [2, 1])):
        row, = made(tmp_path, "rm", files="rows.json", labeler=f"annotator{number}", columns={
            "prompt": ["instruction", "input"], "completions": ["response1", "response2"]}, preference={
            "column": f"annotator{number}", "first": 1, "second": 2, "tie": 0})
        assert (row["ranks"], row["labeler_id"]) == (ranks, f"annotator{number}")
