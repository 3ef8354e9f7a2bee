"""Conversations as sources write them: messages of many kinds, or a transcript, "Human: ...\\n\\nAssistant: ..."."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.curation.tools import ContentError, Turn, answer_turn, call_turn, messages_of_turns
from rlhf.data.prompts import Prompt

ROLES = {"human": "user", "user": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
         "bot": "assistant", "model": "assistant", "chatbot": "assistant", "system": "system", "developer": "system"}
_SPEAKERS = {"Human": "user", "Assistant": "assistant", "System": "system"}  # of a transcript
# Roles of calls of tools and of their answers (OpenAI, ShareGPT, Llama 3.1, Cohere).
TOOL_CALLS = ("function_call", "tool_call", "tool_calls")
TOOL_ANSWERS = ("tool", "function", "observation", "ipython", "tool_response", "tool_result", "tool_results", "tools")
_CALL_KEYS = ("tool_calls", "function_call")
_MEDIA = ("image", "audio", "video", "file", "document")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_TOOL_PARTS = ("tool_use", "tool_result", "tool_call", "function_call", "function_call_output")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):[ \t]*")
_EMPTY_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_LONE_SPACE, _INDENTED = re.compile(r" \S"), re.compile(r"\n[ \t]")

WEIGHT_0 = "the last answer has weight 0, which excludes it from training"
Turns = str | tuple[Turn, ...]  # of a prompt; a text is one turn of the user


def trimmed(text: str) -> str:
    """The text without empty lines before it and white space after it; its first line keeps its indentation.

    One space before a text none of whose other lines is indented separates it from a prompt and goes.
    """
    text = _EMPTY_LINES.sub("", text.replace("\r\n", "\n")).rstrip()
    return text[1:] if _LONE_SPACE.match(text) and not _INDENTED.search(text) else text


def turns_of(messages: Iterable[Mapping[str, Any]], tool_turns: str = "quarantine", fill: bool = False) -> list[Turn]:
    """(role, text) of chat messages with the keys of OpenAI (role, content) or ShareGPT (from, value).

    `tool_turns`: what becomes of calls of tools and their answers: quarantine, drop or keep; `fill`: as in `call_turn`.
    Raises ValueError with the reason for anything else.
    """
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is not an object")
        role = message.get("role") or message.get("from")
        if not isinstance(role, str):
            raise ValueError(f"message {number} has an unknown role: {role!r}")
        speaker, content = role.strip().lower(), _content(message)
        tool = _tool(speaker, message, content)
        if tool and tool_turns == "quarantine":
            raise ContentError(f"message {number} is {tool}; tool_turns: drop leaves such turns out, keep keeps them")
        if tool:
            results, beside = _results(content)
            if tool_turns == "keep" and speaker in TOOL_ANSWERS:
                turns.append(answer_turn(message, content))
            elif tool_turns == "keep":
                turns += [answer_turn(part, part.get("content")) for part in results] or [
                    call_turn(message, content, number, fill)]
            if not beside:
                continue
            content = beside
        if speaker not in ROLES:
            raise ValueError(f"message {number} has an unknown role: {role!r}")
        spoken = ROLES[speaker]
        if spoken == "system" and content is None:
            continue
        text = trimmed(_text(content, number))
        if not text.strip():
            if spoken == "system":
                continue
            raise ContentError(f"message {number} is empty")
        if spoken == "assistant" and message.get("weight") == 0:  # OpenAI: not to be trained on
            turns.append(("said", json.dumps({"content": text, "weight": 0}, ensure_ascii=False)))
        else:
            turns.append((spoken, text if spoken == "assistant" else text.strip()))
    return turns


def _content(message: Mapping[str, Any]) -> Any:
    return next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), None)


def _tool(role: str, message: Mapping[str, Any], content: Any) -> str:
    if role in TOOL_ANSWERS:
        return "the answer of a tool"
    parts = [part.get("type") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    if "tool_result" in parts:
        return "the answer of a tool"
    if role in TOOL_CALLS or any(_filled(message.get(key)) for key in _CALL_KEYS) or set(parts) & {*_TOOL_PARTS}:
        return "a call of a tool"
    return ""


def _results(content: Any) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """(answers of tools among the parts of a message, as Anthropic writes them; what is said beside them)."""
    parts = content if isinstance(content, list) else []
    results = [part for part in parts if isinstance(part, Mapping) and part.get("type") == "tool_result"]
    return results, [part for part in parts if part not in results] if results else []


def _filled(value: Any) -> bool:
    """Whether a call is there: Parquet gives every message the key, and the call without a name."""
    if isinstance(value, Mapping):
        return any(map(_filled, value.values()))
    return bool(value)


def _text(content: Any, number: int) -> str:
    """The text of a message's content: a text, or a list of parts. Raises ValueError."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list) or not content:
        raise ValueError(f"message {number} has no text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = str(part.get("type") or "text") if isinstance(part, Mapping) else type(part).__name__
        medium = next((name for name in _MEDIA if name in kind.lower()), "")
        if medium:
            raise ContentError(f"message {number} holds {'an' if medium[0] in 'ai' else 'a'} {medium}")
        said = (part.get("text") or part.get("refusal")) if kind in _TEXT_PARTS else None
        if not isinstance(said, str):
            raise ContentError(f"message {number} holds a part that is no text: {kind}")
        texts.append(said)
    joined = texts[0]
    for text in texts[1:]:  # a sentence that goes on in the next part is one; else a part is a paragraph
        goes_on = not joined or not text or joined[-1].isspace() or text[0].isspace() or text[0] in ".,;:!?)"
        joined += text if goes_on else f"\n\n{text}"
    return joined


def as_prompt(prompt: Turns) -> Prompt:
    """The turns of a prompt as a row has them: a text, or messages, also of one turn that reads as a transcript."""
    turns: Sequence[Turn] = (("user", prompt),) if isinstance(prompt, str) else prompt
    return prompt if isinstance(prompt, str) and not is_transcript(prompt) else messages_of_turns(turns)


def joined(turns: Sequence[Turn]) -> Turns:
    """The turns, or the text of one turn of the user."""
    return turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else tuple(turns)


def split_text(text: str) -> list[Turn]:
    """The turns of a transcript in the format of hh-rlhf and Nectar.

    Raises ValueError if it is none, ContentError where a turn begins with the mark of another: who says it is unknown.
    """
    text = text.replace("\r\n", "\n").strip()
    if not text.startswith(("Human:", "Assistant:", "System:")):
        raise ValueError("does not begin with a turn, Human: or Assistant:")
    parts = _TURN.split("\n\n" + text)
    turns = [(_SPEAKERS[name], said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=True)]
    if mark := next(filter(None, (_TURN.match(said) for _, said in turns)), None):
        raise ContentError(f"a turn holds the mark of another, {mark.group(1)}:")
    return turns


def transcript_prompt(text: str) -> list[Turn] | None:
    """The turns of a prompt that is written as a transcript, also with an open "Assistant:" at its end; else None.

    Raises ContentError as split_text."""
    try:
        turns = split_text(text)
    except ContentError:
        raise
    except ValueError:
        return None
    if turns[-1] == ("assistant", ""):
        return turns[:-1] if turns[:-1] and turns[-2][0] == "user" else None
    return turns if len(turns) > 1 and turns[-1][0] == "user" else None


def is_transcript(text: str) -> bool:
    """Whether the text reads as a conversation."""
    try:
        return transcript_prompt(text) is not None
    except ContentError:
        return True


def prompt_of(turns: list[Turn]) -> Turns:
    """The prompt of the turns before an answer. Raises ValueError if they do not end with the user."""
    if not any(role == "user" for role, _ in turns):
        raise ContentError("no message of the user before the answer")
    if turns[-1][0] not in ("user", "tool"):
        raise ContentError("the prompt does not end with the user")
    if len(turns) > 1 and (blank := next((place for place, (_, text) in enumerate(turns, 1) if not text.strip()), 0)):
        raise ContentError(f"message {blank} is empty")
    return joined(turns)


def before_answer(turns: list[Turn]) -> tuple[list[Turn], str]:
    """(the turns before the last assistant turn, its text). Raises ValueError if the conversation has none."""
    if turns and turns[-1][0] == "call":
        raise ContentError("the last answer is a call of a tool")
    if turns and turns[-1][0] == "said":
        raise ContentError(WEIGHT_0)
    if not turns or turns[-1][0] != "assistant":
        raise ContentError("does not end with the assistant")
    if not any(role == "user" for role, _ in turns[:-1]):
        raise ContentError("the assistant answers nobody")
    return turns[:-1], turns[-1][1]


def common_beginning(befores: list[list[Turn]]) -> list[Turn]:
    """What conversations that answer differently share. Raises ValueError if they differ before their last answer."""
    if any(before != befores[0] for before in befores[1:]):
        raise ContentError("the conversations differ before their last answer")
    return befores[0]


def with_prompt(prompt: list[Turn], before: list[Turn]) -> list[Turn]:
    """The turns before the answer, where a column holds the prompt and another the conversation, each part once.

    The prompt is the conversation's beginning, one of its questions, or what goes before it. Raises ValueError.
    """
    is_question = len(prompt) == 1 and prompt[0][0] == "user" and prompt[0] in before
    if is_question or prompt == before[:len(prompt)]:
        return before
    if prompt and prompt[-1][0] != "user" and prompt[-1] not in before:
        return [*prompt, *before]
    raise ContentError("the prompt column differs from the conversation")


def with_system(system: str, turns: list[Turn]) -> list[Turn]:
    """The turns with the system's text of a column of its own first. Raises ValueError if they have another one."""
    if not system.strip():
        return turns
    if turns and turns[0][0] == "system":
        if turns[0][1] != system.strip():
            raise ContentError("the system column differs from the conversation's system turn")
        return turns
    return [("system", system.strip()), *turns]
