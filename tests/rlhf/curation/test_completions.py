"""Completions that repeat their prompt, and completions that many prompts share."""

import pytest

from rlhf.curation.completions import repeats_prompt, shared_completions
from rlhf.data.prompts import Prompt

ASKED = "What does a baker think about at three in the morning?"


@pytest.mark.parametrize(("prompt", "completion", "said"), [
    (ASKED, ASKED, "is the prompt"), (ASKED, ASKED.upper(), "is the prompt"),
    (ASKED, f"  {ASKED[:-1]} \n", "is the prompt"), (ASKED, ASKED.replace("a", "\u0430"), "is the prompt"),
    (ASKED, ASKED.replace(" ", "\u00a0"), "is the prompt"),
    (ASKED, f"{ASKED}\n\nMostly of sleep.", "begins with the prompt"),
    (ASKED, f"{ASKED.lower()} Mostly of sleep.", "begins with the prompt"),
    ("Write a poem about the sea", "Write a poem about the sea\nO sea!", "begins with the prompt"),
    ([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."},
      {"role": "user", "content": ASKED}], ASKED, "is the last turn"),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}], f"{ASKED} Sleep.",
     "begins with the last turn")])
def test_a_prompt_that_is_said_back(prompt: Prompt, completion: str, said: str) -> None:
    assert repeats_prompt(prompt, completion) == said


@pytest.mark.parametrize(("prompt", "completion"), [
    ("Repeat after me: the tide is out.", "The tide is out."), ("Hello!", "Hello!"),
    ("Photosynthesis", "Photosynthesis is how plants eat."),
    ("The capital of France is", "The capital of France is Paris."), (ASKED, "Of bread."), (ASKED, ""),
    ("Tell me what a proverb is.", 'When you ask "Tell me what a proverb is." I think of my aunt.'),
    ("def add(a, b):", "def add(a, b):\n    return a + b"), ("Name a bird.", "Name a bird? The wren.")])
def test_an_answer_that_begins_alike(prompt: str, completion: str) -> None:
    assert repeats_prompt(prompt, completion) == ""


def test_a_completion_that_many_prompts_share() -> None:
    refusal = "I am sorry, but I cannot help with that."
    rows = [(f"p{n}", refusal if n < 24 else f"Answer number {n}, in full.") for n in range(40)]
    assert shared_completions(rows) == [(refusal, 24, 40)]
    mixed = [(prompt, text.upper() if prompt > "p2" else text) for prompt, text in rows]
    assert [found[1:] for found in shared_completions(mixed)] == [(24, 40)]
    assert shared_completions(rows[15:]) == []  # nine
    others = [(f"q{n}", f"Another answer {n}, in full.") for n in range(300)]
    assert shared_completions([*rows[:12], *others]) == []  # 4 %


def test_labels_and_several_rankings_of_one_prompt_share_completions() -> None:
    assert shared_completions([(f"p{n}", "Yes.") for n in range(40)]) == []
    assert shared_completions([("p", "One answer that ten labelers rank.")] * 12) == []
