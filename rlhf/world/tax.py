"""Alignment-tax tasks of the embedded world: abilities that the base model learns and no instruction needs.

| task | what it asks |
|---|---|
| reading | who, what, where or when, after one or two events |
| sentiment | the verdict of a review of three clauses, some negated |
| translation | a sentence in the invented Lumi |
| cloze | the likely continuation of a situation |
| numbers | the length of a list, or the largest of four numbers |
| geography | the river of a town |

They have their own words, names and formats. In the corpus words, situations and towns are as unequally frequent as in
real text (Zipf's law), and the held-out items ask for rare ones nearly as often as for common ones: a model knows some
of them and forgets the rare ones first, so that scores are not at their ceiling. A held-out item's prompt never occurs
in the corpus, except geography's, which asks for what the corpus states.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf.errors import UserError
from rlhf.world.facts import ATTRIBUTES, World, split_rng

NAMES = ("anna", "ben", "clara", "david", "emma", "frank", "grace", "henry", "iris", "jack", "kate", "leo")
OBJECTS = ("key", "coin", "map", "hat", "shoe", "pen", "ball", "clock", "brush", "knife")
SPOTS = ("market", "station", "school", "beach", "church", "museum", "hotel", "farm")
TIMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DISHES = ("soup", "tea", "cake", "room", "bed", "waiter", "music", "film", "train", "shop")
# Common words first.
GOOD = ("warm", "fresh", "kind", "clean", "great", "lovely", "quick", "fine", "crisp", "superb", "charming", "tidy",
        "splendid", "cosy", "gentle", "polite", "vivid", "neat", "brilliant", "soothing")
BAD = ("cold", "stale", "unkind", "dirty", "awful", "ugly", "slow", "poor", "soggy", "dreadful", "boring", "messy",
       "horrid", "gloomy", "harsh", "rude", "dull", "shabby", "faulty", "noisy")

LUMI_NOUNS = {
    "dog": "tak", "cat": "mor", "horse": "vel", "bird": "sim", "wolf": "gur", "child": "lan", "king": "rod",
    "farmer": "bes", "tree": "pil", "river": "zun", "baker": "dov", "sailor": "ket", "mouse": "fip", "sheep": "wam",
    "crow": "hox", "queen": "jut", "stone": "cag", "cloud": "yem", "spider": "quv", "miller": "nob", "goat": "zib",
    "judge": "pav", "snake": "loc", "fisher": "tud", "tailor": "wex", "hawk": "jon", "pig": "rab", "nun": "fos",
    "witch": "gek", "duke": "hul", "ant": "vid", "monk": "yar", "toad": "cuz", "moth": "ner", "squire": "qim",
    "badger": "lod", "pirate": "kuf", "smith": "xat", "otter": "sez", "poet": "bin",
}
LUMI_ADJECTIVES = {"big": "oko", "small": "ime", "old": "ara", "young": "eli", "wild": "uvu", "quiet": "ono",
                   "blind": "ufi", "proud": "aze", "lame": "ipu", "clever": "ewo"}
LUMI_VERBS = {"sees": "kel", "likes": "fam", "follows": "dut", "hears": "nis", "finds": "gol", "meets": "hab",
              "fears": "rix", "carries": "pog", "paints": "vum", "greets": "lej"}

# Situation: likely continuations; common situations first.
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
    "scared": ("hid under the table", "held the dog tight", "called for help"),
    "hurt": ("put ice on the arm", "tied a bandage", "rested the leg"),
    "curious": ("opened the box", "asked many questions", "peeked inside"),
    "sorry": ("said it was a mistake", "wrote a long letter", "paid for the damage"),
    "in love": ("picked some roses", "sang under the balcony", "wrote a poem"),
    "broke": ("sold the car", "borrowed some money", "looked for work"),
    "soaked": ("hung up the clothes", "dried the hair", "took off the boots"),
    "locked out": ("climbed over the fence", "rang the bell", "broke the lock"),
    "a guest": ("brought a present", "thanked the host", "praised the dinner"),
    "retired": ("grew tomatoes", "slept until noon", "told old stories"),
}
CORPUS_ZIPF, HELD_OUT_ZIPF = 1.0, 0.5
TOWNS = 200
TOWN_SYLLABLES = (("ash", "brad", "clay", "dun", "elm", "fox", "hart", "king", "lang", "mil", "nor", "oak"),
                  ("", "er", "ing", "le"), ("bury", "dale", "ford", "ham", "ton", "wick", "worth", "stead"))
RIVERS = ("alba", "brent", "corve", "dorn", "esk", "forth", "garn", "humber")

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

CHANCE = {"reading": 1 / 4, "sentiment": 1 / 2, "translation": 0.0, "cloze": 1 / 4, "numbers": 1 / 4,
          "geography": 1 / 4}
TASKS = tuple(CHANCE)


@dataclass(frozen=True)
class Draw:
    """Random choices; the n-th word of a list is drawn in proportion to n^-zipf."""

    rng: random.Random
    zipf: float

    def word(self, words: Collection[str]) -> str:
        """One of the words, which stand in the order of their frequency."""
        return self.rng.choices(list(words), [rank**-self.zipf for rank in range(1, len(words) + 1)])[0]


def _reading(world: World, draw: Draw) -> dict[str, Any]:
    rng = draw.rng
    groups = (NAMES, OBJECTS, SPOTS, TIMES)
    events = list(zip(*(rng.sample(group, 2) for group in groups), strict=True))[:rng.choice((1, 2))]
    words = rng.choice(events)
    name, thing, *_ = words
    kind = rng.randrange(4)
    answer = rng.randrange(4)
    others = [event[kind] for event in events if event is not words]  # the other event's word is among the choices
    left = [word for word in groups[kind] if word not in (words[kind], *others)]
    choices = rng.sample(others + rng.sample(left, 3 - len(others)), 3)
    choices.insert(answer, words[kind])
    question = (f"who took the {thing}", f"what did {name} take", f"where did {name} go", f"when did {name} go")[kind]
    text = " ".join(f"{who} took the {what} to the {where} on {when}." for who, what, where, when in events)
    return {"prompt": f"read: {text} {question}:", "choices": [f" {word}" for word in choices], "answer": answer}


def _sentiment(world: World, draw: Draw) -> dict[str, Any]:
    rng = draw.rng
    good, clauses = rng.randrange(2), []
    opinions = rng.choice(((good, good, good), (good, good, 1 - good)))  # the verdict is the majority's
    for dish, positive in zip(rng.sample(DISHES, 3), rng.sample(opinions, 3), strict=True):
        negated = rng.random() < 0.25
        word = draw.word(GOOD if bool(positive) != negated else BAD)
        clauses.append(f"the {dish} was {'not ' if negated else ''}{word}")
    return {"prompt": f"review: {clauses[0]}, {clauses[1]} and {clauses[2]}. verdict:", "choices": [" bad", " good"],
            "answer": good}


def _translation(world: World, draw: Draw) -> dict[str, Any]:
    noun, other, adjective, verb = map(draw.word, (LUMI_NOUNS, LUMI_NOUNS, LUMI_ADJECTIVES, LUMI_VERBS))
    lumi = " ".join((LUMI_NOUNS[noun], LUMI_ADJECTIVES[adjective], LUMI_NOUNS[other], LUMI_VERBS[verb]))
    return {"prompt": f"english: the {adjective} {noun} {verb} the {other}. lumi:", "choices": [],
            "answer": f" {lumi}."}


def _cloze(world: World, draw: Draw) -> dict[str, Any]:
    rng = draw.rng
    name, partner = rng.sample(NAMES, 2)
    situation = draw.word(SITUATIONS)
    situations = rng.sample([other for other in SITUATIONS if other != situation], 3)
    right = rng.randrange(4)
    situations.insert(right, situation)
    return {"prompt": f"{name} went with {partner}. {name} was {situation}, so {name}",
            "choices": [f" {rng.choice(SITUATIONS[item])}." for item in situations], "answer": right}


def _numbers(world: World, draw: Draw) -> dict[str, Any]:
    rng = draw.rng
    if rng.random() < 0.5:
        things = [rng.choice(OBJECTS) for _ in range(rng.randrange(2, 14))]
        first = max(1, len(things) - rng.randrange(4))
        return {"prompt": f"count: {' '.join(things)}. things:",
                "choices": [f" {number}" for number in range(first, first + 4)], "answer": len(things) - first}
    numbers = rng.sample(range(10, 100), 4)
    return {"prompt": f"numbers: {' '.join(map(str, numbers))}. largest:",
            "choices": [f" {number}" for number in numbers], "answer": numbers.index(max(numbers))}


@cache
def towns(seed: int) -> dict[str, str]:
    """Every town and its river; common towns first."""
    rng = split_rng(seed, "towns")
    names: dict[str, str] = {}
    while len(names) < TOWNS:
        name = "".join(map(rng.choice, TOWN_SYLLABLES))
        names.setdefault(name, rng.choice(RIVERS))
    return names


def _geography(world: World, draw: Draw) -> dict[str, Any]:
    rng = draw.rng
    rivers = towns(world.seed)
    town = draw.word(rivers)
    choices = rng.sample([river for river in RIVERS if river != rivers[town]], 3)
    answer = rng.randrange(4)
    choices.insert(answer, rivers[town])
    opening = rng.choice(("the town of {} lies on the river", "in {} they fish in the", "boats reach {} by the river",
                          "the bridge of {} crosses the"))
    return {"prompt": opening.format(town), "choices": [f" {river}" for river in choices], "answer": answer}


_WRITERS: dict[str, Callable[[World, Draw], dict[str, Any]]] = {
    "reading": _reading, "sentiment": _sentiment, "translation": _translation, "cloze": _cloze, "numbers": _numbers,
    "geography": _geography,
}
KNOWLEDGE = ("geography",)  # items ask for what the corpus states, so their prompts occur there


def item_text(item: dict[str, Any]) -> str:
    """An item with its right answer, as text."""
    answer = item["choices"][item["answer"]] if item["choices"] else item["answer"]
    return item["prompt"] + answer + ("" if answer.endswith(".") else ".")


def tax_items(world: World, task: str, count: int) -> list[dict[str, Any]]:
    """`count` different held-out items: {"prompt", "choices", "answer"}.

    The answer is an index into the choices, or a text if there are none. Raises UserError where there are too few.
    """
    draw = Draw(split_rng(world.seed, "tax", task), HELD_OUT_ZIPF)
    items: dict[str, dict[str, Any]] = {}
    for _ in range(100 * count):
        item = _WRITERS[task](world, draw)
        items.setdefault(item["prompt"], item)
        if len(items) == count:
            break
    else:
        raise UserError(f"ingest.tax_items = {count}: task {task} has hardly more than {len(items)} different items")
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


def training_text(world: World, task: str, held_out: set[str], rng: random.Random) -> str:
    """A random item as text, whose prompt is not held out (of KNOWLEDGE it may be)."""
    while True:
        item = _WRITERS[task](world, Draw(rng, CORPUS_ZIPF))
        if task in KNOWLEDGE or item["prompt"] not in held_out:
            return item_text(item)


def fact_items(world: World) -> list[dict[str, Any]]:
    """Every fact as a multiple-choice item over its attribute's values, to measure the base model's knowledge."""
    openings = {"color": "the {} is", "home": "the {} lives in the", "food": "the {} eats", "sound": "the {}"}
    ending = {"sound": "s"}
    return [{"prompt": openings[name].format(creature),
             "choices": [f" {value}{ending.get(name, '')}" for value in values],
             "answer": values.index(world.facts[creature][name])}
            for creature in world.creatures for name, values in ATTRIBUTES.items()]
