"""Reads a dataset file line by line into a frame for Great Expectations; no content of the file makes it fail.

The column `prompt` is the prompt as text, a conversation as a transcript. `line` names the rule that a line breaks as a
line (UTF-8, JSON, keys, types); the columns of TEXT_COLUMNS hold problems of its texts. AS_DECLARED means no problem.
`user` is the user id as it is compared.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.curation.characters import (
    SPECIAL_TOKENS,
    encodes,
    is_visible,
    odd_character,
    special_token,
    template_mark,
    turn_mark,
)
from rlhf.curation.completions import repeats_prompt
from rlhf.curation.endings import truncated
from rlhf.curation.language import foreign_language
from rlhf.curation.near_duplicates import same_user
from rlhf.curation.personal_data import personal_data_in
from rlhf.curation.transcripts import is_transcript
from rlhf.data.prompts import Prompt, message_text, prompt_key, prompt_problem, prompt_text, prompt_texts, users_text
from rlhf.data.schema import KEYS, SPLITS
from rlhf.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

AS_DECLARED = "as declared"
TEXT_COLUMNS = ("characters", "special_tokens", "turn_marks", "repeated_prompt", "truncated", "personal_data",
                "personal_data_in_valid", "language")
SHOWN_CHARS = 60
MAX_LINE_BYTES = 1_000_000
COUNTED = 1000  # pairs whose tokens are counted at once
LIST_ITEMS = {"completions": str, "ranks": int}  # keys with lists and the type of their items; others hold text
PROMPT = "prompt"  # text, or a list of messages
TokenCounter = Callable[[list[Prompt], list[str]], list[int]]  # tokens of prompts with their completions; ValueError
JSON_NAMES = {str: "text", int: "an integer", float: "a number", bool: "a boolean", list: "a list", dict: "an object",
              type(None): "null"}


@dataclass(frozen=True)
class Line:
    """One line of a file: its number (from 1), its row if it has a usable one, the rule that it breaks as a line, and
    the problem (both "" if there is none).
    """

    number: int
    row: dict[str, Any] | None
    rule: str = ""
    problem: str = ""


def short(value: Any) -> str:
    """A value on one line, cut to a readable length."""
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


class _Refused(ValueError):
    """Content that Python's JSON decoder accepts and this project refuses: (rule, problem)."""


def _no_constant(name: str) -> Any:
    raise _Refused("finite_numbers", f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused("unique_keys", f"{short(next(name for name in names if names.count(name) > 1))} appears twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def read_line(number: int, raw: bytes, keys: list[str], length: int) -> Line:
    """Parses one line. Only the first broken rule is reported; a byte order mark or CRLF leaves the row usable.

    `length`: of the whole line in bytes; `raw` is only the start of one that is too long.
    """
    if length > MAX_LINE_BYTES:
        return Line(number, None, "line_length", f"{length:,} bytes, more than {MAX_LINE_BYTES:,}")
    soft = ("", "")
    content = raw.removesuffix(b"\n")
    if content.startswith(b"\xef\xbb\xbf"):
        content, soft = content[3:], ("no_bom", "begins with a byte order mark")
    if content.endswith(b"\r"):
        content, soft = content[:-1], ("line_ends", "ends in CR LF instead of LF")
    if b"\0" in content:
        return Line(number, None, "null_bytes", f"a null byte at byte {content.index(0)}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Line(number, None, "utf8", f"not UTF-8 at byte {error.start}")
    if not text.strip():
        return Line(number, None, "no_blank_line", "a blank line")
    try:
        row = _DECODER.decode(text)
    except _Refused as refused:
        return Line(number, None, refused.args[0], refused.args[1])
    except json.JSONDecodeError as error:
        return Line(number, None, "json", f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return Line(number, None, "json", f"not readable as JSON: {str(error).splitlines()[0]}")
    if not isinstance(row, dict):
        return Line(number, None, "json_object", f"{JSON_NAMES[type(row)]}, not an object")
    rule, problem = _shape_problem(row, keys)
    if rule:
        return Line(number, row if rule == "key_order" else None, rule, problem)
    return Line(number, row, *soft)


def _shape_problem(row: dict[str, Any], keys: list[str]) -> tuple[str, str]:
    """(rule, problem) of a row's keys and types; ("", "") without a problem."""
    wrong = [f"{key} is missing" for key in keys if key not in row]
    wrong += [f"{short(key)} is unknown" for key in row if key not in keys]
    if wrong:
        return "exact_keys", ", ".join(wrong)
    for key, value in row.items():
        if key == PROMPT and isinstance(value, list):
            if problem := prompt_problem(value):
                return "value_types", f"prompt: {problem}"
            blank = [place for place, message in enumerate(value, start=1)
                     if message["role"] != "tool" and not is_visible(message_text(message))]
            if blank:
                return "value_types", f"prompt: message {blank[0]} is blank"
            if not all(map(encodes, prompt_texts(value))):
                return "surrogates", "prompt holds half of a surrogate pair, which is not text"
            continue
        if key == PROMPT and isinstance(value, str) and is_transcript(value):
            return "transcripts", f"prompt {short(value)}"
        if key == PROMPT and not isinstance(value, str):
            return "value_types", f"prompt is {JSON_NAMES[type(value)]}, neither text nor a list of messages"
        items = value if key in LIST_ITEMS else [value]
        if key in LIST_ITEMS and type(value) is not list:
            return "value_types", f"{key} is {JSON_NAMES[type(value)]}, not a list"
        for item in items:
            expected = LIST_ITEMS.get(key, str)
            if type(item) is not expected:
                verb = f"{key} holds {JSON_NAMES[type(item)]}, not only" if key in LIST_ITEMS else \
                    f"{key} is {JSON_NAMES[type(item)]}, not"
                return "value_types", f"{verb} {JSON_NAMES[expected]}"
            if isinstance(item, str) and not encodes(item):
                return "surrogates", f"{key} holds half of a surrogate pair, which is not text"
    if list(row) != keys:
        return "key_order", "in another order: " + ", ".join(row)
    return "", ""


def read_lines(file: Path, keys: list[str]) -> Iterator[Line]:
    """All lines of a file, plain or .gz; a truncated .gz ends with a Line that reports it.

    Raises UserError where the file cannot be opened.
    """
    try:
        handle = gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # noqa: SIM115
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{file}: no such file; run `dvc repro data.dvc` or `dvc pull`") from None
    except PermissionError:
        raise UserError(f"{file}: cannot be read; check its permissions") from None
    number = 0
    with handle:
        try:
            while raw := handle.readline(MAX_LINE_BYTES + 1):
                number += 1
                length, rest = len(raw), raw
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):  # skipped in pieces, whatever its size
                    rest = handle.readline(MAX_LINE_BYTES + 1)
                    length += len(rest)
                yield read_line(number, raw, keys, length)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Line(number + 1, None, "whole_file", f"the compressed file is truncated here: {error}")


def read_frame(dataset: str, file: Path, tokens: Sequence[str] = SPECIAL_TOKENS,
               count_tokens: TokenCounter | None = None,
               language: str = "en") -> "pd.DataFrame":
    """The file as a frame indexed by line number, with further columns that the rules need.

    A row that is unusable as a line is null except for `line`, `problem` and `split_source`. `count_tokens(prompts,
    completions)`: tokens of each pair; the column `tokens` has those of the row's longest pair, `chat_template` why it
    has none. `language`: ISO 639-1 code of the prompts' language. Raises UserError.
    """
    import pandas as pd

    names = KEYS[dataset]
    no_row: dict[str, Any] = dict.fromkeys(names)
    rows: list[dict[str, Any]] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("line", "problem", *TEXT_COLUMNS)}
    for line in read_lines(file, names):
        row: dict[str, Any] = line.row or no_row
        rows.append(row)
        problems = _text_problems(row, tokens, language) if line.row else {}
        problems |= {"line": line.rule, "problem": line.problem}
        for name, values in columns.items():
            values.append(problems.get(name) or AS_DECLARED)
    columns |= {name: [row[name] for row in rows] for name in names if name not in LIST_ITEMS}
    columns[PROMPT] = [row[PROMPT] and prompt_text(row[PROMPT]) for row in rows]
    columns["user"] = [row["user_id"] and same_user(row["user_id"]) for row in rows]
    columns["side"] = [row["split"] if row["split"] in SPLITS else None for row in rows]
    columns["split_source"] = [f"{row['split']}/{row['source']}" for row in rows]
    lines = range(1, len(rows) + 1)
    frame = pd.DataFrame({name: pd.Series(values, lines, dtype="str") for name, values in columns.items()})
    if dataset == "rm":
        _add_rankings(frame, rows)
    if dataset == "rm":
        frame["comparison"] = pd.Series([_comparison(row) for row in rows], lines, dtype="object")
    if dataset != "ppo":
        frame["answers"] = pd.Series([_answers(row) for row in rows], lines, dtype="object")
    if count_tokens is not None:
        counts, refusals = _token_counts(rows, count_tokens)
        frame["tokens"] = pd.Series(counts, lines, dtype="float")
        frame["chat_template"] = pd.Series([refusals.get(place) or AS_DECLARED for place in range(len(rows))], lines,
                                           dtype="str")
    return frame


def _text_problems(row: dict[str, Any], tokens: Sequence[str], language: str) -> dict[str, str]:
    """The problems of a row's texts by column of TEXT_COLUMNS; "" where there is none."""
    prompt, completions = row[PROMPT], row.get("completions", [row.get("completion", "")])
    joined = "\n".join([*prompt_texts(prompt), *completions])
    best = completions if "ranks" not in row else [
        text for text, rank in zip(completions, row["ranks"], strict=False) if rank == 1]
    personal = "; ".join(dict.fromkeys(personal_data_in(joined)))
    in_valid = row["split"] == "valid"
    copies = [words for text in best if (words := repeats_prompt(prompt, text))
              and ("completion" in row or words.startswith("is "))]
    return {"characters": odd_character(joined), "special_tokens": special_token(joined, tokens),
            "turn_marks": next(filter(None, map(turn_mark, completions)), "") or
            next(filter(None, map(template_mark, prompt_texts(prompt))), ""),
            "repeated_prompt": copies[0] if copies else "",
            "truncated": truncated(row["completion"]) if "completion" in row else "",
            "personal_data": "" if in_valid else personal, "personal_data_in_valid": personal if in_valid else "",
            "language": foreign_language(users_text(prompt), language)}


def _answers(row: dict[str, Any]) -> tuple[Any, ...] | None:
    """(labeler, prompt, completions, ranks), hashable; of a demonstration without labeler and ranks; None without row.
    """
    if row[PROMPT] is None:
        return None
    if "completion" in row:
        return "", prompt_key(row[PROMPT]), (row["completion"],), ()
    return row["labeler_id"], prompt_key(row[PROMPT]), tuple(row["completions"]), tuple(row["ranks"])


def _comparison(row: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a ranking says, in whatever order it presents the completions; None without row."""
    if row[PROMPT] is None:
        return None
    ranked = sorted(zip(row["ranks"], row["completions"], strict=False))
    return row["labeler_id"], prompt_key(row[PROMPT]), *ranked


def _token_counts(rows: list[dict[str, Any]], count: TokenCounter) -> tuple[list[int | None], dict[int, str]]:
    """(tokens of each row's prompt with its longest completion, None for an unusable row; why a row has none)."""
    pairs = [(index, row[PROMPT], completion) for index, row in enumerate(rows) if row[PROMPT] is not None
             for completion in (row.get("completions") or [row.get("completion") or ""])]
    counts: list[int | None] = [None] * len(rows)
    refusals: dict[int, str] = {}
    for start in range(0, len(pairs), COUNTED):
        some = pairs[start:start + COUNTED]
        try:
            found: list[int] = count([prompt for _, prompt, _ in some], [completion for *_, completion in some])
        except ValueError:  # the chat template refuses one of them
            found = [_count_alone(pair, count, refusals) for pair in some]
        for (index, *_), tokens in zip(some, found, strict=True):
            counts[index] = max(tokens, counts[index] or 0)
    return counts, refusals


def _count_alone(pair: tuple[int, Prompt, str], count: TokenCounter, refusals: dict[int, str]) -> int:
    index, prompt, completion = pair
    try:
        return count([prompt], [completion])[0]
    except ValueError as error:
        refusals[index] = str(error)
        return 0


def _add_rankings(frame: "pd.DataFrame", rows: list[dict[str, Any]]) -> None:
    """Adds the lists as tuples, their lengths, and the longest and the blankest completion of each row."""
    import pandas as pd

    def column(values: list[Any], dtype: str) -> "pd.Series":
        return pd.Series(values, frame.index, dtype=dtype)

    for name, length in (("completions", "k"), ("ranks", "rank_count")):
        lists = [None if row[name] is None else tuple(row[name]) for row in rows]
        frame[name] = column(lists, "object")
        frame[length] = column([None if items is None else len(items) for items in lists], "float")
    texts = [row["completions"] or [] for row in rows]
    frame["longest_completion"] = column([max(row, key=len, default=None) for row in texts], "str")
    blank_first = [sorted(row, key=is_visible) for row in texts]
    frame["blankest_completion"] = column([row[0] if row else None for row in blank_first], "str")
