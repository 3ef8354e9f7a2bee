"""A record, which every layout makes of a row, and how the values of a row are read.

All functions raise ValueError with the reason for a value that does not fit; the row is then quarantined.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.curation.sources.paths import Row, as_list, as_number
from rlhf.curation.sources.spec import Entry
from rlhf.curation.tools import with_tools
from rlhf.curation.transcripts import (
    WEIGHT_0,
    ContentError,
    Turn,
    Turns,
    before_answer,
    common_beginning,
    prompt_of,
    transcript_prompt,
    trimmed,
    turns_of,
    with_prompt,
)

_MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
_NULLS = ("nan", "null", "none", "n/a", "na", "<na>", "nat", "\\n")
_LISTED = re.compile(r"\s*(?:\[\s*)?\{")
_PLACEHOLDERS = ("<image>", "<audio>", "<video>")


@dataclass(frozen=True)
class Record:
    """One row of a role before the rules, with the values of the source; "" if it has none.

    `ranks`: 1 is best, equal for ties, dense. `user`: who wrote the prompt; all rows of a user stay on one side of the
    split.
    """

    prompt: Turns
    completions: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    prompt_id: str = ""
    user: str = ""
    labeler: str = ""
    source: str = "customer"
    split: str = ""
    use_case: str = ""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of the prompt, to the one that is answered."""
        return (("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt


@dataclass(frozen=True)
class Group:
    """Rows that make one ranking, in reading order."""

    rows: list[Row]


def dense_ranks(values: Sequence[float]) -> tuple[int, ...]:
    """Ranks 1, 2, ... without gaps, the least value first; equal values share a rank."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return tuple(order[value] for value in values)


def text_of(row: Row, name: str) -> str:
    """The text in a column."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value.replace("\r\n", "\n").strip()


def answer_of(row: Row, name: str) -> str:
    """The text of an answer in a column: it keeps its first indentation."""
    text_of(row, name)
    return trimmed(row[name])


def list_of(value: Any, name: str) -> list[Any]:
    """The items of a list, which in a CSV file is written as text."""
    if value is None:
        raise ValueError(f"no {name}")
    value = as_list(value)
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {type(value).__name__}, not a list")
    return list(value)


def number_of(value: Any, name: str, decimal: str = ".") -> float:
    """A number; true and false are 1 and 0."""
    number = as_number(value, decimal)
    if number is None:
        comma = isinstance(value, str) and as_number(value, ",") is not None
        advice = '; where the comma is a decimal mark write decimal: ","' if comma else ""
        raise ValueError(f"{name} holds no number: {value!r}{advice}")
    return number


def plain(value: Any) -> str:
    """A value as text, "" if there is none."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes ids floats where one is missing
    return str(value).strip()


def same_id(value: Any) -> str:
    """A value to group by as text; 17.0, as pandas writes 17 where a row has none, is 17."""
    text = plain(value)
    return text.removesuffix(".0") if text.removesuffix(".0").isdigit() else text


def id_of(value: Any, name: str) -> str:
    """An id as text, "" if there is none, also where a text says so (nan, NULL). Raises ValueError for a list."""
    if isinstance(value, bool | list | tuple | Mapping):
        raise ValueError(f"{name} is {type(value).__name__}, neither text nor number")
    text = plain(value)
    return "" if text.lower() in _NULLS else text


def source_of(value: Any) -> str:
    """Who wrote the prompt, labeler or customer; customer if the column is empty."""
    name = plain(value).lower() or "customer"
    if name not in ("labeler", "customer"):
        raise ValueError(f"source is neither labeler nor customer: {value!r}")
    return name


def split_of(value: Any) -> str:
    """train or valid, by the usual names of splits; "" if the column is empty."""
    name = plain(value).lower()
    known = {"": "", "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
             "dev": "valid", "test": "valid", "eval": "valid"}
    if name not in known:
        raise ValueError(f"split is neither train nor valid: {value!r}")
    return known[name]


def conversation(value: Any, name: str, entry: Entry) -> list[Turn]:
    """The turns of a list of messages."""
    return turns_of(list_of(value, name), entry.tool_turns, entry.is_table())


def tools_of(tools: Any, turns: list[Turn], entry: Entry) -> list[Turn]:
    """The turns with the row's tools before them, where the description keeps them."""
    return with_tools(tools, turns, entry.is_table()) if entry.tool_turns == "keep" else turns


def check_weight(messages: Any) -> None:
    """Raises ValueError where the last answer is marked as none to train on (OpenAI's `weight: 0`)."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, Mapping) and last.get("weight") == 0:
        raise ContentError(WEIGHT_0)


def check_no_messages(text: str, name: str) -> None:
    """Raises ValueError for a text that is a message or a list of them, as CSV files hold them: it would be read as its
    letters. A text that is other JSON stays as it is.
    """
    if _LISTED.match(text):
        try:
            found = as_list(text) if text.lstrip().startswith("[") else json.loads(text)
        except (ValueError, RecursionError):  # something else in JSON's or numpy's form: a text
            return
        if isinstance(found, Mapping) and found.keys() & {"messages", "conversations"}:
            found = found.get("messages") or found.get("conversations")
        found = [found] if isinstance(found, Mapping) else found
        if found and isinstance(found, list) and all(
                isinstance(item, Mapping) and item.keys() & {"role", "from"} and item.keys() & {
                    "content", "value", "text", "tool_calls", "function_call"} for item in found):
            raise ValueError(f"{name} is a text that holds a list of messages; name its column in json_columns")


def prompt_turns(value: Any, entry: Entry, name: str = "prompt") -> list[Turn]:
    """The turns of a prompt: a text, a list of one text, or messages."""
    if isinstance(value, str):
        check_no_messages(value, name)
        return transcript_prompt(value) or [("user", value.replace("\r\n", "\n").strip())]
    items = list_of(value, name)
    if items and all(isinstance(item, str) for item in items):
        if len(items) > 1:
            raise ValueError(f"{name} is a list of {len(items)} texts; name one of them, such as {name}[0]")
        return transcript_prompt(items[0]) or [("user", items[0].strip())]
    return turns_of(items, entry.tool_turns, entry.is_table())


def answer_turns(value: Any, name: str, entry: Entry) -> tuple[list[Turn] | None, str]:
    """(the turns before it if the value is a whole conversation, else None; the answer)."""
    if isinstance(value, str):
        check_no_messages(value, name)
        return None, trimmed(value)
    if value is None:
        raise ValueError(f"no {name}")
    if not isinstance(value, list | tuple | Mapping):
        raise ValueError(f"{name} is {type(value).__name__}, neither text nor messages")
    items = [value] if isinstance(value, Mapping) else list(value)
    if len(items) == 1 and isinstance(items[0], str):
        return None, trimmed(items[0])
    turns = turns_of(items, entry.tool_turns, entry.is_table())
    if len(turns) == 1 and turns[0][0] == "assistant":
        return None, turns[0][1]
    before, answer = before_answer(turns)
    return before, answer


def compared(prompt: list[Turn] | None, answers: Sequence[tuple[list[Turn] | None, str]], name: str
             ) -> tuple[list[Turn], tuple[str, ...]]:
    """(the turns before the answers, the answers), of texts or of whole conversations, whose beginning is the prompt.

    `name`: what is said to be absent where neither has a prompt.
    """
    befores = [before for before, _ in answers if before is not None]
    texts = tuple(text for _, text in answers)
    if befores and len(befores) < len(answers):
        raise ValueError("some completions are conversations, others are not")
    if not befores:
        if prompt is None:
            raise ValueError(f"no {name}")
        return prompt, texts
    before = common_beginning(befores)
    return with_prompt(prompt, before) if prompt is not None else before, texts


def conversation_record(turns: list[Turn], role: str, **values: Any) -> Record:
    """The record of a whole conversation: its last assistant turn is the completion, which PPO leaves out."""
    if role == "ppo":
        turns = list(turns)
        while turns and turns[-1][0] in ("assistant", "call", "said"):
            turns.pop()
        if not turns:
            raise ContentError("no message of the user")
        return Record(prompt_of(turns), **values)
    before, answer = before_answer(turns)
    return Record(prompt_of(before), (answer,), **values)


def check_media(row: Row) -> None:
    """Raises ValueError for a row with images, audio or video in a column of their own, which its text speaks of."""
    for name in _MEDIA_COLUMNS:
        value = row.get(name)
        if not value:
            continue
        medium = name.removesuffix("s")
        parts = value if isinstance(value, list) else [value]
        stored = any(isinstance(part, Mapping | bytes) for part in parts)
        if stored or any(mark in str(item) for key, item in row.items() if key != name for mark in _PLACEHOLDERS):
            raise ContentError(f"holds {'an' if medium[0] in 'ai' else 'a'} {medium}, in column {name}")
