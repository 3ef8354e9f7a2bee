"""Screens each record on its own: a broken one is quarantined with the reason, the others get features for the rules.

The rules that compare rows (near duplicates, users, splits) are in `rlhf.curation.rules`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from rlhf.curation.characters import encodes, is_visible, odd_character, special_token
from rlhf.curation.endings import truncated
from rlhf.curation.language import foreign_language
from rlhf.curation.near_duplicates import normalised, same_user
from rlhf.curation.personal_data import personal_data_in
from rlhf.curation.sources.map_rows import map_rows
from rlhf.curation.sources.paths import Seen
from rlhf.curation.sources.records import Record
from rlhf.curation.sources.spec import Entry, RulesParams
from rlhf.curation.transcripts import Turn, as_prompt
from rlhf.data.prompts import prompt_key, prompt_text, users_text
from rlhf.data.schema import MAX_K, SPLITS
from rlhf.errors import UserError

UNDECIDED = -1


@dataclass(frozen=True)
class Screened:
    """A valid row. `head` and `tail`: its JSON before and after the split. `order`: a seeded hash of its content.

    Hashes, 0 for none: `user` of the user id that the source names, `own_id` of its prompt_id; `opening` and `branch`
    of the conversation up to the first and to the second message of the human; of a ranking `comparison` (prompt,
    completions, ranks, labeler) and `ranker` (prompt, labeler).
    """

    number: int
    head: bytes
    tail: bytes
    key: str
    user: int
    order: int
    own_id: int
    split: int
    foreign: bool
    personal: bool
    too_long: str
    opening: int = 0
    branch: int = 0
    comparison: int = 0
    ranker: int = 0


@dataclass(frozen=True)
class Quarantined:
    """A row that cannot be used, and why. `fits`: it fits its layout, and its texts are at fault."""

    number: int
    reason: str
    row: Any
    fits: bool = False


def hashed(text: str, seed: int = 0) -> int:
    """64 bits of BLAKE2b, keyed by the seed."""
    key = seed.to_bytes(8, "big") if seed else b""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest(), "big")


def problem_of(record: Record, role: str, rules: RulesParams) -> str:
    """Why a record cannot be used, or ""."""
    joined = "\n".join([*(text for _, text in record.turns), *record.completions])
    if not is_visible(record.turns[-1][1]):
        return "empty prompt"
    for number, completion in enumerate(record.completions, start=1):
        if not is_visible(completion):
            return "empty completion" if role == "sft" else f"completion {number} is empty"
    if not encodes(joined):
        return "holds half of a surrogate pair, which is not text"
    odd, token = odd_character(joined), special_token(joined)
    if odd:
        return f"holds {odd}"
    if token and rules.special_tokens == "quarantine":
        return f"holds the special token {token}"
    if role == "sft" and rules.broken_endings == "quarantine" and (ending := truncated(record.completions[0])):
        return ending
    if role == "rm":
        count = len(record.completions)
        if not rules.min_k <= count <= MAX_K:
            return f"{count} completions, not {rules.min_k} to {MAX_K}"
        if len(set(record.ranks)) == 1:
            return "all completions share a rank"
        if len(set(zip(record.completions, record.ranks, strict=True))) != len(set(record.completions)):
            return "equal completions have different ranks"
    return ""


@lru_cache(maxsize=2)
def _codec(name: str) -> Any:
    from rlhf.model.chat_format import codec_with_pad

    try:
        return codec_with_pad(name)
    except (OSError, ValueError) as error:
        raise UserError(f"rules.tokenizer = {name!r}: cannot be used: {str(error).strip().splitlines()[0]}") from None


def _content(record: Record) -> dict[str, Any]:
    return {"prompt": as_prompt(record.prompt), "completions": record.completions, "ranks": record.ranks}


def _lengths(records: list[tuple[int, Record]], rules: RulesParams, quarantined: list[Quarantined]
             ) -> Iterator[tuple[int, Record, str]]:
    """The records, each with "long_prompt", "long_completion" or "". With `rules.tokenizer` those that its chat format
    cannot hold are quarantined."""
    counts = [(0, 0)] * len(records)
    if rules.tokenizer and records:
        records, counts = _counted(_codec(rules.tokenizer), records, quarantined)
    for (number, record), (prompt, answer) in zip(records, counts, strict=True):
        long_prompt = len(prompt_text(as_prompt(record.prompt))) > rules.max_prompt_chars
        long_answer = any(len(text) > rules.max_completion_chars for text in record.completions)
        yield number, record, ("long_prompt" if long_prompt or prompt > rules.max_prompt_tokens else
                               "long_completion" if long_answer or answer > rules.max_completion_tokens else "")


def _counted(codec: Any, records: list[tuple[int, Record]], quarantined: list[Quarantined]
             ) -> tuple[list[tuple[int, Record]], list[tuple[int, int]]]:
    """The records that the chat format can hold, and `_token_counts` of each."""
    try:
        return records, _token_counts(codec, [record for _, record in records])
    except ValueError as error:
        if len(records) == 1:
            [(number, record)] = records
            quarantined.append(Quarantined(number, str(error), _content(record), fits=True))
            return [], []
    parts = [_counted(codec, [item], quarantined) for item in records]
    return [item for some, _ in parts for item in some], [pair for _, pairs in parts for pair in pairs]


def _token_counts(codec: Any, records: Sequence[Record]) -> list[tuple[int, int]]:
    """(tokens of the prompt, of the longest completion) of each record. Raises ValueError."""
    prompts = codec.prompts([as_prompt(record.prompt) for record in records])
    answers = iter(codec.completions([text for record in records for text in record.completions]))
    return [(len(ids), max((len(next(answers)) for _ in record.completions), default=0))
            for record, ids in zip(records, prompts, strict=True)]


_json = json.JSONEncoder(ensure_ascii=False, separators=(", ", ": ")).encode


def openings(turns: Sequence[Turn], key: str) -> tuple[int, int]:
    """Hashes of the conversation up to the user's first message and up to the second; equal if there is one only.

    `key`: the normalised prompt.
    """
    if len(turns) == 1:
        opening = hashed(key)
        return opening, opening
    ends = [place for place, (role, _) in enumerate(turns, start=1) if role == "user"]
    said = [normalised(text) for _, text in turns]
    first, second = ("\x1f".join(said[:end]) for end in (ends[0], ends[min(1, len(ends) - 1)]))
    return hashed(first), hashed(second)


def _screened(record: Record, number: int, role: str, entry: Entry, rules: RulesParams, seed: int,
              too_long: str) -> Screened:
    prompt = as_prompt(record.prompt)
    text, exact = prompt_text(prompt), prompt_key(prompt)
    key = normalised(text)
    user = record.user or f"anon-{hashed(key):016x}"
    labeler = entry.labeler or record.labeler or "unknown"
    answers = [*record.completions, *map(str, record.ranks)]
    content = "\x1f".join([role, user, *([labeler] if role == "rm" else []), exact, *answers])
    head: dict[str, Any] = {"prompt_id": record.prompt_id or f"{role}-{hashed(content):016x}", "user_id": user}
    if role == "rm":
        head["labeler_id"] = labeler
    head["source"] = "customer" if role == "ppo" else entry.source or record.source
    case = entry.use_case or record.use_case or ("chat" if len(record.turns) > 1 else "other")
    tail: dict[str, Any] = {"use_case": case, "prompt": prompt}
    comparison = ranker = 0
    if role == "sft":
        tail["completion"] = record.completions[0]
    if role == "rm":
        tail |= {"completions": record.completions, "ranks": record.ranks}
        ranker = hashed(f"{exact}\x1f{labeler}")
        ranked = sorted(zip(record.ranks, record.completions, strict=True))
        comparison = hashed("\x1f".join([exact, labeler, *(f"{rank} {text}" for rank, text in ranked)]))
    opening, branch = openings(record.turns, key)
    return Screened(
        number, _json(head)[:-1].encode(), (_json(tail)[1:] + "\n").encode(), key,
        hashed(same_user(record.user)) if record.user else 0, hashed(content, seed),
        hashed(record.prompt_id) if record.prompt_id else 0,
        SPLITS.index(record.split) if record.split else UNDECIDED,
        bool(foreign_language(users_text(prompt), rules.language)),
        bool(personal_data_in("\n".join([text, *record.completions]))), too_long, opening, branch, comparison, ranker)


def screen_rows(role: str, entry: Entry, rules: RulesParams, seed: int, numbers: Sequence[int], rows: Sequence[Any]
                ) -> tuple[list[Screened], list[Quarantined], Seen]:
    """Maps and screens a batch of rows of an entry. A pure function, so batches can run in several processes."""
    mapped = map_rows(role, entry, numbers, rows)
    sound: list[tuple[int, Record]] = []
    quarantined = [Quarantined(*item) for item in mapped.quarantined]
    for number, record in mapped.records:
        problem = problem_of(record, role, rules)
        if problem:
            quarantined.append(Quarantined(number, problem, _content(record), fits=True))
        else:
            sound.append((number, record))
    return [_screened(record, number, role, entry, rules, seed, too_long)
            for number, record, too_long in _lengths(sound, rules, quarantined)], quarantined, mapped.seen
