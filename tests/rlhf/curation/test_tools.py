"""Calls of tools that are kept: every form that people write becomes the one that chat templates take."""

import json
from typing import Any

import pytest

from rlhf.curation.sources.map_rows import map_rows
from rlhf.curation.sources.spec import Entry
from rlhf.curation.tools import messages_of_turns, with_tools
from rlhf.curation.transcripts import turns_of
from rlhf.data.prompts import prompt_problem, prompt_text

FUNCTION = {"name": "weather", "description": "The weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
ASKED: dict[str, Any] = {"role": "user", "content": "Rain in Bonn?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "No rain."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
KEPT: list[dict[str, Any]] = [
    {"role": "system", "content": "", "tools": TOOLS}, ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "dry"}]

OPENAI = [ASKED, {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Bonn"}'}}]},
    {"role": "tool", "content": "dry"}, ANSWER]
OLDER = [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "weather",
                                                                         "arguments": '{"town": "Bonn"}'}},
         {"role": "function", "content": "dry"}, ANSWER]
SHARED = [{"from": "human", "value": ASKED["content"]},
          {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Bonn"}}'},
          {"from": "observation", "value": "dry"}, {"from": "gpt", "value": "No rain."}]
PARQUET = [ASKED | {"tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn", "day": None}}}]},
    {"role": "tool", "content": "dry", "tool_calls": None}, ANSWER | {"tool_calls": []}]
ANTHROPIC = [ASKED, {"role": "assistant", "content": [{"type": "tool_use", "name": "weather",
                                                       "input": {"town": "Bonn"}}]},
             {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "dry"}]}]},
             ANSWER]


def mapped(role: str, row: dict[str, Any], **entry: Any) -> tuple[list[Any], list[str]]:
    found = map_rows(role, Entry(**({"files": "x", "tool_turns": "keep"} | entry)), [1], [row])
    return [record for _, record in found.records], [reason for _, reason, *_ in found.quarantined]


@pytest.mark.parametrize("messages", [OPENAI, OLDER, SHARED, PARQUET, ANTHROPIC])
def test_every_form_of_a_call_becomes_one(messages: list[dict[str, Any]]) -> None:
    kept = messages_of_turns(with_tools(TOOLS, turns_of(messages, "keep", fill=messages is PARQUET)))
    assert kept == [*KEPT, ANSWER]
    assert prompt_problem(kept[:-1]) == ""
    assert prompt_problem(kept[:-2]) == "its last message is not the user's: the answer comes after it"


NAMED_ELSEWISE = {**{key: value for key, value in FUNCTION.items() if key != "parameters"},
                  "input_schema": FUNCTION["parameters"]}  # Anthropic's


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [FUNCTION], [json.dumps(FUNCTION)], [NAMED_ELSEWISE]])
def test_the_row_s_tools_are_in_the_first_message(tools: Any) -> None:
    [record], _ = mapped("sft", {"messages": [{"role": "system", "content": "Be brief."}, *OPENAI], "tools": tools})
    assert record.completions == ("No rain.",)
    assert messages_of_turns(record.turns) == [{**KEPT[0], "content": "Be brief."}, *KEPT[1:]]
    [record], _ = mapped("ppo", {"messages": OPENAI, "t": tools}, columns={"messages": "messages", "tools": "t"})
    assert messages_of_turns(record.turns) == KEPT


def test_only_of_tables_nulls_are_left_out() -> None:
    """In Parquet every object has the keys of all; in JSON a null is what somebody wrote."""
    tools = [{"type": "function", "function": FUNCTION | {"strict": None}}]
    for files, kept in (("x.parquet", False), ("x.jsonl", True)):
        [record], _ = mapped("sft", {"messages": PARQUET, "tools": tools}, files=files)
        first, _, called, _ = messages_of_turns(record.turns)
        assert ("strict" in first["tools"][0]["function"]) is kept
        assert ("day" in called["tool_calls"][0]["function"]["arguments"]) is kept
    call = {"function": {"name": "weather", "arguments": '{"day": null}'}}
    text = [ASKED, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": {"b": 1, "a": [None]}}, ANSWER]
    [record], _ = mapped("sft", {"messages": text, "tools": TOOLS}, files="x.parquet")
    *_, called, answer = messages_of_turns(record.turns)
    assert called["tool_calls"][0]["function"]["arguments"] == {"day": None}
    assert answer["content"] == '{"b": 1, "a": [null]}'


def test_what_a_user_says_beside_a_tool_s_answer_stays() -> None:
    told = [*ANTHROPIC[:2], {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "dry"},
                                                         {"type": "text", "text": "And in French?"}]}, ANSWER]
    [record], _ = mapped("sft", {"messages": told, "tools": TOOLS})
    assert messages_of_turns(record.turns)[-2:] == [{"role": "tool", "content": "dry", "tool_call_id": "c1"},
                                                    {"role": "user", "content": "And in French?"}]
    [record], _ = mapped("sft", {"messages": told}, tool_turns="drop")
    assert messages_of_turns(record.turns) == [ASKED, {"role": "user", "content": "And in French?"}]


def test_an_answer_that_is_not_to_be_trained_on_is_marked_so() -> None:
    row = {"messages": [ASKED, ANSWER | {"weight": 0}, ASKED, ANSWER | {"weight": 1}]}
    [record], _ = mapped("sft", row, tool_turns="quarantine")
    assert messages_of_turns(record.turns) == [ASKED, ANSWER | {"weight": 0}, ASKED]
    assert prompt_problem(messages_of_turns(record.turns)) == ""


def test_layouts_keep_them_too() -> None:
    for tools in ({"tools": TOOLS}, {"functions": [FUNCTION]}):
        [record], _ = mapped("rm", {"input": {"messages": OPENAI[:3], **tools}, "preferred_output": [ANSWER],
                                    "non_preferred_output": [{"role": "assistant", "content": "Rain."}]},
                             layout="openai_messages")
        assert messages_of_turns(record.turns) == KEPT
    [record], _ = mapped("sft", {"conversations": SHARED, "tools": json.dumps(TOOLS)}, layout="sharegpt")
    assert messages_of_turns(record.turns) == KEPT
    [record], _ = mapped("rm", {"input": {"messages": OPENAI[:3]}, "preferred_output": [ANSWER],
                                "non_preferred_output": [{"role": "assistant", "content": "Rain."}], "tools": TOOLS},
                         layout="openai_messages")
    assert (messages_of_turns(record.turns), record.completions) == (KEPT, ("No rain.", "Rain."))


@pytest.mark.parametrize(("row", "said"), [
    ({"messages": OPENAI}, "a tool is called, and the row has no tools"),
    ({"messages": OPENAI, "tools": "[]"}, "a tool is called, and the row has no tools"),
    ({"messages": OPENAI, "tools": "[" * 100_000}, "tools is a text that is no JSON"),
    ({"prompt": "Rain?", "completion": ANSWER | {"weight": 0}}, "the last answer has weight 0"),
    ({"messages": OPENAI, "tools": "[{"}, "tools is a text that is no JSON"),
    ({"messages": OPENAI, "tools": [{"type": "function"}]}, "a tool has no name"),
    ({"messages": OPENAI[:2], "tools": TOOLS}, "the last answer is a call of a tool"),
    ({"messages": [ASKED, {"role": "assistant", "function_call": {"name": "weather", "arguments": "Bonn"}}, ANSWER],
      "tools": TOOLS}, "message 2 calls a tool in a text that is no JSON"),
    ({"messages": [ASKED, {"role": "assistant", "function_call": {"name": "", "arguments": "{}"}, "tool_calls": []},
                   ANSWER], "tools": TOOLS}, "message 2 calls a tool without a name"),
    ({"messages": [ASKED, {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"a": NaN}'}},
                   ANSWER], "tools": TOOLS}, "message 2 calls a tool in a text that is no JSON"),
    ({"messages": [ASKED, {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"a": 1, "a": 2}'}},
                   ANSWER], "tools": TOOLS}, "message 2 calls a tool in a text that is no JSON"),
    ({"messages": [ASKED, {"from": "function_call", "value": "3"}, ANSWER], "tools": TOOLS},
     "message 2 calls a tool in a form that is not known")])
def test_what_cannot_be_kept_is_quarantined(row: dict[str, Any], said: str) -> None:
    records, [reason] = mapped("sft", row)
    assert records == []
    assert reason.startswith(said)


def test_people_see_the_tools_and_the_calls() -> None:
    text = prompt_text(KEPT)
    assert text.startswith(f"System: {json.dumps(TOOLS[0])}\n\nHuman: Rain in Bonn?\n\nAssistant: {{")
    assert text.endswith("\n\nTool: dry")


@pytest.mark.parametrize(("message", "said"), [
    ({"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}, ".tool_calls is no list of"),
    ({"role": "assistant", "content": "", "tool_calls": "weather"}, ".tool_calls is no list of"),
    ({"role": "assistant", "content": "", "tool_calls": []}, ".tool_calls is empty"),
    ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]},
     ".tool_calls has arguments that are no object"),
    ({"role": "assistant", "content": "", "weight": 2}, ".weight is neither 0 nor 1"),
    ({"role": "user", "content": "", "tool_calls": [CALL]}, " has an unknown key: 'tool_calls'"),
    ({"role": "system", "content": "", "tools": TOOLS}, " names tools, which belong into the first message"),
    ({"role": "tool", "content": "", "name": 3}, " has a name or tool_call_id that is no text")])
def test_a_row_whose_tools_cannot_be_read_is_no_prompt(message: dict[str, Any], said: str) -> None:
    assert prompt_problem([ASKED, message, ASKED]).startswith(f"message 2{said}")
