"""The layout `columns`: any table, by the column map of its entry, one row or a group of rows for each record."""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

from rlhf.curation.sources.paths import Row, as_list, same, value_at
from rlhf.curation.sources.records import (
    Group,
    Record,
    answer_turns,
    check_weight,
    compared,
    conversation,
    conversation_record,
    dense_ranks,
    id_of,
    list_of,
    number_of,
    plain,
    prompt_turns,
    source_of,
    split_of,
    tools_of,
)
from rlhf.curation.sources.spec import Entry
from rlhf.curation.transcripts import ContentError, Turn, before_answer, prompt_of, split_text, trimmed, with_system
from rlhf.data.schema import USE_CASE_PERCENT

FIELDS = {
    "sft": ("prompt", "messages", "completion", "system", "tools"),
    "rm": ("prompt", "completions", "ranks", "scores", "chosen", "rejected", "completion", "score", "rank", "system",
           "tools", "labeler_id"),
    "ppo": ("prompt", "messages", "system", "tools"),
    "corpus": ("text",),
}
COMMON_FIELDS = ("prompt_id", "user_id", "source", "split", "use_case")
# The fields of which a map must have one set.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "rm": (("chosen", "rejected"), ("completions", "ranks"), ("completions", "scores")),
    "ppo": (("prompt",), ("messages",)),
    "corpus": (("text",),),
}
GROUPED = (("prompt", "completion", "score"), ("prompt", "completion", "rank"))
VOTED = (("completions",),)
OF_ANSWERS = ("completions", "scores", "ranks")

Value = Callable[[str], Any]


def needed(role: str, entry: Entry) -> tuple[tuple[str, ...], ...]:
    """The sets of fields of which an entry's map must have one."""
    if role == "rm" and entry.group_by:
        return GROUPED
    return VOTED if role == "rm" and entry.preference else NEEDED[role]


def columns(row: Row | Group, role: str, entry: Entry) -> Iterator[Record]:
    """Any table, by the entry's column map; the fields are those of FIELDS and COMMON_FIELDS."""
    if isinstance(row, Group):
        yield _of_group(row, entry)
        return
    if entry.groups():
        raise ValueError(f"no {', '.join(entry.groups())}")
    value = _values(row, role, entry)
    def framed(turns: list[Turn]) -> list[Turn]:
        return tools_of(value("tools"), with_system(text_or_nothing(value("system"), "system"), turns), entry)

    values = _common(value, entry)
    if role != "rm" and value("messages") is not None:
        if role == "sft":
            check_weight(as_list(value("messages")))
        yield conversation_record(framed(conversation(value("messages"), "messages", entry)), role, **values)
        return
    prompt = _prompt(value, entry)
    if role == "rm":
        answers = _answers(value, entry)
        if all(before is None for before, _ in answers):
            transcripts = [_transcript(text, prompt is None) for _, text in answers]
            if prompt is None or all(before is not None for before, _ in transcripts):
                answers = transcripts
        turns, texts = compared(prompt, answers, "prompt")
        yield Record(prompt_of(framed(turns)), texts, _ranks(value, row, entry, len(texts)), **values)
        return
    if prompt is None:
        raise ValueError("no prompt")
    completions: tuple[str, ...] = ()
    if role == "sft":
        prompt, completions = compared(prompt, [answer_turns(value("completion"), "completion", entry)], "prompt")
    yield Record(prompt_of(framed(prompt)), completions, **values)


def _values(row: Row, role: str, entry: Entry) -> Value:
    """The value of a field: of its columns, or without a map of the column with its name."""
    if not entry.columns:
        known = (*FIELDS[role], *COMMON_FIELDS)
        return lambda field: row.get(field) if field in known else None

    def value(field: str) -> Any:
        mapped = entry.columns.get(field)
        if mapped is None:
            return None
        if isinstance(mapped, str):
            return value_at(row, mapped)
        found = [(path, value_at(row, path)) for path in mapped]
        if field in OF_ANSWERS:
            gone = _absent_answers(row, entry)
            return [item for place, (_, item) in enumerate(found) if place not in gone]
        return _joined(found)

    return value


def _absent_answers(row: Row, entry: Entry) -> set[int]:
    """Of three or more columns of answers, the places where a row has none: no text, and no score or rank."""
    lists = [entry.columns[field] for field in OF_ANSWERS if field in entry.columns]
    if len(lists) < 2 or any(isinstance(names, str) or len(names) < 3 for names in lists):
        return set()
    return {place for place, paths in enumerate(zip(*lists, strict=True))
            if all(plain(value_at(row, path)) == "" for path in paths)}


def _joined(found: Sequence[tuple[str, Any]]) -> str | None:
    """Texts of several columns, joined by an empty line; those that are empty or absent are left out."""
    texts = []
    for path, item in found:
        text = text_or_nothing(item, path)
        texts += [text] if text else []
    return "\n\n".join(texts) or None


def text_or_nothing(value: Any, name: str) -> str:
    """A text without blanks around it, "" if there is none. Raises ValueError for anything else."""
    if value is None or value != value:
        return ""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value.replace("\r\n", "\n").strip()


def _prompt(value: Value, entry: Entry) -> list[Turn] | None:
    found = value("prompt")
    return None if found is None else prompt_turns(found, entry)


def _common(value: Value, entry: Entry) -> dict[str, Any]:
    case = plain(value("use_case"))
    if entry.use_case:
        case = entry.use_case
    elif case and case not in entry.use_cases and case not in USE_CASE_PERCENT:
        raise ValueError(f"use_case is none of the ten, nor in the description's use_cases: {case}")
    return {"prompt_id": id_of(value("prompt_id"), "prompt_id"), "user": id_of(value("user_id"), "user_id"),
            "labeler": id_of(value("labeler_id"), "labeler_id"), "source": source_of(value("source")),
            "split": split_of(value("split")), "use_case": entry.use_cases.get(case, case)}


def _answers(value: Value, entry: Entry) -> list[tuple[list[Turn] | None, str]]:
    """The completions of a row, of a pair or of a list. Raises ValueError where columns without a map say both."""
    if not entry.columns:
        for one, other in (("chosen", "completions"), ("ranks", "scores")):
            if value(one) is not None and value(other) is not None:
                raise ValueError(f"both {one} and {other} are there; say with columns which counts")
    if "completions" not in entry.columns and (value("chosen") is not None or value("rejected") is not None):
        return [answer_turns(value(name), name, entry) for name in ("chosen", "rejected")]
    names = entry.columns.get("completions")
    items = list_of(value("completions"), "completions")
    labels = names if isinstance(names, list) and len(names) == len(items) else ["completions"] * len(items)
    return [answer_turns(item, label, entry) for item, label in zip(items, labels, strict=True)]


def _transcript(text: str, needed: bool) -> tuple[list[Turn] | None, str]:
    """The turns of a text that is a whole conversation, as hh-rlhf writes them.

    `needed`: raises ContentError for a conversation that cannot be used.
    """
    try:
        return before_answer(split_text(text))
    except ValueError as error:
        if needed and isinstance(error, ContentError):
            raise
        return None, text


def _ranks(value: Value, row: Row, entry: Entry, count: int) -> tuple[int, ...]:
    """The ranks of `count` completions: of a pair, a vote, ranks or scores."""
    if entry.preference:
        return _vote(row, entry, count)
    if "completions" not in entry.columns and value("chosen") is not None:
        return 1, 2
    name, sign = ("ranks", 1) if value("ranks") is not None else ("scores", -1)
    order = [sign * number_of(item, name, entry.decimal) for item in list_of(value(name), name)]
    if len(order) != count:
        raise ValueError(f"{count} completions, {len(order)} ranks or scores")
    return dense_ranks(order)


def _vote(row: Row, entry: Entry, count: int) -> tuple[int, ...]:
    if count != 2:
        raise ValueError(f"{count} completions, a vote needs 2")
    said = value_at(row, str(entry.preference["column"]))
    found = [name for name in ("first", "second", "tie") if name in entry.preference
             and same(said, entry.preference[name])]
    if len(found) != 1:
        what = f"fits {' and '.join(found)}" if found else "is none of the preference's values"
        raise ValueError(f"the vote {what}: {said!r}")
    return {"first": (1, 2), "second": (2, 1), "tie": (1, 1)}[found[0]]


def _of_group(group: Group, entry: Entry) -> Record:
    """The ranking of rows with a response each. Its order does not depend on the order of the rows."""
    answers, order, common, prompts = [], [], [], []
    sign, name = (-1, "score") if "rank" not in entry.columns else (1, "rank")
    for row in group.rows:
        value = _values(row, "rm", entry)
        system = text_or_nothing(value("system"), "system")
        before, text = answer_turns(value("completion"), "completion", entry)
        turns, _ = compared(_prompt(value, entry), [(before, text)], "prompt")
        prompts.append(prompt_of(tools_of(value("tools"), with_system(system, turns), entry)))
        answers.append(text)
        order.append(sign * number_of(value(name), name, entry.decimal))
        common.append(_common(value, entry))
    if len(set(prompts)) > 1:
        raise ContentError(f"rows of one {' and '.join(entry.groups())} have different prompts: {len(group.rows)} rows")
    values = {key: _shared(key, [item[key] for item in common], entry) for key in common[0]}
    shuffled = sorted(zip(answers, order, strict=True),
                      key=lambda item: (blake2b(item[0].encode("utf-8", "surrogatepass")).digest(), item[1]))
    texts, sorted_order = zip(*shuffled, strict=True)
    return Record(prompts[0], texts, dense_ranks(sorted_order), **values)


def _shared(key: str, values: list[str], entry: Entry) -> str:
    """What the rows of a group share. Raises ValueError where they differ: scores of two labelers have no scale."""
    found = sorted(set(values))
    if len(found) > 1:
        advice = "; add the labeler's column to group_by" if key == "labeler" else ""
        raise ValueError(f"rows of one {' and '.join(entry.groups())} differ in {key}{advice}: {found[0]}, {found[1]}")
    return found[0]


def read_json_columns(row: Row, entry: Entry) -> Row:
    """The row with the texts of `json_columns` read. Raises ValueError for one that is no JSON."""
    if not entry.json_columns:
        return row
    changed = dict(row)
    for name in entry.json_columns:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            changed[name] = as_list(value)
            if isinstance(changed[name], str):
                raise ValueError(f"{name} is not JSON")
    return changed


def corpus_text(row: Row, entry: Entry) -> str:
    """The pretraining text of a row."""
    value = _values(row, "corpus", entry)("text")
    if value is None:
        raise ValueError("no text")
    if not isinstance(value, str):
        raise ValueError(f"text is {type(value).__name__}, not text")
    return trimmed(value)
