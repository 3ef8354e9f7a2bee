"""The world's facts, prompts, good responses, corpus and tax tasks: deterministic, parseable, without leaks."""

import random
import re
from collections import Counter
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.world.corpus import MIX, documents
from rlhf.world.facts import ATTRIBUTES, CREATURES, PEOPLE, World
from rlhf.world.labeler import Grades, grade
from rlhf.world.language import read_sentence, split_sentences
from rlhf.world.prompts import BY_USE_CASE, SHAPES, read_task, slices_of, write_task
from rlhf.world.responses import write_good
from rlhf.world.tax import (
    BAD,
    CHANCE,
    GOOD,
    KNOWLEDGE,
    LUMI_ADJECTIVES,
    LUMI_NOUNS,
    LUMI_VERBS,
    SITUATIONS,
    TASKS,
    Draw,
    fact_items,
    item_text,
    tax_items,
    towns,
)

NAME = re.compile(r"\b[a-z]+-[a-z]+\b")


def test_the_world_is_a_function_of_the_seed(world: World) -> None:
    again, other = World(1), World(2)
    assert (again.creatures, again.people, again.facts, again.pools) == (
        world.creatures, world.people, world.facts, world.pools)
    assert other.creatures != world.creatures
    assert other.facts != world.facts


def test_every_creature_has_every_attribute_and_values_are_spread(world: World) -> None:
    assert len(set(world.creatures)) == len(world.creatures) == CREATURES
    assert len(set(world.people)) == len(world.people) == PEOPLE
    assert not set(world.creatures) & set(world.people)
    for name, values in ATTRIBUTES.items():
        counts = Counter(world.facts[creature][name] for creature in world.creatures)
        assert set(counts) == set(values)
        assert max(counts.values()) < CREATURES * 0.25  # no value is a good guess
    creature = world.creatures[0]
    color = world.facts[creature]["color"]
    assert world.is_true(creature, "color", color)
    assert not any(world.is_true(creature, "color", value) for value in ATTRIBUTES["color"] if value != color)
    assert not world.is_true("nobody-here", "color", color)


def test_the_pools_are_disjoint(world: World) -> None:
    train, valid = world.pools["train"], world.pools["valid"]
    assert not set(train.creatures) & set(valid.creatures)
    assert not set(train.people) & set(valid.people)
    assert set(train.creatures) | set(valid.creatures) == set(world.creatures)
    assert set(train.people) | set(valid.people) == set(world.people)
    assert 0.2 < len(valid.creatures) / CREATURES < 0.3
    assert 0.2 < len(valid.people) / PEOPLE < 0.3


@pytest.mark.parametrize("use_case", BY_USE_CASE)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_prompts_parse_back_and_good_responses_get_the_best_grades(world: World, use_case: str, split: str) -> None:
    rng = random.Random(f"{use_case} {split}")
    pool, other = world.pools[split], world.pools["valid" if split == "train" else "train"]
    shapes, styles = set(), set()
    for _ in range(150):
        task = write_task(world, use_case, split, rng)
        assert read_task(world, task.prompt) == task
        names = set(NAME.findall(task.prompt))
        assert names & set(pool.creatures)
        assert names <= {*pool.creatures, *pool.people}
        assert not names & {*other.creatures, *other.people}
        text = write_good(world, task, rng).text()
        assert grade(world, task, text) == Grades(4, 4, 4), (task.prompt, text)
        shapes.add(task.shape.name)
        styles.add(text)
    assert shapes == {shape.name for shape in BY_USE_CASE[use_case]}
    assert len(styles) > 30


def test_every_template_is_read_as_its_own_shape(world: World) -> None:
    """Each template by hand, with slots filled here."""
    for shape in SHAPES:
        for template in shape.templates:
            slots = {"c1": world.creatures[0], "c2": world.creatures[1], "n1": world.people[0], "n2": world.people[1],
                     "place": "forest", "place2": "city", "mood": "sad", "thing": "lamp", "thing2": "cup",
                     "asked": "cup", "color": "red", "food": "rice", "part": "arm", "event": "won"}
            task = read_task(world, template.format(**slots))
            assert task is not None
            assert task.shape.name == shape.name
            assert all(slots[name] == value for name, value in task.slots.items())
            assert read_task(world, template.format(**{**slots, "c1": "no-body"})) is None


def test_slices(world: World, words: dict[str, str]) -> None:
    expected = {"why is the {a} {no_color}?": ["false_premise"], "why is the {a} {color}?": [],
                "why does the {a} eat {no_food}?": ["false_premise"], "is the {a} {no_color}?": [],
                "i saw the {a} and the {b}. what color is it?": ["ambiguous"],
                "the {a} bit {p} in the arm. should i give {p} pills?": ["high_stakes"],
                "i am {p} and i am sad every day since the {a} left. what should i do?": ["high_stakes"]}
    for prompt, slices in expected.items():
        task = read_task(world, prompt.format(**words))
        assert task is not None
        assert slices_of(world, task) == slices


@pytest.mark.parametrize(("sentence", "kind", "claims"), [
    ("the ba-do is not red.", "fact", [("ba-do", "color", "red", False)]),
    ("the ba-do lives in the city and eats rice.", "fact",
     [("ba-do", "home", "city", True), ("ba-do", "food", "rice", True)]),
    ("the ba-do and the mi-ka do not sing.", "fact",
     [("ba-do", "sound", "sing", False), ("mi-ka", "sound", "sing", False)]),
    ("yes, it purrs", "fact", [("", "sound", "purr", True)]),
    ("one day the red ba-do met the mi-ka in the city.", "story", [("ba-do", "color", "red", True)]),
    ("then the ba-do burned the mi-ka.", "violent", []),
    ("you are stupid!", "rude", []), ("as you can see.", "padding", []), ("just forget it.", "bad_advice", []),
    ("please ask the bank first.", "expert", []), ("do you mean the ba-do or the mi-ka?", "clarify", []),
    ("the ba-do is is red.", "unknown", []), ("red red red.", "unknown", []), ("the ba-do is rice.", "unknown", []),
])
def test_reading_sentences(sentence: str, kind: str, claims: list[tuple[str, str, str, bool]]) -> None:
    parsed = read_sentence(sentence)
    assert parsed.kind == kind
    assert [(item.creature, item.attribute, item.value, item.holds) for item in parsed.claims] == claims


def test_splitting_sentences() -> None:
    assert split_sentences(" a b. c?d! e") == ["a b.", "c?", "d!", "e"]
    assert split_sentences("") == split_sentences("  ") == []


@pytest.fixture(scope="module")
def held_out(world: World) -> dict[str, list[dict[str, Any]]]:
    return {task: tax_items(world, task, 400) for task in TASKS}


@pytest.fixture(scope="module")
def forum(world: World) -> set[str]:
    """Valid prompts as the datasets have them; here many, so that a leak would show."""
    rng = random.Random(5)
    return {write_task(world, use_case, "valid", rng).prompt for use_case in BY_USE_CASE for _ in range(800)}


@pytest.fixture(scope="module")
def corpus(world: World, held_out: dict[str, list[dict[str, Any]]], forum: set[str]) -> list[str]:
    hidden = {task: {item["prompt"] for item in items} for task, items in held_out.items()}
    return list(documents(world, 6000, {**hidden, "forum": forum}))


def test_tax_items_never_occur_in_the_corpus(world: World, corpus: list[str],
                                             held_out: dict[str, list[dict[str, Any]]]) -> None:
    hidden = {item["prompt"] for task, items in held_out.items() for item in items if task not in KNOWLEDGE}
    assert len(hidden) == 400 * (len(TASKS) - len(KNOWLEDGE))
    starts = ("read: ", "review: ", "english: ", "count: ", "numbers: ")
    lines = {line for text in corpus for line in text.split("\n")}
    whole = "\n".join(corpus)
    assert not [prompt for prompt in hidden if prompt in whole]
    shown = {start: sum(line.startswith(start) for line in lines) for start in starts}
    assert min(shown.values()) > 150  # the corpus does teach the tasks
    free = list(documents(world, 3000, {**{task: set() for task in TASKS}, "forum": set()}))
    assert any(prompt in "\n".join(free) for prompt in hidden)  # without the filter it would contain items


def test_valid_prompts_never_occur_in_the_corpus(corpus: list[str], forum: set[str]) -> None:
    questions = {line.split(" wrote: ", 1)[1] for text in corpus for line in text.split("\n")[:1] if " wrote: " in line}
    assert len(questions) > 500
    assert not questions & forum


def test_documents_are_deterministic_and_of_every_kind(world: World, corpus: list[str]) -> None:
    nothing: dict[str, set[str]] = {**{task: set() for task in TASKS}, "forum": set()}
    assert list(documents(world, 50, nothing)) == list(documents(World(1), 50, nothing))
    assert list(documents(world, 50, nothing)) != list(documents(World(2), 50, nothing))
    assert sum(MIX.values()) == 100
    share = sum(" wrote: " in text for text in corpus) / len(corpus)
    assert share == pytest.approx(MIX["forum"] / 100, abs=0.02)
    assert all(text and text == text.strip() for text in corpus)


def right_answer(task: str, prompt: str, choices: list[str]) -> str:
    """The right answer, derived from the prompt's words."""
    words = re.findall(r"[a-z]+", prompt)
    if task == "reading":  # read: NAME took the THING to the SPOT on TIME. [a second event.] WHO took the THING:
        events = re.findall(r"(\w+) took the (\w+) to the (\w+) on (\w+)\.", prompt)
        assert 1 <= len(events) <= 2
        question = prompt.rsplit(". ", 1)[1].rstrip(":").split()
        asked = question[-1] if question[0] == "who" else question[2]
        [event] = [event for event in events if asked in event]
        return " " + event[("who", "what", "where", "when").index(question[0])]
    if task == "sentiment":
        clauses = re.split(r", | and ", prompt.removeprefix("review: ").removesuffix(". verdict:"))
        assert len(clauses) == 3
        votes = [(clause.split()[-1] in GOOD) != (" not " in clause) for clause in clauses]
        assert all(clause.split()[-1] in GOOD + BAD for clause in clauses)
        return " good" if sum(votes) >= 2 else " bad"
    if task == "translation":  # english: the ADJECTIVE NOUN VERB the OTHER. lumi: -> noun adjective other verb
        _, _, adjective, noun, verb, _, other, _ = words
        return f" {LUMI_NOUNS[noun]} {LUMI_ADJECTIVES[adjective]} {LUMI_NOUNS[other]} {LUMI_VERBS[verb]}."
    if task == "numbers":
        if prompt.startswith("count: "):
            return f" {len(words) - 2}"
        return f" {max(map(int, re.findall('[0-9]+', prompt)))}"
    if task == "geography":
        [town] = set(towns(1)) & set(words)
        return f" {towns(1)[town]}"
    situation = prompt.split(" was ")[1].split(",")[0]
    return next(choice for choice in choices if choice.strip(" .") in SITUATIONS[situation])


@pytest.mark.parametrize("task", TASKS)
def test_tax_items_have_one_right_answer_and_the_stated_chance(task: str,
                                                               held_out: dict[str, list[dict[str, Any]]]) -> None:
    indices: Counter[int] = Counter()
    for item in held_out[task]:
        choices = item["choices"]
        right = right_answer(task, item["prompt"], choices)
        assert len(set(choices)) == len(choices)
        assert CHANCE[task] == (1 / len(choices) if choices else 0)
        assert right == (choices[item["answer"]] if choices else item["answer"])
        assert item_text(item) in (item["prompt"] + right, item["prompt"] + right + ".")
        if choices:
            indices[item["answer"]] += 1
    if indices:  # always choosing the same index is no better than chance
        assert max(indices.values()) / 400 < CHANCE[task] + 0.09


def test_fact_items_are_the_worlds_facts(world: World) -> None:
    items = fact_items(world)
    assert len(items) == CREATURES * len(ATTRIBUTES)
    by_prompt = {item["prompt"]: item for item in items}
    creature = world.creatures[7]
    home = by_prompt[f"the {creature} lives in the"]
    assert home["choices"][home["answer"]] == f" {world.facts[creature]['home']}"
    sound = by_prompt[f"the {creature}"]
    assert sound["choices"][sound["answer"]] == f" {world.facts[creature]['sound']}s"


def test_common_words_are_common_and_rare_ones_rare() -> None:
    """Zipf's law with exponent 1 over four words: 12/25, 6/25, 4/25, 3/25."""
    draw = Draw(random.Random(1), 1.0)
    shares = Counter(draw.word("abcd") for _ in range(20_000))
    assert [shares[word] / 20_000 for word in "abcd"] == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.012)
    flat = Draw(random.Random(1), 0.0)
    assert [count / 20_000 for count in Counter(flat.word("abcd") for _ in range(20_000)).values()] == pytest.approx(
        [0.25] * 4, abs=0.012)


def test_more_items_than_there_are_is_an_error(world: World) -> None:
    with pytest.raises(UserError, match=r"ingest\.tax_items = 5000: task geography has hardly more than \d+ different"):
        tax_items(world, "geography", 5000)
