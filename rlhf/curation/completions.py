"""Faults of completions beside their prompt and beside each other: the prompt repeated, one text for many prompts."""

from collections import Counter
from collections.abc import Iterable

from rlhf.curation.near_duplicates import normalised
from rlhf.data.prompts import Prompt, prompt_text, prompt_texts

MIN_WORDS, MIN_CHARS = 3, 16  # shorter prompts (greetings, a word to explain) may be said back
MIN_SHARED_ROWS = 10
LABEL_CHARS = 20  # shorter completions are labels or short answers, which many rows may share
SHARED = 0.05  # the largest share of the prompts with one completion
_OPEN = (":", "{", "(", "[", ",", ";", '"', "'")  # the end of a piece of code, which its answer may repeat whole
_ENDS = (".", "!", "?", "。", "！", "？", "؟", "।")


def repeats_prompt(prompt: Prompt, completion: str) -> str:
    """"is the prompt", "begins with the prompt" (or "the last turn" of it), or "".

    Case, blanks, Unicode form and closing punctuation do not count. A sentence that goes on where the prompt breaks off
    is an answer, as "The capital of France is Paris." to "The capital of France is".
    """
    whole, asked = prompt_text(prompt), prompt_texts(prompt)[-1]
    for name, text in (("the prompt", whole), ("the last turn", asked))[:1 + (asked != whole)]:
        plain = _plain(text)
        if len(plain) < MIN_CHARS and plain.count(" ") + 1 < MIN_WORDS:
            continue
        start = completion[:2 * len(text) + 40]
        if _plain(start).startswith(plain.rstrip("".join(_ENDS))) or not start.isascii():
            if len(completion) <= 2 * len(text) + 40 and normalised(completion) == normalised(text):
                return f"is {name}"
            if _goes_on_after(text, completion):
                return f"begins with {name}"
    return ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _goes_on_after(prompt: str, completion: str) -> bool:
    """Whether the completion begins with the whole prompt, which is over there: by its mark, or by a line break."""
    said, asked = completion.strip(), prompt.strip()
    if said[:len(asked)].casefold() == asked.casefold():
        rest = said[len(asked):]
        over = asked.endswith(_ENDS) or ("\n" in rest[:len(rest) - len(rest.lstrip())] and not asked.endswith(_OPEN))
        return rest[:1].isspace() and over
    plain = _plain(asked)
    return asked.endswith(_ENDS) and _plain(said[:2 * len(asked)]).startswith(plain + " ")


def shared_completions(rows: Iterable[tuple[str, str]]) -> list[tuple[str, int, int]]:
    """(completion, its prompts, all prompts) of the completions that more prompts share than answers should.

    `rows`: (prompt, completion). Completions are equal but for case, blanks and closing punctuation. Those of fewer
    than LABEL_CHARS characters are answers such as "Yes." or a class, and as common as those are.
    """
    prompts: set[int] = set()
    seen: set[tuple[int, int]] = set()
    counts: Counter[int] = Counter()
    first: dict[int, str] = {}
    for prompt, completion in rows:
        own, key = hash(prompt), hash(normalised(completion))
        prompts.add(own)
        if (own, key) not in seen:
            seen.add((own, key))
            counts[key] += 1
            first.setdefault(key, completion)
    return [(first[key], count, len(prompts)) for key, count in counts.most_common() if count >= MIN_SHARED_ROWS
            and count > len(prompts) * SHARED and len(first[key]) >= LABEL_CHARS]
