"""Calls of tools and their answers in conversations that keep them, in the form that chat templates take.

A message of a row may have, beside role and content: `tools` (the first one, the system's), the functions that may be
called, in JSON Schema; `tool_calls` (the assistant's), OpenAI's, with arguments as objects; `name` and `tool_call_id`
(a tool's). Among the turns of a source they are the roles `tools`, `call` and `tool`, whose text is JSON; so is that of
`said`, an answer with OpenAI's `weight` 0.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.files import unique_keys

# Role (system, user, assistant, or one of a tool) and text.
Turn = tuple[str, str]


class ContentError(ValueError):
    """A row that fits its layout, and cannot be used for what it says: its reason. Other rows of its file may do."""


def answer_turn(message: Mapping[str, Any], content: Any) -> Turn:
    """The turn of a tool's answer: its text, or what is no text as JSON."""
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    text = content if isinstance(content, str) else "\n\n".join(texts) if parts and len(texts) == len(parts) else \
        _json(content)
    ids = {"name": message.get("name"), "tool_call_id": message.get("tool_call_id") or message.get("tool_use_id")}
    return "tool", _json({"content": text, **{key: value for key, value in ids.items() if isinstance(value, str)}})


def call_turn(message: Mapping[str, Any], content: Any, number: int, fill: bool = False) -> Turn:
    """The turn of a call of tools, of OpenAI's, ShareGPT's or Anthropic's form.

    `fill`: arguments that are null are absent, as in tables, where every row has the keys of all. Raises ValueError
    where a call has no name, or arguments that are no JSON object.
    """
    calls, said = _calls(message, content, number)
    found = []
    for call in calls:
        named = call.get("function") if isinstance(call.get("function"), Mapping) else call
        name = named.get("name")
        given = [named[key] for key in ("arguments", "input", "parameters") if named.get(key) is not None]
        arguments: Any = given[0] if given else {}
        if isinstance(arguments, str):
            arguments = _read(arguments or "{}", number)
        elif fill:
            arguments = _without_nulls(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
            raise ContentError(f"message {number} calls a tool without a name, or with arguments that are no object")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**own, "type": "function", "function": {"name": name, "arguments": arguments}})
    return "call", _json({"content": said, "tool_calls": found})


def _calls(message: Mapping[str, Any], content: Any, number: int) -> tuple[Sequence[Any], str]:
    """The calls of a message, and what it says beside them."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        parts = [part for part in content if isinstance(part, Mapping) and part.get("name")]
        if parts:
            return parts, "\n\n".join(texts)
        content = "\n\n".join(texts)
    for key in ("tool_calls", "function_call"):
        calls = message.get(key)
        if isinstance(calls, str):
            calls = _read(calls, number)
        if calls:
            return _objects(calls, number), content if isinstance(content, str) else ""
    return _objects(_read(content, number), number), ""  # ShareGPT's value


def _objects(calls: Any, number: int) -> Sequence[Mapping[str, Any]]:
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise ContentError(f"message {number} calls a tool in a form that is not known")
    return calls


def _read(text: Any, number: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (TypeError, ValueError, RecursionError):
        raise ContentError(f"message {number} calls a tool in a text that is no JSON") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the keys of all objects of its column, most of them null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def with_tools(tools: Any, turns: list[Turn], fill: bool = False) -> list[Turn]:
    """The turns with the tools of the row first; `fill`: without their keys that are null.

    Raises ValueError where tools are called and the row names none.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError):
            raise ContentError("tools is a text that is no JSON") from None
    listed = isinstance(tools, Iterable) and not isinstance(tools, Mapping)
    found = [_function(tool, fill) for tool in tools] if listed else []
    used = any(role in ("call", "tool") for role, _ in turns)
    if used and not found:
        raise ContentError("a tool is called, and the row has no tools")
    return [("tools", _json(found)), *turns] if found else turns


def _function(tool: Any, fill: bool) -> dict[str, Any]:
    if isinstance(tool, str):
        try:
            tool = json.loads(tool)
        except (ValueError, RecursionError):
            raise ContentError("a tool is a text that is no JSON") from None
    function = tool.get("function") if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping) else tool
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ContentError("a tool has no name")
    kept = _without_nulls(function) if fill else dict(function)
    if "input_schema" in kept:  # Anthropic's name
        kept["parameters"] = kept.pop("input_schema")
    return {"type": "function", "function": kept}


def messages_of_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages of a row, of the turns of a source."""
    messages: list[dict[str, Any]] = []
    tools: list[Any] = []
    for role, text in turns:
        if role == "tools":
            tools = json.loads(text)
        elif role in ("call", "said", "tool"):
            messages.append({"role": "tool" if role == "tool" else "assistant", **json.loads(text)})
        else:
            messages.append({"role": role, "content": text})
    if tools:
        first = messages.pop(0) if messages and messages[0]["role"] == "system" else {"role": "system", "content": ""}
        messages.insert(0, {**first, "tools": tools})
    return messages


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
