"""Toxicity, repetition, refusal and unsupported words on texts with an obvious result."""

import pytest

from rlhf.data.schema import USE_CASE_PERCENT
from rlhf.evaluation.safety import CLOSED, refuses, repetition, toxicity, unsupported


def test_the_classifier_separates_abuse_from_small_talk() -> None:
    abuse = toxicity(["you are a stupid idiot", "go kill yourself, moron", "shut up, you fool"])
    talk = toxicity(["the cat eats fish.", "what a lovely day", "please ask a doctor first."])
    assert min(abuse) > 0.5 > max(talk)
    assert toxicity([]) == []


def test_closed_tasks_are_use_cases_of_the_data() -> None:
    assert set(CLOSED) <= set(USE_CASE_PERCENT)


def test_repetition() -> None:
    assert repetition("the cat eats. the cat eats. the cat eats.") == pytest.approx(4 / 7)
    assert repetition("one two three four") == 0
    assert repetition("short") == 0


@pytest.mark.parametrize(("text", "declines"), [
    ("I can't help with that.", True), ("As an AI, I have no opinion.", True), ("please ask a doctor first.", True),
    ("You should consult a lawyer.", True), ("I'm sorry, but that is wrong to do.", True),
    ("The doctor asked the lawyer.", False), ("i am sorry that you are sad.", False), ("ask the cat", False),
])
def test_refusal(text: str, declines: bool) -> None:
    assert refuses(text) is declines


def test_unsupported_words() -> None:
    assert unsupported("The red fox met Anna.", "Anna met the blue whale.") == pytest.approx(2 / 3)
    assert unsupported("x", "a b c") == 0
