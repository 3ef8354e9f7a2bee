"""Screens each record on its own: a broken one is quarantined with the reason, the others get features for the rules.

The rules that compare rows (near duplicates, users, splits) are in `rlhf.curation.rules`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from rlhf.curation.characters import encodes, is_visible, odd_character, special_token
from rlhf.curation.language import foreign_language
from rlhf.curation.near_duplicates import normalised
from rlhf.curation.personal_data import personal_data_in
from rlhf.curation.sources.map_rows import map_rows
from rlhf.curation.sources.paths import Seen
from rlhf.curation.sources.records import Record
from rlhf.curation.sources.spec import Entry, RulesParams
from rlhf.curation.transcripts import first_said
from rlhf.data.schema import MAX_K, SPLITS

UNDECIDED = -1
# Words with which no English sentence ends.
_UNFINISHED = re.compile(r"\b(?:the|a|an|and|or|because|their|your|my|our|than|whose|although|unless|into)$",
                         re.IGNORECASE)
_FENCE = re.compile(r"^\s*```", re.MULTILINE)


@dataclass(frozen=True)
class Screened:
    """A valid row. `head` and `tail`: its JSON before and after the split. `order`: a seeded hash of its content."""

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


@dataclass(frozen=True)
class Quarantined:
    """A row that cannot be used, and why."""

    number: int
    reason: str
    row: Any


def hashed(text: str, seed: int = 0) -> int:
    """64 bits of BLAKE2b, keyed by the seed."""
    key = seed.to_bytes(8, "big") if seed else b""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest(), "big")


def truncated(text: str) -> str:
    """Why a completion seems truncated, or "": an open code block, a last word or mark that ends no sentence."""
    if len(_FENCE.findall(text)) % 2:
        return "breaks off inside a code block"
    last = text.rstrip().rsplit("\n", 1)[-1]
    if last.endswith((",", "(", "[", "{")) or _UNFINISHED.search(last):
        return f"breaks off: ... {last[-30:]}"
    return ""


def problem_of(record: Record, role: str, rules: RulesParams) -> str:
    """Why a record cannot be used, or ""."""
    texts = [record.prompt, *record.completions]
    joined = "\n".join(texts)
    if not is_visible(record.prompt):
        return "empty prompt"
    for number, completion in enumerate(record.completions, start=1):
        if not is_visible(completion):
            return "empty completion" if role == "sft" else f"completion {number} is empty"
    if not encodes(joined):
        return "holds half of a surrogate pair, which is not text"
    odd, token = odd_character(joined), special_token(joined)
    if odd:
        return f"holds {odd}"
    if token:
        return f"holds the special token {token}"
    if role == "sft" and truncated(record.completions[0]):
        return truncated(record.completions[0])
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
    from rlhf.model.tokenizer import PromptCodec, load_with_pad

    return PromptCodec(load_with_pad(name))


def _lengths(records: list[Record], rules: RulesParams) -> list[str]:
    """For each record "long_prompt", "long_completion" or ""."""
    prompts = [len(record.prompt) > rules.max_prompt_chars for record in records]
    answers = [any(len(text) > rules.max_completion_chars for text in record.completions) for record in records]
    if rules.tokenizer and records:
        codec = _codec(rules.tokenizer)
        counted = codec.prompts([record.prompt for record in records])
        prompts = [too_long or len(ids) > rules.max_prompt_tokens
                   for too_long, ids in zip(prompts, counted, strict=True)]
        texts = [(index, text) for index, record in enumerate(records) for text in record.completions]
        for (index, _), ids in zip(texts, codec.completions([text for _, text in texts]), strict=True):
            answers[index] = answers[index] or len(ids) > rules.max_completion_tokens
    return ["long_prompt" if prompt else "long_completion" if answer else ""
            for prompt, answer in zip(prompts, answers, strict=True)]


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(", ", ": "))


def _screened(record: Record, number: int, role: str, entry: Entry, rules: RulesParams, seed: int,
              too_long: str) -> Screened:
    prompt = record.prompt
    user = record.user or f"anon-{hashed(normalised(first_said(prompt))):016x}"
    content = "\x1f".join([role, user, prompt, *record.completions, *map(str, record.ranks)])
    key = normalised(prompt)
    head: dict[str, Any] = {"prompt_id": record.prompt_id or f"{role}-{hashed(content):016x}", "user_id": user}
    if role == "rm":
        head["labeler_id"] = entry.labeler or record.labeler or "unknown"
    head["source"] = "customer" if role == "ppo" else entry.source or record.source
    chat = prompt != first_said(prompt)
    tail: dict[str, Any] = {"use_case": record.use_case or entry.use_case or ("chat" if chat else "other"),
                            "prompt": prompt}
    if role == "sft":
        tail["completion"] = record.completions[0]
    if role == "rm":
        tail |= {"completions": record.completions, "ranks": record.ranks}
    return Screened(
        number, _json(head)[:-1].encode(), (_json(tail)[1:] + "\n").encode(), key, hashed(user), hashed(content, seed),
        hashed(record.prompt_id) if record.prompt_id else 0,
        SPLITS.index(record.split) if record.split else UNDECIDED,
        bool(foreign_language(prompt)), bool(personal_data_in("\n".join([prompt, *record.completions]))), too_long)


def screen_rows(role: str, entry: Entry, rules: RulesParams, seed: int, numbers: Sequence[int], rows: Sequence[Any]
                ) -> tuple[list[Screened], list[Quarantined], Seen]:
    """Maps and screens a batch of rows of an entry. A pure function, so batches can run in several processes."""
    mapped = map_rows(role, entry, numbers, rows)
    sound: list[tuple[int, Record]] = []
    quarantined = [Quarantined(*item) for item in mapped.quarantined]
    for number, record in mapped.records:
        problem = problem_of(record, role, rules)
        if problem:
            content = {"prompt": record.prompt, "completions": record.completions, "ranks": record.ranks}
            quarantined.append(Quarantined(number, problem, content))
        else:
            sound.append((number, record))
    too_long = _lengths([record for _, record in sound], rules)
    return [_screened(record, number, role, entry, rules, seed, length)
            for (number, record), length in zip(sound, too_long, strict=True)], quarantined, mapped.seen
