"""How the rows of a file are to be read, by its first ones: the layout of a known dataset, or a map of columns.

What is not recognized is refused with the columns that are there; docs/sources.md says how to describe it by hand.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.curation.sources.layouts import INSTRUCTION, LAYOUT_ROLES
from rlhf.curation.sources.paths import as_list
from rlhf.errors import UserError

Row = Mapping[str, Any]

ROLES = {"pairs": "rm", "demonstrations": "sft", "prompts": "ppo", "text": "corpus"}
# What columns are usually called: field → names, the likeliest first.
USUAL = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "user", "request"),
    "chosen": ("chosen", "preferred", "better", "winner", "accepted", "good", "response_chosen", "answer_chosen"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "bad", "response_rejected", "answer_rejected"),
    "completion": ("completion", "response", "answer", "output", "reply", "demonstration"),
    "completions": ("completions", "responses", "answers", "candidates", "outputs"),
    "ranks": ("ranks", "ranking", "rankings"),
    "scores": ("scores", "ratings", "rewards"),
    "rank": ("rank", "ranking"),
    "score": ("score", "rating", "reward", "overall_score"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text", "content", "document"),
    "system": ("system", "system_prompt"),
    "user_id": ("user_id", "userid"),
    "labeler_id": ("labeler_id", "labeler", "annotator_id", "annotator", "rater"),
    "split": ("split",),
}
OPTIONAL = {"rm": ("system", "user_id", "labeler_id", "split"), "sft": ("system", "user_id", "split"),
            "ppo": ("system", "user_id", "split"), "corpus": ()}
KNOWN_SPLITS = {"train", "valid", "validation", "dev", "test"}
VOTES = ("preference", "preferred", "winner", "choice", "better_response_id", "better", "vote", "label", "chosen")
TIES = ("tie", "equal", "same", "both", "draw")
STEMS = ("response", "answer", "completion", "output", "candidate", "rank", "score", "rating")
NUMBERED = re.compile(rf"({'|'.join(STEMS)})s?[ _-]?(\d+|[a-i])", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """How the rows are read, as keys of an entry of a description. `unused`: columns that nothing reads."""

    keys: Mapping[str, Any]
    unused: Sequence[str] = field(default_factory=tuple)


def typical(rows: Sequence[Row]) -> dict[str, Any]:
    """Every column with its first value that is none of null and the empty text."""
    found: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if name not in found or found[name] in (None, ""):
                found[name] = value
    return found


def reading_of(kind: str, rows: Sequence[Row], given: Mapping[str, str], file: str) -> Reading:
    """How the rows of `kind` (pairs, demonstrations, prompts, text) are read. `given`: field → column, as the user
    said; those that the rows have count. Raises UserError for what is not recognized."""
    row, role = typical(rows), ROLES[kind]
    of_role = {name: column for name, column in given.items() if name in _fields_of(role) and has(row, column)}
    layout = "" if of_role else layout_of(row, role)
    if layout:
        return Reading({"layout": layout})
    columns = _Columns(row, of_role)
    keys = _comparisons(columns, rows, file) if role == "rm" else _others(columns, role, file)
    mapped = dict(keys["columns"])
    for name in OPTIONAL[role]:
        if name not in mapped and (column := columns.find(name)) and (name in of_role or fits(name, column, rows)):
            mapped[name] = column
    mapped |= {name: column for name, column in of_role.items() if name not in mapped}
    listed = {part for value in mapped.values() for part in ([value] if isinstance(value, str) else value)}
    texts = [mapped.get(name) for name in ("prompt", "chosen", "rejected", "completion")]
    as_json = [name for name in texts if isinstance(name, str) and _is_json_list(row.get(name))]
    vote = {keys["preference"]["column"]} if "preference" in keys else set()
    used = {part.split(".")[0] for part in listed} | vote
    return Reading(keys | {"columns": mapped} | ({"json_columns": as_json} if as_json else {}),
                   [name for name in row if name not in used])


def fits(name: str, column: str, rows: Sequence[Row]) -> bool:
    """Whether a column that is called like an optional field also holds what that takes."""
    values = [row[column] for row in rows if row.get(column) not in (None, "")]
    return name != "split" or (bool(values) and {str(value).lower() for value in values} <= KNOWN_SPLITS)


def has(row: Row, column: str) -> bool:
    """Whether the row has the column, or the one that a path begins with."""
    return column in row or re.split(r"[.\[]", column)[0] in row


def _fields_of(role: str) -> set[str]:
    own = {"rm": ("prompt", "chosen", "rejected", "completions", "ranks", "scores", "completion", "rank", "score"),
           "sft": ("prompt", "completion", "messages"), "ppo": ("prompt", "messages"), "corpus": ("text",)}
    return {*own[role], *OPTIONAL[role]}


# --- known datasets ---------------------------------------------------------------------------------------------------


def layout_of(row: Row, role: str) -> str:
    """The layout of a known dataset with such rows; empty where none has."""
    def there(*names: str) -> bool:
        return all(row.get(name) is not None for name in names)

    def holds(name: str, *keys: str) -> bool:
        """Whether the column is a list of objects with these keys."""
        items = row.get(name)
        return isinstance(items, list) and bool(items) and isinstance(items[0], Mapping) and set(keys) <= set(items[0])

    tree = row.get("prompt")
    asked = row.get("input")
    signs = {
        "oasst_trees": isinstance(tree, Mapping) and "replies" in tree,
        "oasst_messages": {"message_id", "parent_id", "text", "role"} <= set(row),
        "ultrafeedback": there("instruction") and holds("completions", "response", "overall_score"),
        "nectar": there("prompt") and holds("answers", "answer", "rank"),
        "helpsteer": there("prompt", "response", "helpfulness"),
        "arena": (there("conversation_a", "conversation_b", "winner")
                  or there("response_a", "response_b", "winner_model_a")),
        "openai_messages": isinstance(asked, Mapping) and there("preferred_output", "non_preferred_output"),
        "sharegpt": holds("conversations", "from", "value"),
        "alpaca": "input" in row and there("instruction") and (there("output") or there("chosen", "rejected")),
        "dolly": "context" in row and there("instruction", "response"),
        "dolly_hhrlhf": isinstance(tree, str) and INSTRUCTION in tree and there("response"),
        "hh_rlhf": not there("prompt") and is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")),
    }
    return next((name for name, seen in signs.items() if seen and role in LAYOUT_ROLES[name]), "")


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


# --- columns ----------------------------------------------------------------------------------------------------------


class _Columns:
    """The columns of a row, found by what the user said, else by their usual names."""

    def __init__(self, row: Row, given: Mapping[str, str]) -> None:
        self.row, self.given = row, given
        self.lower = {name.lower(): name for name in reversed(list(row))}

    def find(self, name: str) -> str:
        """The column of a field; empty where there is none."""
        if name in self.given:
            return self.given[name]
        return next((self.lower[usual] for usual in USUAL[name] if usual in self.lower), "")

    def need(self, *names: str, file: str) -> dict[str, Any]:
        """field → column. Raises UserError where one is not found."""
        found = {name: self.find(name) for name in names}
        missing = next((name for name, column in found.items() if not column), "")
        if missing:
            raise UserError(f"{file}: which column is the {missing}? Say --columns {missing}=NAME; columns: "
                            f"{', '.join(self.row)}")
        return found

    def value(self, name: str) -> Any:
        return self.row.get(self.find(name))


def _others(columns: _Columns, role: str, file: str) -> dict[str, Any]:
    """Demonstrations, prompts, texts: `messages` where a row has conversations and no prompt."""
    if role == "corpus":
        return {"columns": columns.need("text", file=file)}
    if not columns.find("prompt") and columns.value("messages") is not None:
        return {"columns": columns.need("messages", file=file)}
    return {"columns": columns.need("prompt", *(["completion"] if role == "sft" else []), file=file)}


def _comparisons(columns: _Columns, rows: Sequence[Row], file: str) -> dict[str, Any]:
    """Pairs; or several completions a row with ranks, scores or a vote; or a row for each completion."""
    prompt = {"prompt": columns.find("prompt")} if columns.find("prompt") else {}
    wide = _numbered(columns.row)
    texts = next((wide[stem] for stem in STEMS[:5] if len(wide.get(stem, ())) > 1), [])
    marks = {stem: wide[stem] for stem in STEMS[5:] if texts and len(wide.get(stem, ())) == len(texts)}
    if columns.find("chosen") and columns.find("rejected"):
        whole = isinstance(columns.value("chosen"), list) or is_transcript(columns.value("chosen"))
        need = ("chosen", "rejected") if whole and not prompt else ("prompt", "chosen", "rejected")
        return {"columns": columns.need(*need, file=file)}
    if marks:
        stem, names = next(iter(marks.items()))
        return {"columns": {**columns.need("prompt", file=file), "completions": texts,
                            "ranks" if stem == "rank" else "scores": names}}
    if len(texts) == 2 and (vote := _vote(columns, texts, rows, file)):
        return {"columns": {**columns.need("prompt", file=file), "completions": texts}, "preference": vote}
    for several, one in (("ranks", "rank"), ("scores", "score")):
        if isinstance(as_list(columns.value("completions")), list) and columns.find(several):
            return {"columns": columns.need("prompt", "completions", several, file=file)}
        if isinstance(columns.value("completion"), str) and columns.find(one):
            return {"columns": columns.need("prompt", "completion", one, file=file), "group_by": columns.find("prompt")}
    return {"columns": columns.need("prompt", "chosen", "rejected", file=file)}


def _numbered(row: Row) -> dict[str, list[str]]:
    """Stem → the columns response_1, response_2, ... in the order of their numbers or letters."""
    found: dict[str, dict[str, str]] = {}
    for name in row:
        if match := NUMBERED.fullmatch(name):
            found.setdefault(match[1].lower(), {})[match[2].lower()] = name
    return {stem: [names[key] for key in sorted(names, key=lambda key: (len(key), key))]
            for stem, names in found.items()}


def _vote(columns: _Columns, texts: Sequence[str], rows: Sequence[Row], file: str) -> dict[str, Any]:
    """The column of votes between two answers, where its values name them: by their column, or its last letter or
    number. Raises UserError where they mean something else."""
    column = next((columns.lower[name] for name in VOTES if name in columns.lower), "")
    if not column:
        return {}
    values = {str(row[column]).strip(): row[column] for row in rows if row.get(column) not in (None, "")}
    ends = [match[2] for name in texts if (match := NUMBERED.fullmatch(name))]
    meant: dict[str, Any] = {"column": column}
    for text, value in sorted(values.items()):
        place = next((place for place, name in enumerate(texts) if text.lower() in (name.lower(), ends[place].lower())),
                     None)
        tie = text.lower() in TIES
        if place is None and not tie:
            raise UserError(f"{file}: {column} = {text!r}: which of {texts[0]} and {texts[1]} is that? Describe it "
                            "with `preference` (docs/sources.md)")
        meant["tie" if tie else ("first", "second")[place or 0]] = value
    for key, place in (("first", 0), ("second", 1)):
        meant.setdefault(key, ends[place])
    return meant


def _is_json_list(value: Any) -> bool:
    """Whether a text is a JSON list."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return False
