"""Each layout on rows in the format of its dataset."""

from typing import Any

import pytest

from rlhf.curation.sources.layouts import LAYOUTS
from rlhf.curation.sources.map_rows import wanted
from rlhf.curation.sources.records import Record, dense_ranks
from rlhf.curation.sources.spec import Entry


def read(layout: str, role: str, row: dict[str, Any], **entry: Any) -> list[Record]:
    return list(LAYOUTS[layout](row, role, Entry(files="x", layout=layout, **entry)))  # type: ignore[arg-type]


def test_dolly() -> None:
    row = {"instruction": "When did it fly? ", "context": "It flew in 1903.", "response": "In 1903.",
           "category": "closed_qa"}
    assert read("dolly", "sft", row) == [Record("When did it fly?\n\nIt flew in 1903.", ("In 1903.",), source="labeler",
                                                use_case="closed_qa")]
    assert read("dolly", "sft", row | {"context": "", "category": "information_extraction"})[0].use_case == "extract"
    assert read("dolly", "ppo", row | {"context": ""})[0] == Record("When did it fly?", source="labeler",
                                                                     use_case="closed_qa")


def test_no_robots() -> None:
    row = {"prompt": "Hi", "prompt_id": "a1", "category": "Chat", "messages": [
        {"content": "You are Al.", "role": "system"}, {"content": "Hi", "role": "user"},
        {"content": "Hello!", "role": "assistant"}, {"content": "Who are you?", "role": "user"},
        {"content": "Al.", "role": "assistant"}]}
    assert read("no_robots", "sft", row) == [Record(
        (("system", "You are Al."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Who are you?")), ("Al.",),
        source="labeler", use_case="chat")]
    single = row | {"category": "Coding", "messages": row["messages"][1:3]}
    assert read("no_robots", "sft", single) == [Record("Hi", ("Hello!",), source="labeler", use_case="other")]


def test_dolly_hhrlhf() -> None:
    frame = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
             "request.\n\n### Instruction:\n{}\n\n### Response:\n")
    assert read("dolly_hhrlhf", "sft", {"prompt": frame.format("Say\n\n### Response: now"), "response": "now"}) == [
        Record("Say\n\n### Response: now", ("now",))]
    with pytest.raises(ValueError, match="lacks its frame"):
        read("dolly_hhrlhf", "sft", {"prompt": "Say", "response": "now"})


def test_nectar() -> None:
    row = {"prompt": "\n\nHuman: Best?\n\nAssistant: ", "turns": 1, "num_responses": 3, "good_natured": True,
           "source": ["ultrachat"], "answers": [
               {"answer": "c", "model": "m1", "rank": 5.0}, {"answer": "a", "model": "m2", "rank": 1.0},
               {"answer": "b", "model": "m3", "rank": 5.0}]}
    assert read("nectar", "rm", row) == [Record("Best?", ("c", "a", "b"), (2, 1, 2), labeler="gpt-4")]
    two = row | {"prompt": "\n\nHuman: Best?\n\nAssistant: Of what?\n\nHuman: All.\n\nAssistant: "}
    assert read("nectar", "ppo", two) == [Record((("user", "Best?"), ("assistant", "Of what?"), ("user", "All.")))]


def test_hh_rlhf() -> None:
    before = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    row = {"chosen": before + " good\n\nin two parts", "rejected": before + " bad"}
    prompt = (("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    assert read("hh_rlhf", "rm", row) == [Record(prompt, ("good\n\nin two parts", "bad"), (1, 2), labeler="hh-rlhf")]
    assert read("hh_rlhf", "ppo", row) == [Record(prompt)]
    with pytest.raises(ValueError, match="differ before their last answer"):
        read("hh_rlhf", "rm", row | {"rejected": "\n\nHuman: other\n\nAssistant: bad"})
    with pytest.raises(ValueError, match="does not end with the assistant"):
        read("hh_rlhf", "rm", row | {"rejected": before + " bad\n\nHuman: and"})


def tree() -> dict[str, Any]:
    def message(text: str, role: str, rank: int | None, *replies: dict[str, Any], deleted: bool = False
                ) -> dict[str, Any]:
        return {"text": text, "role": role, "rank": rank, "deleted": deleted, "replies": list(replies), "user_id": text}

    return {"message_tree_id": "t", "prompt": message(
        "q", "prompter", None,
        message("second", "assistant", 1),
        message("gone", "assistant", 2, deleted=True),
        message("best", "assistant", 0, message("more?", "prompter", 0, message("x", "assistant", 0),
                                                message("y", "assistant", 4), message("z", "assistant", None))),
        message("unranked", "assistant", None, message("why?", "prompter", None)))}


def test_oasst_trees() -> None:
    follow = (("user", "q"), ("assistant", "best"), ("user", "more?"))
    assert read("oasst_trees", "rm", tree()) == [
        Record("q", ("best", "second"), (1, 2), user="q", labeler="oasst"),
        Record(follow, ("x", "y"), (1, 2), user="q", labeler="oasst", use_case="chat")]
    assert [record.prompt for record in read("oasst_trees", "ppo", tree()["prompt"])] == [
        "q", follow, (("user", "q"), ("assistant", "unranked"), ("user", "why?"))]
    assert read("oasst_trees", "sft", tree())[0] == Record("q", ("best",), user="q")


def test_where_can_select_by_nested_values() -> None:
    entry = Entry(files="x", where={"prompt.lang": "en", "score": "3"})
    assert wanted({"prompt": {"lang": "en"}, "score": 3}, entry)
    assert not wanted({"prompt": {"lang": "de"}, "score": 3}, entry)
    assert not wanted({"prompt": "text", "score": 3}, entry)


def test_columns_for_demonstrations() -> None:
    names = {"prompt": "q", "completion": "a.text", "user_id": "who", "use_case": "kind", "split": "part",
             "prompt_id": "id", "source": "by"}
    row = {"q": " Q ", "a": {"text": "A"}, "who": 17, "kind": "Sum", "part": "test", "id": 3, "by": "labeler"}
    assert read("columns", "sft", row, columns=names, use_cases={"Sum": "summarization"}) == [Record(
        "Q", ("A",), prompt_id="3", user="17", source="labeler", split="valid", use_case="summarization")]
    with pytest.raises(ValueError, match=r"use_case is none of the ten, .*: odd"):
        read("columns", "sft", row | {"kind": "odd"}, columns=names)
    assert read("columns", "sft", row | {"kind": None}, columns=names, use_case="chat")[0].use_case == "chat"
    with pytest.raises(ValueError, match="source is neither labeler nor customer: 'crowd'"):
        read("columns", "sft", row | {"kind": "chat", "by": "crowd"}, columns=names)
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert read("columns", "sft", chat, columns={"messages": "messages"}) == [Record("Q", ("A",))]
    assert read("columns", "ppo", chat, columns={"messages": "messages"}) == [Record("Q")]


USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "Q"), ("assistant", "good"), ("assistant", "bad")))


@pytest.mark.parametrize("row", [
    {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "Q", "completions": ["good", "bad"], "ranks": [1, 2]},
    {"prompt": "Q", "completions": ["good", "bad"], "scores": [0.9, -3]},
    {"prompt": "Q", "completions": ["good", "bad"], "ranks": [0, 7]},
])
def test_columns_for_rankings(row: dict[str, Any]) -> None:
    assert read("columns", "rm", row, columns={name: name for name in row}) == [Record("Q", ("good", "bad"), (1, 2))]
    assert read("columns", "rm", row) == [Record("Q", ("good", "bad"), (1, 2))]  # columns named like the fields


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "Q"}, "no completions"),
    ({"prompt": "Q", "completions": ["a"], "ranks": [1, 2]}, "1 completions, 2 ranks"),
    ({"prompt": "Q", "completions": ["a", "b"], "ranks": ["x", 2]}, "ranks holds no number: 'x'"),
    ({"prompt": "Q", "completions": "ab", "ranks": [1, 2]}, "is str, not a list"),
    ({"completions": ["a", "b"], "ranks": [1, 2]}, "no prompt"),
    ({"prompt": "Q", "chosen": "a"}, "no rejected"),
    ({"prompt": "Q", "completions": ["a", "b"], "ranks": [1, float("nan")]}, "ranks holds no number: nan"),
])
def test_an_incomplete_row_is_refused_with_the_reason(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("columns", "rm", row)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="neither train nor valid"):
        read("columns", "ppo", {"prompt": "Q", "split": "holdout"})


def test_ranks_are_dense_and_ties_stay_ties() -> None:
    assert dense_ranks([5.0, 1.0, 5.0, 9.0]) == (2, 1, 2, 3)


@pytest.mark.parametrize(("history", "said"), [
    ([["Name a tree.", None]], "message 2 is empty"), ([["Name a tree."]], "message 2 is empty"),
    ([["Name a tree.", " "]], "message 2 is empty"), ([["", "The elm."]], "message 1 is empty")])
def test_an_earlier_turn_without_text_is_quarantined(history: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read("alpaca", "sft", {"instruction": "Another one.", "output": "The oak.", "history": history})
    assert read("alpaca", "sft", {"instruction": "", "input": "Name a tree.", "output": "The oak."}) == [
        Record("Name a tree.", ("The oak.",))]
    with pytest.raises(ValueError, match="message 2 is empty"):
        read("hh_rlhf", "ppo", {"chosen": "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c", "rejected": (
            "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: d")})
