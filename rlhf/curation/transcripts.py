"""Conversations as text: one turn is only its text, several are "Human: ...\\n\\nAssistant: ...\\n\\nHuman: ..."."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

ROLES = {"human": "Human", "user": "Human", "prompter": "Human", "assistant": "Assistant", "gpt": "Assistant",
         "bot": "Assistant", "model": "Assistant", "chatbot": "Assistant", "system": "System"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):[ \t]*")

Turn = tuple[str, str]


def turns_of(messages: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """(role, text) of chat messages with the keys of OpenAI (role, content) or ShareGPT (from, value).

    Raises ValueError with the reason for anything else.
    """
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is not an object")
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value", message.get("text")))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise ValueError(f"message {number} has the unknown role {role!r}")
        if not isinstance(text, str):
            raise ValueError(f"message {number} has no text")
        turns.append((ROLES[role.lower()], text.strip()))
    return turns


def as_text(turns: list[Turn]) -> str:
    """The prompt of the turns. Raises ValueError if a text contains a turn mark, which would add a turn."""
    if len(turns) == 1:
        return turns[0][1]
    for _, text in turns:
        mark = _TURN.search("\n\n" + text)
        if mark:
            raise ValueError(f"a message holds the mark of a turn, {mark.group(1)}:")
    return "\n\n".join(f"{role}: {text}" for role, text in turns)


def split_text(text: str) -> list[Turn]:
    """The turns of a transcript in the format of hh-rlhf and Nectar. Raises ValueError if it is none."""
    parts = _TURN.split("\n\n" + text.strip())
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("does not begin with a turn, Human: or Assistant:")
    return [(role, said.strip()) for role, said in zip(parts[1::2], parts[2::2], strict=True)]


def first_said(prompt: str) -> str:
    """The human's first message, which all prompts of one conversation share."""
    if not _TURN.match(prompt):
        return prompt
    return next((text for role, text in split_text(prompt) if role == "Human"), prompt)
