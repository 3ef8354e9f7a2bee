"""A prompt: a text, which is one turn of the user, or a conversation, a list of messages that ends before the answer.

Rows hold it as it is. Where a text is needed (for people, to compare prompts, as a key) these functions make one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

ROLES = ("system", "user", "assistant", "tool")
KEYS = {"system": ("tools",), "user": (), "assistant": ("tool_calls", "weight"), "tool": ("name", "tool_call_id")}
NAMES = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}


def prompt_text(prompt: Prompt) -> str:
    """The prompt as people read it: a text as it is, a conversation as "Human: ...", "Assistant: ..." in paragraphs."""
    if isinstance(prompt, str):
        return prompt
    if is_one_turn(prompt):
        return str(prompt[0]["content"])
    return "\n\n".join(f"{NAMES[message['role']]}: {message_text(message)}" for message in prompt)


def is_one_turn(prompt: Sequence[Message]) -> bool:
    return len(prompt) == 1 and prompt[0]["role"] == "user"


def message_text(message: Message) -> str:
    """A message as people read it, with the tools that it names or calls."""
    lines = [json.dumps(item, ensure_ascii=False) for key in ("tools", "tool_calls") for item in message.get(key, ())]
    return "\n".join([*filter(None, [message["content"]]), *lines])


def prompt_key(prompt: Prompt) -> str:
    """A text that is equal for equal prompts only; a conversation of one turn is equal to its text."""
    if isinstance(prompt, str):
        return prompt
    if is_one_turn(prompt):
        return str(prompt[0]["content"])
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def prompt_texts(prompt: Prompt) -> list[str]:
    """The texts of its turns."""
    return [prompt] if isinstance(prompt, str) else [message_text(message) for message in prompt]


def answers_in(prompt: Prompt) -> int:
    """The number of earlier answers in it that may be trained on: those to somebody, and not of weight 0."""
    return 0 if isinstance(prompt, str) else sum(
        message["role"] == "assistant" and message.get("weight") != 0 for message in prompt[1:])


def users_text(prompt: Prompt) -> str:
    """What the user says in it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message["content"]) for message in prompt if message["role"] == "user")


def prompt_problem(prompt: Any) -> str:
    """Why a value of a row is no prompt, or ""."""
    if isinstance(prompt, str):
        return ""
    if not isinstance(prompt, list):
        return "neither text nor a list of messages"
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"message {number} has no content that is text"
        role = message.get("role")
        if role not in ROLES:
            return f"message {number} has an unknown role: {role!r}"
        if unknown := [key for key in message if key not in ("role", "content", *KEYS[role])]:
            return f"message {number} has an unknown key: {unknown[0]!r}"
        if problem := _tool_problem(message):
            return f"message {number}{problem}"
        if "tools" in message and number > 1:
            return f"message {number} names tools, which belong into the first message"
    roles = [message["role"] for message in prompt]
    if "user" not in roles:
        return "no message is the user's"
    if roles[-1] not in ("user", "tool"):
        return "its last message is not the user's: the answer comes after it"
    return ""


def _tool_problem(message: Message) -> str:
    for key in ("tools", "tool_calls"):
        for item in message.get(key, ()) if isinstance(message.get(key, ()), list | tuple) else [None]:
            function = item.get("function") if isinstance(item, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                return f".{key} is no list of {{type: function, function: {{name, ...}}}}"
            if key == "tool_calls" and not isinstance(function.get("arguments"), Mapping):
                return f".{key} has arguments that are no object"
        if key in message and not message[key]:
            return f".{key} is empty"
    if message.get("weight", 1) not in (0, 1):
        return ".weight is neither 0 nor 1"
    if any(not isinstance(message.get(key, ""), str) for key in KEYS["tool"]):
        return " has a name or tool_call_id that is no text"
    return ""
