"""Completions that break off, and endings that only look like it."""

import pytest

from rlhf.curation.endings import truncated


@pytest.mark.parametrize("text", [
    "It is blue and green and", "You need flour, butter and the", "There are three reasons: the first,",
    "Use the function like this: open(", "He opened the door because", "They went to the shop for a",
    "Here you go:\n```python\nprint(1)", "Here:\n~~~\nx = 1", "1. Do this:\n   ```\n   make",
    "I would rather stay than", "x = [1, 2,", "````md\n```py\nx\n```",
])
def test_a_completion_that_breaks_off_is_found(text: str) -> None:
    assert truncated(text).startswith("breaks off")


@pytest.mark.parametrize("text", [
    "It is blue.", "Yes", "- one\n- two", "print(1)", "to sum up:", "What are you looking for",
    "The answer is A", "the answer is a", "Hepatitis A", "He has hepatitis A", "My final choice is option A",
    "Vitamin A", "A, B and C are wrong, so it is A", "because", "the",
    "Stop words to remove:\n- a\n- the\n- and", "an, and, the",
    "The operators are AND and OR", "He plays in a band called The The", "They are made for each other",
    "see\n```python\nprint(1)\n```", "see ```x = 1``` here", "```only a span```", "Run:\n~~~\nls\n~~~\n",
    "Here it is: ```python\nprint(1)\n```", "````md\n```py\nx\n```\n````",
    "It is all on https://host.org/about/the", "Read www.host.org/of/and", "I am so sorry about that :(",
    "Dear Ann,\nthank you.\n\nBest regards,", "Love,", "(", "What have you got yourself into", "Just because",
])
def test_endings_of_whole_completions_are_no_break(text: str) -> None:
    assert truncated(text) == ""
