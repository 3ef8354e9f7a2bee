"""Any table by a column map: paths, joined columns, votes, groups, whole conversations, and columns that no row has."""

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.curation.sources.columns import FIELDS
from rlhf.curation.sources.groups import build_groups
from rlhf.curation.sources.layouts import LAYOUT_ROLES, LAYOUTS
from rlhf.curation.sources.map_rows import Mapped, check_columns, map_rows
from rlhf.curation.sources.paths import Seen, same, value_at
from rlhf.curation.sources.read import read_entry
from rlhf.curation.sources.records import Group, Record
from rlhf.curation.sources.spec import Entry
from rlhf.curation.transcripts import as_prompt
from rlhf.errors import UserError


def mapped(role: str, *rows: Any, **entry: Any) -> Mapped:
    return map_rows(role, Entry(files="x", **entry), list(range(1, len(rows) + 1)), list(rows))


def record(role: str, row: Any, **entry: Any) -> Record:
    found = mapped(role, row, **entry)
    assert not found.quarantined, found.quarantined
    (_, only), = found.records
    return only


def reason(role: str, row: Any, **entry: Any) -> str:
    found = mapped(role, row, **entry)
    assert not found.records
    return found.quarantined[0][1]


@pytest.mark.parametrize(("path", "value"), [
    ("a", {"b": [{"c": "x", "d": {"e": 1}}, {"c": "y"}]}), ("a.b[].c", ["x", "y"]), ("a.b[0].d.e", 1),
    ("a.b[-1].c", "y"), ("a.b[].d.e", [1, None]), ("a.b[2]", None), ("a.c", None), ("x.y", 2), ("lists.c[]", [1, 2]),
    ("lists[].c", [1, 2]), ("text[0]", "p"), ("python[].c", ["q"]), ("n[0]", None)])
def test_a_path_leads_into_objects_lists_and_lists_written_as_text(path: str, value: Any) -> None:
    row = {"a": {"b": [{"c": "x", "d": {"e": 1}}, {"c": "y"}]}, "x.y": 2, "lists": {"c": [1, 2]}, "text": '["p", "q"]',
           "python": "[{'c': 'q'}]", "n": 5}
    assert value_at(row, path) == value


@pytest.mark.parametrize(("value", "wanted", "fits"), [
    (True, True, True), ("True", True, True), ("no", False, True), (1, True, True),
    ("1", True, True), (0, True, False), (2, True, False), (2, False, False),
    (True, 1, True), (True, "> 0", True), (False, 0, True), (False, True, False),
    (3, 3, True), ("3", 3, True), (3, "3", True), (3.0, "3", True), ("3.50", 3.5, True), ("x", 3, False),
    ("a", ["b", "a"], True), ("c", ["b", "a"], False), (None, None, True), ("", None, True), (float("nan"), None, True),
    (0, None, False), ("x", {"not": None}, True), (None, {"not": None}, False), ("de", {"not": ["de", "fr"]}, False),
    (-2, "< 0", True), ("0.5", "> 0", True), (0, "< 0", False), (4, ">= 4", True), ("", "> 0", False),
    (" a ", "a", True), ("A", "a", False), (None, "x", False), (True, "true", True), ("tie", "tie", True)])
def test_values_compare_as_text_number_or_truth(value: Any, wanted: Any, fits: bool) -> None:
    assert same(value, wanted) is fits


def test_rows_that_where_leaves_out_are_neither_kept_nor_quarantined() -> None:
    rows = [{"prompt": "a", "ok": True}, {"prompt": "b", "ok": None}, {"prompt": None, "ok": False}, {"prompt": "d"}]
    assert [item.prompt for _, item in mapped("ppo", *rows, where={"ok": True}).records] == ["a"]
    assert [item.prompt for _, item in mapped("ppo", *rows, where={"ok": None}).records] == ["b", "d"]
    assert mapped("ppo", *rows, where={"ok": [True, None]}).quarantined == []


def test_a_prompt_is_joined_of_columns_and_empty_ones_are_left_out() -> None:
    names = {"prompt": ["task", "more.text", "hint"], "completion": "out"}
    row = {"task": "T ", "more": {"text": "M"}, "hint": "", "out": "o"}
    assert record("sft", row, columns=names).prompt == "T\n\nM"
    assert record("sft", {"task": "T", "out": "o", "hint": None}, columns=names).prompt == "T"
    assert reason("sft", {"out": "o"}, columns=names) == "no prompt"
    assert reason("sft", row | {"hint": 3}, columns=names) == "hint is int, not text"


def test_a_completion_keeps_its_first_indentation_and_inner_blanks() -> None:
    names = {"prompt": "p", "completion": "c"}
    for text, kept in (("    return  x\n\n    # end\n", "    return  x\n\n    # end"), ("\n\n\tcode", "\tcode"),
                       (" yes\n", "yes"), (" a\n b", " a\n b"), ("a\r\nb", "a\nb")):
        assert record("sft", {"p": "q", "c": text}, columns=names).completions == (kept,)
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        assert record("sft", {"m": chat}, columns={"messages": "m"}).completions == (kept,)


def test_texts_that_are_json_stay_unless_the_description_says_otherwise() -> None:
    row = {"prompt": '["a", "b"]', "completion": '{"a": 1}'}
    assert record("sft", row) == Record('["a", "b"]', ('{"a": 1}',))
    chat = json.dumps([{"role": "user", "content": "q"}])
    told = record("sft", {"prompt": chat, "completion": "c"}, json_columns=["prompt"])
    assert told == Record("q", ("c",))
    assert reason("sft", {"prompt": "[half", "completion": "c"}, json_columns=["prompt"]) == "prompt is not JSON"


def test_lists_in_the_cells_of_a_csv_file_are_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "it's \"so\""}, {"role": "assistant", "content": "yes"}]
    frame = pd.DataFrame({"messages": [chat], "completions": [["a", "b"]], "scores": [[1, 2.5]], "prompt": ["p"]})
    frame.to_csv(tmp_path / "python.csv")
    frame.map(lambda value: value if isinstance(value, str) else json.dumps(value)).to_csv(tmp_path / "json.csv")
    for name in ("python.csv", "json.csv"):
        (_, _, rows), = read_entry(Entry(files=name), tmp_path)
        assert record("sft", rows[0], columns={"messages": "messages"}) == Record('it\'s "so"', ("yes",))
        names = {"prompt": "prompt", "completions": "completions", "scores": "scores"}
        assert record("rm", rows[0], columns=names) == Record("p", ("a", "b"), (2, 1))


def test_a_system_column_is_the_first_turn() -> None:
    names = {"prompt": "q", "completion": "a", "system": "s"}
    assert record("sft", {"q": "Q", "a": "A", "s": "Be kind."}, columns=names).prompt == (
        ("system", "Be kind."), ("user", "Q"))
    assert record("sft", {"q": "Q", "a": "A", "s": ""}, columns=names).prompt == "Q"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    assert "differs" in reason("ppo", {"m": chat, "s": "Be kind."}, columns={"messages": "m", "system": "s"})


def test_a_prompt_may_be_a_list_of_one_text_or_one_of_several() -> None:
    assert record("ppo", {"turns": ["only"]}, columns={"prompt": "turns"}).prompt == "only"
    assert record("ppo", {"turns": ["a", "b"]}, columns={"prompt": "turns[0]"}).prompt == "a"
    assert "list of 2 texts" in reason("ppo", {"turns": ["a", "b"]}, columns={"prompt": "turns"})


VOTES = {"prompt": "q", "completions": ["a", "b"]}


@pytest.mark.parametrize(("vote", "preference", "ranks"), [
    ("model_a", {"first": "model_a", "second": "model_b"}, (1, 2)), (2, {"first": 1, "second": 2}, (2, 1)),
    ("2", {"first": 1, "second": 2}, (2, 1)), ("3", {"first": 1, "second": 2, "tie": [0, 3]}, (1, 1)),
    (-3, {"first": "< 0", "second": "> 0", "tie": 0}, (1, 2)), ("1.5", {"first": "< 0", "second": "> 0"}, (2, 1)),
    (True, {"first": True, "second": False}, (1, 2)), ("FALSE", {"first": True, "second": False}, (2, 1)),
    (5, {"first": [4, 5], "second": [1, 2], "tie": 3}, (1, 2))])
def test_votes_become_ranks(vote: Any, preference: dict[str, Any], ranks: tuple[int, ...]) -> None:
    row = {"q": "Q", "a": "first", "b": "second", "v": vote}
    assert record("rm", row, columns=VOTES, preference={"column": "v", **preference}) == Record(
        "Q", ("first", "second"), ranks)


@pytest.mark.parametrize(("vote", "said"), [
    ("C", "values: 'C'"), (None, "values: None"), (0, "the vote is none of the preference's values: 0"),
    (2, "the vote fits first and second: 2")])
def test_a_vote_that_the_description_does_not_explain_is_quarantined_and_named(vote: Any, said: str) -> None:
    preference = {"column": "v", "first": ["A", "> 1"], "second": ["B", 2]}
    assert said in reason("rm", {"q": "Q", "a": "x", "b": "y", "v": vote}, columns=VOTES, preference=preference)


def test_scores_may_be_true_and_false_texts_and_decimal_commas() -> None:
    names = {"prompt": "q", "completions": ["a", "b"], "scores": ["s", "t"]}
    row = {"q": "Q", "a": "x", "b": "y"}
    assert record("rm", row | {"s": True, "t": False}, columns=names).ranks == (1, 2)
    assert record("rm", row | {"s": "False", "t": "True"}, columns=names).ranks == (2, 1)
    assert record("rm", row | {"s": "1,5", "t": "1,25"}, columns=names, decimal=",").ranks == (1, 2)
    assert record("rm", row | {"s": "1.000", "t": "999,5"}, columns=names, decimal=",").ranks == (1, 2)
    assert record("rm", row | {"s": "-1.234.567,5", "t": "3"}, columns=names, decimal=",").ranks == (2, 1)
    assert reason("rm", row | {"s": "0.5", "t": "0,5"}, columns=names, decimal=",") == "scores holds no number: '0.5'"
    assert 'write decimal: ","' in reason("rm", row | {"s": "1,5", "t": "1"}, columns=names)


def chat(*texts: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


LONG = (("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"))


@pytest.mark.parametrize("prompt", [
    None, "q2", " q1 ", chat("q1", "a1", "q2", system="s"), [{"role": "system", "content": "s"}], ["q2"]])
def test_whole_conversations_have_their_common_beginning_as_prompt_once(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": chat("q1", "a1", "q2", "good", system="s"),
           "rejected": chat("q1", "a1", "q2", "bad", system="s")}
    assert record("rm", row) == Record(LONG, ("good", "bad"), (1, 2))


def test_a_prompt_column_goes_before_a_conversation_that_goes_on_from_it() -> None:
    row = {"prompt": chat("q1", "a1"), "chosen": chat("q2", "good"), "rejected": chat("q2", "bad")}
    assert record("rm", row).prompt == (("user", "q1"), ("assistant", "a1"), ("user", "q2"))


def test_conversations_that_differ_before_the_last_turn_are_quarantined_for_that() -> None:
    row = {"chosen": chat("q", "good"), "rejected": chat("other", "bad")}
    assert "differ before their last answer" in reason("rm", row)
    lists = {"completions": [chat("q", "x", "r", "y"), chat("q", "z", "r", "w")], "scores": [1, 2]}
    assert "differ before their last answer" in reason("rm", lists)
    assert "differs from the conversation" in reason("rm", {**row, "rejected": chat("q", "bad"), "prompt": "else"})
    assert "some completions are conversations" in reason("rm", {**row, "rejected": "bad"})
    assert "does not end with the assistant" in reason("rm", {**row, "rejected": chat("q", "bad", "more")})


def test_conversations_in_two_columns_with_a_vote_or_a_list_with_scores_are_rankings() -> None:
    row = {"l": chat("q", "x"), "r": chat("q", "y"), "v": "r"}
    assert record("rm", row, columns={"completions": ["l", "r"]},
                  preference={"column": "v", "first": "l", "second": "r"}) == Record("q", ("x", "y"), (2, 1))
    assert record("rm", {"completions": [row["l"], row["r"]], "scores": [3, 1]}) == Record("q", ("x", "y"), (1, 2))


def test_transcripts_as_text_are_conversations_where_no_column_is_the_prompt() -> None:
    row = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
    assert record("rm", row) == Record("q", ("good", "bad"), (1, 2))
    assert reason("rm", {"chosen": "good", "rejected": "bad"}) == "no prompt"


SCORED = {"prompt": "q", "completion": "r", "score": "s", "labeler_id": "who"}


def grouped(rows: list[Any], tmp_path: Path, by: Any = "q", **entry: Any) -> Mapped:
    made = Entry(files="x", group_by=by, **({"columns": SCORED} | entry))
    whole = Mapped([], [], Seen())
    batches = [("file", list(range(start + 1, start + 1 + len(rows[start:start + 3]))), rows[start:start + 3])
               for start in range(0, len(rows), 3)]
    for _, numbers, groups in build_groups(batches, made, made.groups(), tmp_path, whole.seen):
        found = map_rows("rm", made, numbers, groups)
        whole.records.extend(found.records)
        whole.quarantined.extend(found.quarantined)
    assert not list(tmp_path.glob("*.sqlite*"))
    return whole


@pytest.mark.parametrize("prompt", ["\n\nHuman: Is it far?\n\nAssistant:", "Is it far?"])
def test_a_prompt_beside_transcripts_is_their_beginning(prompt: str) -> None:
    """hh-rlhf as some tools write it: the transcripts in two columns, the part that they share in a third."""
    row = {"prompt": prompt, "chosen": "\n\nHuman: Is it far?\n\nAssistant: A mile.",
           "rejected": "\n\nHuman: Is it far?\n\nAssistant: No idea."}
    assert record("rm", row) == Record("Is it far?", ("A mile.", "No idea."), (1, 2))
    assert "differs" in reason("rm", row | {"prompt": "Human: Is it near?\n\nAssistant:"})


def test_a_prompt_with_an_open_turn_is_the_question() -> None:
    asked = "Human: Hello.\n\nAssistant: Hi.\n\nHuman: Is it far?"
    assert record("ppo", {"prompt": "\n\nHuman: Is it far?\n\nAssistant:"}).prompt == "Is it far?"
    turns = (("user", "Hello."), ("assistant", "Hi."), ("user", "Is it far?"))
    assert record("ppo", {"prompt": f"{asked}\n\nAssistant:"}).prompt == turns
    assert record("ppo", {"prompt": asked}).prompt == turns
    assert record("ppo", {"prompt": "Human: a word with a mark"}).prompt == "Human: a word with a mark"


def test_an_answer_of_weight_0_is_no_demonstration() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad", "weight": 0}]
    assert "weight 0" in reason("sft", {"messages": messages})
    assert record("ppo", {"messages": messages}).prompt == "q"


def test_blank_turns() -> None:
    """A system turn without text says nothing; a user or an assistant who says nothing is no turn to train on."""
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert record("sft", {"messages": [{"role": "system", "content": " "}, user, answer]}) == Record("a", ("b",))
    for blank in ("user", "assistant"):
        said = [user, {"role": "assistant", "content": "" if blank == "assistant" else "b"},
                {"role": "user", "content": "" if blank == "user" else "c"}, answer]
        assert "is empty" in reason("sft", {"messages": said})


def test_a_list_that_numpy_has_printed_is_refused() -> None:
    """Python would join its texts into one."""
    row = {"prompt": "p", "answers": "['good answer' 'bad answer']"}
    assert "as numpy prints it" in reason("sft", row, columns={"prompt": "prompt", "completion": "answers[0]"})
    both = {"prompt": "p", "completions": "['a'\n 'b']", "scores": [2, 1]}
    assert "as numpy prints it" in reason("rm", both)


def test_rows_of_one_value_make_a_ranking_wherever_they_stand_and_in_whatever_order(tmp_path: Path) -> None:
    rows = [{"q": f"q{number % 40}", "r": f"answer {number}", "s": number // 40, "who": "l"} for number in range(160)]
    found = grouped([json.dumps(row) for row in rows], tmp_path)
    assert [number for number, _ in found.records] == list(range(1, 41))
    assert {item.prompt: dict(zip(item.completions, item.ranks, strict=True)) for _, item in found.records}["q7"] == {
        "answer 7": 4, "answer 47": 3, "answer 87": 2, "answer 127": 1}
    random.Random(1).shuffle(rows)
    again = grouped(rows, tmp_path)
    assert {item for _, item in again.records} == {item for _, item in found.records}
    best = [item.ranks.index(1) for _, item in found.records]
    assert len(set(best)) > 1  # the order of the completions says nothing about the ranks


def test_rows_that_cannot_be_grouped_are_quarantined_one_by_one(tmp_path: Path) -> None:
    rows = [{"q": "q1", "r": "x", "s": 1}, "{half", {"q": None, "r": "y", "s": 2}, {"q": "q1", "r": "z", "s": 0}, ""]
    found = grouped(rows, tmp_path)
    assert [item.ranks for _, item in found.records] in ([(1, 2)], [(2, 1)])
    assert [(number, said.split(":")[0]) for number, said, *_ in found.quarantined] == [
        (2, "not JSON"), (3, "no q to group by")]


def test_groups_are_by_several_columns_and_must_agree_in_their_prompt(tmp_path: Path) -> None:
    rows = [{"id": 1, "q": "p", "r": "x", "s": 1, "who": "a"}, {"id": 1, "q": "p", "r": "y", "s": 2, "who": "b"},
            {"id": 1, "q": "p", "r": "y", "s": 0, "who": "a"}, {"id": 1, "q": "p", "r": "x", "s": 0, "who": "b"}]
    both = grouped(rows, tmp_path, by=["id", "who"])
    assert sorted(item.labeler for _, item in both.records) == ["a", "b"]
    (_, said, *_), = grouped(rows[:2], tmp_path, by="id").quarantined  # the scores of two people have no common scale
    assert said == "rows of one id differ in labeler; add the labeler's column to group_by: a, b"
    rows[1] |= {"q": "another"}
    (_, said, content, _), = grouped(rows, tmp_path, by="id").quarantined
    assert said == "rows of one id have different prompts: 4 rows"
    assert content == rows


def test_a_rank_of_its_own_may_stand_for_a_score(tmp_path: Path) -> None:
    rows = [{"q": "p", "r": "x", "s": 2}, {"q": "p", "r": "y", "s": 1}]
    item = grouped(rows, tmp_path, columns={"prompt": "q", "completion": "r", "rank": "s"}).records[0][1]
    assert dict(zip(item.completions, item.ranks, strict=True)) == {"x": 2, "y": 1}


@pytest.mark.parametrize(("entry", "said"), [
    ({"columns": {"prompt": "q", "user_id": "usr"}}, "column usr: no row has it; there are q, user, l; did you mean"),
    ({"columns": {"prompt": "q"}, "where": {"good": True}}, "column good: no row has it; there are q, user, l"),
    ({"columns": {"prompt": "l[].txt"}}, "column l[].txt: no row has it; l[] has text, x; did you mean text?"),
    ({"columns": {"prompt": ["q", "input"]}}, "column input: no row has it"),
    ({"columns": {"prompt": "no", "user_id": "nor"}}, "column no: no row has it (nor nor)"),
    ({}, "no columns prompt; or messages; there are q, user, l; map them")])
def test_a_column_that_no_row_has_is_named_with_those_that_are_there(entry: dict[str, Any], said: str) -> None:
    made = Entry(files="x", **entry)
    seen = Seen()
    for _ in range(2):  # of several batches
        seen.merge(mapped("ppo", {"q": "a", "user": None, "l": [{"text": "t"}, {"x": 1}]}, **entry).seen)
    with pytest.raises(UserError) as caught:
        check_columns(seen, "ppo", made, "file")
    assert str(caught.value).startswith(f"file: {said}")


def test_a_column_that_some_rows_have_is_there() -> None:
    seen = mapped("ppo", {"q": "a"}, {"q": "b", "u": None}, columns={"prompt": "q", "user_id": "u"}).seen
    check_columns(seen, "ppo", Entry(files="x", columns={"prompt": "q", "user_id": "u"}), "file")


def test_a_table_with_one_column_may_be_separated_by_another_mark() -> None:
    entry = Entry(files="x", columns={"prompt": "q"})
    seen = mapped("ppo", {"q;a": "1;2"}, columns={"prompt": "q"}).seen
    with pytest.raises(UserError, match='they seem to be separated by \';\': write delimiter: ";"'):
        check_columns(seen, "ppo", entry, "file")


@pytest.mark.parametrize(("row", "said"), [
    ({"prompt": "<image> what is it?", "images": ["a.png"]}, "holds an image, in column images"),
    ({"prompt": "what is it?", "image": {"bytes": b"x", "path": None}}, "holds an image, in column image"),
    ({"prompt": "<video> what?", "videos": ["a"]}, "holds a video, in column videos")])
def test_a_row_with_an_image_is_refused_for_it(row: dict[str, Any], said: str) -> None:
    assert reason("ppo", row) == said
    assert reason("rm", Group([row]), group_by="q", columns=SCORED) == said


def test_a_column_named_image_with_a_link_is_no_image_unless_the_text_speaks_of_it() -> None:
    assert record("ppo", {"prompt": "hello", "image": "https://example.org/a.png", "images": None}).prompt == "hello"
    assert record("ppo", {"prompt": "the tag <image> in HTML"}).prompt == "the tag <image> in HTML"


@pytest.mark.parametrize("text", [
    '{"role": "assistant", "content": "yes"}', '[{"from": "human", "value": "hello"}]',
    ' {"messages": [{"role": "user", "content": "hello"}]}', '{"conversations": [{"from": "gpt", "value": "x"}]}'])
def test_messages_that_stand_there_as_text_are_named(text: str) -> None:
    for row in ({"prompt": text, "completion": "yes"}, {"prompt": "hello", "completion": text}):
        assert reason("sft", row).endswith("is a text that holds a list of messages; name its column in json_columns")
    assert record("sft", {"prompt": "Write JSON.", "completion": '{"role": "admin", "name": "x"}'}).completions
    deep = '{"a": ' * 100_000 + "1" + "}" * 100_000
    assert record("sft", {"prompt": "Write JSON.", "completion": deep}).completions == (deep,)


def test_a_use_case_of_all_rows_is_that_of_all_rows() -> None:
    row = {"prompt": "q", "completion": "a", "use_case": "open_qa"}
    assert record("sft", row).use_case == "open_qa"
    assert record("sft", row, use_case="chat").use_case == "chat"
    assert record("sft", row | {"use_case": "poem"}, use_case="chat").use_case == "chat"


def test_a_question_that_reads_as_a_transcript_stays_one_turn_of_the_user() -> None:
    said = "Human: hello\n\nAssistant: hi\n\nHuman: bye"
    found = record("ppo", {"messages": [{"role": "user", "content": said}]})
    assert found.prompt == said
    assert as_prompt(found.prompt) == [{"role": "user", "content": said}]


def test_ids_are_texts_and_whole_floats_are_whole() -> None:
    names = {"prompt": "q", "user_id": "u"}
    assert [record("ppo", {"q": "a", "u": value}, columns=names).user for value in (7, 7.0, "7 ", float("nan"))] == [
        "7", "7", "7", ""]


NAMES = st.sampled_from(["prompt", "messages", "completion", "chosen", "rejected", "completions", "scores", "ranks",
                         "conversations", "conversation_a", "conversation_b", "winner", "turn", "input", "instruction",
                         "output", "history", "response", "helpfulness", "role", "content", "from", "value", "text",
                         "type", "tool_calls", "answers", "answer", "rank", "overall_score", "replies", "images",
                         "system", "preferred_output", "judge", "response_a", "split", "user_id", "category"])
LEAVES = (st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=3) | st.text(max_size=6)
          | st.sampled_from(["user", "assistant", "prompter", "Human: x\n\nAssistant: y", "<extra_id_1>User\n",
                             "<image>", "[1, [", '["a"]', "text", "model_a"]))
THINGS = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
                      max_leaves=16)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(NAMES, THINGS, max_size=8), grouped=st.booleans(), data=st.data())
def test_no_row_whatever_it_holds_stops_the_reading(row: dict[str, Any], grouped: bool, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    role = data.draw(st.sampled_from([name for name in LAYOUT_ROLES[layout] if name != "corpus"]))
    paths = st.sampled_from(["prompt", "messages[0].content", "completions[].text", "scores[]", "history[0][1]", "a.b"])
    entry: dict[str, Any] = {"layout": layout}
    if layout == "columns" and data.draw(st.booleans()):
        fields = [field for field in FIELDS[role] if data.draw(st.booleans())]
        entry["columns"] = {field: data.draw(paths | st.lists(paths, min_size=1, max_size=2)) for field in fields}
        entry["where"] = data.draw(st.dictionaries(paths, LEAVES | st.lists(LEAVES, max_size=2), max_size=1))
    found = mapped(role, Group([row, row]) if grouped else row, **entry)
    for _, item in found.records:
        assert all(isinstance(text, str) for text in (item.prompt, *item.completions, item.user, item.labeler))
        assert len(item.ranks) in (0, len(item.completions))
    for _, said, *_ in found.quarantined:
        assert said


@pytest.mark.parametrize(("row", "fits"), [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "x"}]}, True),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, True),
    ({"messages": [{"role": "user", "content": "q"}]}, True), ({"messages": "text"}, False),
    ({"messages": None}, False),
    ({"messages": [{"role": "user", "content": None}]}, False)])
def test_a_row_whose_content_is_at_fault_fits_its_layout(row: dict[str, Any], fits: bool) -> None:
    """A file of such rows alone is loss; one of which no row fits its layout is a wrong description."""
    (_, _, _, found), = mapped("sft", row).quarantined
    assert found is fits


def test_of_three_or_more_columns_of_answers_some_may_be_empty() -> None:
    """Rankings of two to four answers in one table; an answer without a score, or a score without one, is a fault."""
    names = {"prompt": "q", "completions": ["a", "b", "c"], "scores": ["x", "y", "z"]}
    rows = [{"q": "p", "a": "good", "b": "bad", "c": "ugly", "x": 3, "y": 2, "z": 1},
            {"q": "p", "a": "good", "b": "", "c": "ugly", "x": "3", "y": "", "z": "1"},
            {"q": "p", "a": "good", "b": "bad", "c": None, "x": 2, "y": 3, "z": None},
            {"q": "p", "a": "good", "b": "bad", "c": None, "x": 2, "y": 3, "z": 4},
            {"q": "p", "a": "good", "b": "bad", "c": "ugly", "x": 2, "y": 3, "z": None}]
    found = mapped("rm", *rows, columns=names)
    assert [(item.completions, item.ranks) for _, item in found.records] == [
        (("good", "bad", "ugly"), (1, 2, 3)), (("good", "ugly"), (1, 2)), (("good", "bad"), (2, 1))]
    assert [(number, said) for number, said, *_ in found.quarantined] == [
        (4, "no c"), (5, "scores holds no number: None")]


@pytest.mark.parametrize("role", ["sft", "rm", "ppo"])
def test_messages_that_are_text_are_refused_and_not_read_as_letters(role: str) -> None:
    """As pandas writes a column of messages into CSV; a text that is other JSON stays text."""
    for text in ("[{'role': 'user', 'content': 'Q'}]", '[{"from": "human", "value": "Q"}]'):
        rows = {"sft": {"prompt": text, "completion": "A"}, "ppo": {"prompt": text},
                "rm": {"prompt": "Q", "chosen": text, "rejected": "B"}}
        (_, said, *_), = mapped(role, rows[role]).quarantined
        assert "is a text that holds a list of messages; name its column in json_columns" in said
    for text in ('[{"name": "x"}]', "[{ is how a list begins", "[1, 2]", '[{"a": 1, "a": 2}] is what?'):
        assert record("ppo", {"prompt": text}).prompt == text


def test_ids_are_texts_or_numbers_and_words_for_nothing_are_none() -> None:
    ids = [("jo", "jo"), (17, "17"), (17.0, "17"), ("nan", ""), ("NULL", ""), ("\\N", ""), (None, "")]
    for value, user in ids:
        assert record("ppo", {"prompt": "Q", "user_id": value}).user == user
    for other in ([], ["a"], {"a": 1}, False):
        (_, said, *_), = mapped("ppo", {"prompt": "Q", "user_id": other}).quarantined
        assert said.startswith("user_id is ")


def test_columns_without_a_map_that_contradict_each_other_are_refused() -> None:
    row = {"prompt": "Q", "completions": ["a", "b"], "scores": [2, 1]}
    assert record("rm", row).ranks == (1, 2)
    for more, said in (({"ranks": [2, 1]}, "both ranks and scores are there"),
                       ({"chosen": "b", "rejected": "a"}, "both chosen and completions are there")):
        (_, found, *_), = mapped("rm", row | more).quarantined
        assert said in found
