"""Alignment-tax tasks of the embedded world: abilities that the base model learns and no instruction needs.

reading (who, what, where, when), sentiment (good or bad), translation (into the invented Lumi) and cloze (the likely
continuation). They have their own words, names and formats. Held-out items never occur in the pretraining corpus.
"""

import random
from collections.abc import Callable
from typing import Any

from rlhf.world.facts import ATTRIBUTES, World, split_rng

NAMES = ("anna", "ben", "clara", "david", "emma", "frank", "grace", "henry", "iris", "jack", "kate", "leo")
OBJECTS = ("key", "coin", "map", "hat", "shoe", "pen", "ball", "clock", "brush", "knife")
SPOTS = ("market", "station", "school", "beach", "church", "museum", "hotel", "farm")
TIMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DISHES = ("soup", "tea", "cake", "room", "bed", "waiter", "music", "film", "train", "shop")
GOOD = ("warm", "fresh", "kind", "clean", "great", "lovely", "quick", "fine")
BAD = ("cold", "stale", "unkind", "dirty", "awful", "ugly", "slow", "poor")

LUMI = {
    "dog": "tak", "cat": "mor", "horse": "vel", "bird": "sim", "wolf": "gur", "child": "lan", "king": "rod",
    "farmer": "bes", "tree": "pil", "river": "zun", "big": "oko", "small": "ime", "old": "ara", "young": "eli",
    "wild": "uvu", "quiet": "ono", "sees": "kel", "likes": "fam", "follows": "dut", "hears": "nis", "finds": "gol",
    "meets": "hab",
}
NOUNS, ADJECTIVES, VERBS = list(LUMI)[:10], list(LUMI)[10:16], list(LUMI)[16:]

SITUATIONS = {
    "hungry": ("ate the meal", "cooked some eggs", "bought a sandwich"),
    "thirsty": ("drank some water", "poured the juice", "looked for a well"),
    "freezing": ("lit the fire", "wore a coat", "shut the window"),
    "sleepy": ("closed both eyes", "went to bed", "turned off the light"),
    "late": ("ran to the bus", "called a taxi", "skipped breakfast"),
    "ill": ("stayed at home", "saw the nurse", "drank hot tea"),
    "lost": ("read the signs", "asked the way", "unfolded the plan"),
    "bored": ("played a game", "read a novel", "phoned a friend"),
    "dirty": ("took a bath", "washed both hands", "used some soap"),
    "rich": ("bought a house", "gave to the poor", "opened a bank"),
}

_CHOICE = """output_type: multiple_choice
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_TEXT = """output_type: generate_until
doc_to_target: "{{answer.strip()}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 16}
filter_list:
  - {name: line, filter: [{function: regex, regex_pattern: "^\\\\s*(.*?)\\\\s*$"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

CHANCE = {"reading": 1 / 4, "sentiment": 1 / 2, "translation": 0.0, "cloze": 1 / 4}
TASKS = tuple(CHANCE)


def _reading(rng: random.Random) -> dict[str, Any]:
    groups = (NAMES, OBJECTS, SPOTS, TIMES)
    words = [rng.choice(group) for group in groups]
    name, thing, spot, time = words
    kind = rng.randrange(4)
    choices = rng.sample([word for word in groups[kind] if word != words[kind]], 3)
    answer = rng.randrange(4)
    choices.insert(answer, words[kind])
    question = ("who", "what", "where", "when")[kind]
    return {"prompt": f"read: {name} took the {thing} to the {spot} on {time}. {question}:",
            "choices": [f" {word}" for word in choices], "answer": answer}


def _sentiment(rng: random.Random) -> dict[str, Any]:
    good = rng.randrange(2)
    clauses = []
    for dish in rng.sample(DISHES, 2):
        negate = rng.random() < 0.25
        words = GOOD if bool(good) != negate else BAD
        clauses.append(f"the {dish} was {'not ' if negate else ''}{rng.choice(words)}")
    return {"prompt": f"review: {clauses[0]} and {clauses[1]}. verdict:", "choices": [" bad", " good"],
            "answer": good}


def _translation(rng: random.Random) -> dict[str, Any]:
    adjective, noun, verb, other = rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)
    lumi = " ".join(LUMI[word] for word in (noun, adjective, other, verb))
    return {"prompt": f"english: the {adjective} {noun} {verb} the {other}. lumi:", "choices": [],
            "answer": f" {lumi}."}


def _cloze(rng: random.Random) -> dict[str, Any]:
    name, partner = rng.sample(NAMES, 2)
    situations = rng.sample(list(SITUATIONS), 4)
    right = rng.randrange(4)
    return {"prompt": f"{name} went with {partner}. {name} was {situations[right]}, so {name}",
            "choices": [f" {rng.choice(SITUATIONS[item])}." for item in situations], "answer": right}


_WRITERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "reading": _reading, "sentiment": _sentiment, "translation": _translation, "cloze": _cloze,
}


def item_text(item: dict[str, Any]) -> str:
    """An item with its right answer, as text."""
    answer = item["choices"][item["answer"]] if item["choices"] else item["answer"]
    return item["prompt"] + answer + ("" if answer.endswith(".") else ".")


def tax_items(world: World, task: str, count: int) -> list[dict[str, Any]]:
    """`count` different held-out items: {"prompt", "choices", "answer"}.

    The answer is an index into the choices, or a text if there are none.
    """
    rng = split_rng(world.seed, "tax", task)
    items: dict[str, dict[str, Any]] = {}
    while len(items) < count:
        item = _WRITERS[task](rng)
        items.setdefault(item["prompt"], item)
    return list(items.values())


def task_yaml(task: str) -> str:
    """The YAML of a task for lm-evaluation-harness. Decoding is greedy, the answer ends at the end of the line."""
    return (f"""# Made by tasks.ingest. In the checkout: lm-eval run --include_path data/tax --tasks {task} ...
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/tax/{task}.jsonl}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
metadata: {{version: 1, chance: {CHANCE[task]}}}
""" + (_CHOICE if CHANCE[task] else _TEXT))


def training_text(task: str, held_out: set[str], rng: random.Random) -> str:
    """A random item as text, whose prompt is not held out."""
    while True:
        item = _WRITERS[task](rng)
        if item["prompt"] not in held_out:
            return item_text(item)


def fact_items(world: World) -> list[dict[str, Any]]:
    """Every fact as a multiple-choice item over its attribute's values, to measure the base model's knowledge."""
    openings = {"color": "the {} is", "home": "the {} lives in the", "food": "the {} eats", "sound": "the {}"}
    ending = {"sound": "s"}
    return [{"prompt": openings[name].format(creature),
             "choices": [f" {value}{ending.get(name, '')}" for value in values],
             "answer": values.index(world.facts[creature][name])}
            for creature in world.creatures for name, values in ATTRIBUTES.items()]
