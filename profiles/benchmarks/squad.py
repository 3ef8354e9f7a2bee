"""Exact match and F1 of an answer as SQuAD 2.0 defines them (Rajpurkar et al. 2018, §5): best over the references."""

import re
import string
from collections import Counter
from typing import Any


def normal(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer: str, reference: str) -> float:
    """F1 of the bags of words; an empty answer matches only an empty reference."""
    ours, theirs = normal(answer), normal(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


NO_ANSWER = (["unanswerable"], ["not", "in", "background"], ["no", "answer"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """f1 and exact match of one answer; the texts of NO_ANSWER mean that there is none."""
    answer = "" if normal(results[0]) in NO_ANSWER else results[0]
    references = doc["answers"]["text"] or [""]
    return {"f1": max(f1(answer, reference) for reference in references),
            "exact": max(float(normal(answer) == normal(reference)) for reference in references)}
