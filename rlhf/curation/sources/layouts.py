"""How the rows of each known dataset become records: one function per layout.

A function yields records; for a row that does not fit it raises ValueError with the reason, and the row is quarantined.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.curation.sources.spec import Entry
from rlhf.curation.transcripts import Turn, as_text, split_text, turns_of
from rlhf.data.schema import USE_CASE_PERCENT

Row = Mapping[str, Any]

FIELDS = {
    "sft": ("prompt", "messages", "completion"),
    "rm": ("prompt", "messages", "completions", "ranks", "scores", "chosen", "rejected", "labeler_id"),
    "ppo": ("prompt", "messages"),
    "corpus": ("text",),
}
COMMON_FIELDS = ("prompt_id", "user_id", "source", "split", "use_case")

USE_CASES = {
    "dolly": {"closed_qa": "closed_qa", "open_qa": "open_qa", "general_qa": "open_qa",
              "classification": "classification", "brainstorming": "brainstorming", "summarization": "summarization",
              "information_extraction": "extract", "creative_writing": "generation"},
    "no_robots": {"Generation": "generation", "Open QA": "open_qa", "Brainstorm": "brainstorming", "Chat": "chat",
                  "Rewrite": "rewrite", "Summarize": "summarization", "Classify": "classification",
                  "Closed QA": "closed_qa", "Extract": "extract", "Coding": "other"},
}


@dataclass(frozen=True)
class Record:
    """One row of a role before the rules, with the values of the source; "" if it has none.

    `ranks`: 1 is best, equal for ties, dense. `user`: who wrote the prompt; all rows of a user stay on one side of the
    split.
    """

    prompt: str
    completions: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    prompt_id: str = ""
    user: str = ""
    labeler: str = ""
    source: str = "customer"
    split: str = ""
    use_case: str = ""


def dense_ranks(values: Sequence[float]) -> tuple[int, ...]:
    """Ranks 1, 2, ... without gaps, the least value first; equal values share a rank."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return tuple(order[value] for value in values)


def text_of(row: Row, name: str) -> str:
    """The text in a column. Raises ValueError if there is none."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value.strip()


def dolly(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """databricks-dolly-15k: instruction, context, response, category."""
    context = text_of(row, "context") if row.get("context") else ""
    instruction = text_of(row, "instruction")
    prompt = f"{instruction}\n\n{context}" if context else instruction
    completions = (text_of(row, "response"),) if role == "sft" else ()
    yield Record(prompt, completions, source="labeler",
                 use_case=USE_CASES["dolly"].get(str(row.get("category")), "other"))


def no_robots(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """HuggingFaceH4/no_robots: messages (system, user, assistant, ...), category, prompt_id."""
    turns = turns_of(_list(row.get("messages"), "messages"))
    prompt, completion = _last_answer(turns)
    yield Record(prompt, (completion,) if role == "sft" else (), source="labeler",
                 use_case=USE_CASES["no_robots"].get(str(row.get("category")), "other"))


INSTRUCTION, RESPONSE = "### Instruction:\n", "\n\n### Response:"


def dolly_hhrlhf(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """mosaicml/dolly_hhrlhf: prompt in a fixed template of instruction and response, response."""
    text = text_of(row, "prompt")
    start, end = text.find(INSTRUCTION), text.rfind(RESPONSE)
    if start < 0 or end < start:
        raise ValueError("the prompt lacks its frame of ### Instruction: and ### Response:")
    prompt = text[start + len(INSTRUCTION):end].strip()
    yield Record(prompt, (text_of(row, "response"),) if role == "sft" else ())


def nectar(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """berkeley-nest/Nectar: prompt as a transcript that ends with Assistant:, answers as {answer, model, rank}."""
    prompt = _transcript_prompt(text_of(row, "prompt"))
    if role == "ppo":
        yield Record(prompt)
        return
    answers = row.get("answers")
    if not isinstance(answers, Sequence) or not answers:
        raise ValueError("no answers")
    texts = tuple(text_of(answer, "answer") for answer in answers)
    yield Record(prompt, texts, dense_ranks([_number(answer.get("rank"), "rank") for answer in answers]),
                 labeler="gpt-4")


def hh_rlhf(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """Anthropic/hh-rlhf: two transcripts, chosen and rejected, that differ in the last assistant turn."""
    (prompt, chosen), (other, rejected) = (_last_answer(split_text(text_of(row, name)))
                                           for name in ("chosen", "rejected"))
    if role == "ppo":
        yield Record(prompt)
        return
    if prompt != other:
        raise ValueError("chosen and rejected differ before their last answer")
    yield Record(prompt, (chosen, rejected), (1, 2), labeler="hh-rlhf")


def oasst_trees(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """OpenAssistant reply trees: {prompt: {text, role, replies: [...]}}, or the root message itself.

    RM: each prompter message with two or more ranked replies (rank 0 is best). SFT: its best reply. PPO: each prompter
    message. A tree belongs to the user of its root message.
    """
    root = row.get("prompt", row)
    if not isinstance(root, Mapping):
        raise ValueError("no prompt message")
    user = str(root.get("user_id") or "")

    def walk(message: Mapping[str, Any], before: list[Turn]) -> Iterator[Record]:
        if message.get("deleted"):
            return
        spoken = "Human" if message.get("role") == "prompter" else "Assistant"
        turns = [*before, (spoken, text_of(message, "text"))]
        replies = [item for item in message.get("replies") or [] if not item.get("deleted")]
        if spoken == "Human":
            prompt = as_text(turns)
            case = "chat" if len(turns) > 1 else ""
            ranked = sorted((item for item in replies if item.get("rank") is not None), key=lambda item: item["rank"])
            texts = tuple(text_of(item, "text") for item in ranked)
            if role == "ppo":
                yield Record(prompt, user=user, use_case=case)
            elif role == "sft" and ranked:
                yield Record(prompt, texts[:1], user=user, use_case=case)
            elif role == "rm" and len(ranked) > 1:
                yield Record(prompt, texts, dense_ranks([float(item["rank"]) for item in ranked]), user=user,
                             labeler="oasst", use_case=case)
        for reply in replies:
            yield from walk(reply, turns)

    yield from walk(root, [])


def columns(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """Any table, by the entry's column map; the fields are those of FIELDS and COMMON_FIELDS."""
    named = entry.columns or {field: field for field in (*FIELDS[role], *COMMON_FIELDS) if row.get(field) is not None}

    def value(field: str) -> Any:
        return _at(row, named[field]) if field in named else None

    prompt, completions, ranks = _prompt_and_answers(role, value)
    case = str(value("use_case") or entry.use_case)
    labeler = "" if value("labeler_id") is None else str(value("labeler_id"))
    yield Record(
        prompt, completions, ranks, prompt_id=_plain(value("prompt_id")), user=_plain(value("user_id")),
        labeler=labeler, source=_plain(value("source")) or "customer", split=_split(value("split")),
        use_case=entry.use_cases.get(case, case if case in USE_CASE_PERCENT else "other") if case else "")


def _prompt_and_answers(role: str, value: Callable[[str], Any]) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """(prompt, completions, ranks) from the mapped columns. Raises ValueError."""
    prompt = value("prompt")
    before: str | None = None if prompt is None else _as_prompt(prompt)
    if value("messages") is not None:
        turns = turns_of(_list(value("messages"), "messages"))
        if role != "ppo":
            before, answer = _last_answer(turns)
            return before, (answer,), ()
        while turns and turns[-1][0] == "Assistant":
            turns.pop()
        before = as_text(turns) if turns else ""
    if role == "sft":
        return _needed(before), (_answer(value("completion"), "completion")[1],), ()
    if role == "ppo":
        return _needed(before), (), ()
    if value("chosen") is not None or value("rejected") is not None:
        (own, chosen), (_, rejected) = (_answer(value(name), name) for name in ("chosen", "rejected"))
        return _needed(before or own), (chosen, rejected), (1, 2)
    texts = tuple(_answer(item, "completions")[1] for item in _list(value("completions"), "completions"))
    if value("ranks") is not None:
        order = [_number(item, "ranks") for item in _list(value("ranks"), "ranks")]
    else:
        order = [-_number(item, "scores") for item in _list(value("scores"), "scores")]
    if len(order) != len(texts):
        raise ValueError(f"{len(texts)} completions, {len(order)} ranks or scores")
    return _needed(before), texts, dense_ranks(order)


def _needed(prompt: str | None) -> str:
    if prompt is None:
        raise ValueError("no prompt")
    return prompt


def _as_prompt(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    return as_text(turns_of(_list(value, "prompt")))


def _answer(value: Any, name: str) -> tuple[str | None, str]:
    """(the prompt if the value is a conversation, else None; the answer). Raises ValueError."""
    if isinstance(value, str):
        return None, value.strip()
    if value is None:
        raise ValueError(f"no {name}")
    if isinstance(value, Mapping):
        return None, turns_of([value])[0][1]
    turns = turns_of(_list(value, name))
    if len(turns) == 1:
        return None, turns[0][1]
    return _last_answer(turns)


def _list(value: Any, name: str) -> list[Any]:
    if value is None:
        raise ValueError(f"no {name}")
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {type(value).__name__}, not a list")
    return list(value)


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} holds {value!r}, not a number") from None
    if number != number:
        raise ValueError(f"{name} holds NaN")
    return number


def _plain(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _split(value: Any) -> str:
    """train or valid, by the usual names of splits; "" if the column is empty."""
    name = _plain(value).lower()
    known = {"": "", "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
             "dev": "valid", "test": "valid", "eval": "valid"}
    if name not in known:
        raise ValueError(f"split is {value!r}, neither train nor valid")
    return known[name]


def _last_answer(turns: list[Turn]) -> tuple[str, str]:
    """(prompt, the last assistant turn). Raises ValueError."""
    if not turns or turns[-1][0] != "Assistant":
        raise ValueError("does not end with the assistant")
    before = turns[:-1]
    if not any(role == "Human" for role, _ in before):
        raise ValueError("the assistant answers nobody")
    return as_text(before), turns[-1][1]


def _transcript_prompt(text: str) -> str:
    turns = split_text(text)
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    if not turns or turns[-1][0] != "Human":
        raise ValueError("the prompt does not end with the human")
    return as_text(turns)


def _at(row: Row, path: str) -> Any:
    """The value at a.b.c, or None. A column whose name contains the dots takes precedence."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def wanted(row: Row, entry: Entry) -> bool:
    """Whether the row has the values in the entry's `where`."""
    return all(str(_at(row, path)) == value for path, value in entry.where.items())


Layout = Callable[[Row, str, Entry], Iterator[Record]]

LAYOUTS: dict[str, Layout] = {"columns": columns, "dolly": dolly, "no_robots": no_robots, "dolly_hhrlhf": dolly_hhrlhf,
                              "nectar": nectar, "oasst_trees": oasst_trees, "oasst_messages": oasst_trees,
                              "hh_rlhf": hh_rlhf}
LAYOUT_ROLES = {"columns": ("sft", "rm", "ppo", "corpus"), "dolly": ("sft", "ppo"), "no_robots": ("sft", "ppo"),
                "dolly_hhrlhf": ("sft", "ppo"), "nectar": ("rm", "ppo"), "oasst_trees": ("sft", "rm", "ppo"),
                "oasst_messages": ("sft", "rm", "ppo"), "hh_rlhf": ("rm", "ppo")}
