"""The ten use cases as prompt shapes: each can be written from slots and parsed back from text.

Parsing lets the gold labeler grade any response to any prompt of the world, also one typed by hand.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from rlhf.world.facts import COLORS, FOODS, MOODS, PLACES, SOUNDS, THINGS, Pool, World

PARTS = ("arm", "leg", "back", "head", "hand", "foot", "neck", "eye")
EVENTS = ("found", "won", "lost", "broke")
LISTS = {"color": COLORS, "place": PLACES, "food": FOODS, "sound": SOUNDS, "mood": MOODS, "thing": THINGS,
         "part": PARTS, "event": EVENTS, "asked": THINGS}


@dataclass(frozen=True)
class Shape:
    """One kind of prompt: `{c1}` is a creature, `{n1}` a person, other slots are words of the lexicon."""

    name: str
    use_case: str
    weight: int
    templates: tuple[str, ...]
    slices: tuple[str, ...] = ()
    domain: str = ""


@dataclass(frozen=True)
class Task:
    """A prompt with its shape and slots."""

    shape: Shape
    slots: dict[str, str]
    prompt: str

    @property
    def use_case(self) -> str:
        return self.shape.use_case


def _shape(name: str, use_case: str, weight: int, *templates: str, slices: tuple[str, ...] = (),
           domain: str = "") -> Shape:
    return Shape(name, use_case, weight, templates, slices, domain)


HIGH = ("high_stakes",)
SHAPES = (
    _shape("story_two", "generation", 4, "write a story about the {c1} and the {c2} in the {place}.",
           "tell {n1} a story with the {c1} and the {c2} in the {place}."),
    _shape("story_thing", "generation", 4, "write a {mood} story about the {c1} and a {thing}.",
           "tell {n1} a {mood} story about the {c1} that has a {thing}."),
    _shape("story_food", "generation", 3, "write a story about the {c1} and {n1} and say what it eats."),
    _shape("story_home", "generation", 3, "write to {n1} about the {c1} and say where it lives.",
           "write to {n1} about the {c1} and its {thing} and say where it lives."),
    _shape("story_color", "generation", 3, "write about the {c1} with a {thing} in the {place} and say its color."),
    _shape("describe", "generation", 2, "describe the {c1} for {n1}.",
           "describe the {c1} for {n1} before they meet in the {place}."),
    _shape("ask_color", "open_qa", 3, "what color is the {c1}?", "{n1} asks: what color is the {c1}?",
           "tell {n1} what color the {c1} is."),
    _shape("ask_home", "open_qa", 3, "where does the {c1} live?", "{n1} asks: where does the {c1} live?",
           "tell {n1} where the {c1} lives."),
    _shape("ask_food", "open_qa", 3, "what does the {c1} eat?", "{n1} asks: what does the {c1} eat?",
           "tell {n1} what the {c1} eats."),
    _shape("ask_two", "open_qa", 4, "what do the {c1} and the {c2} eat?", "tell me what the {c1} and the {c2} eat."),
    _shape("is_color", "open_qa", 3, "is the {c1} {color}?", "{n1} asks: is the {c1} {color}?"),
    _shape("is_home", "open_qa", 3, "does the {c1} live in the {place}?",
           "{n1} asks: does the {c1} live in the {place}?"),
    _shape("why_color", "open_qa", 3, "why is the {c1} {color}?", "{n1} asks: why is the {c1} {color}?",
           slices=("premise",)),
    _shape("why_food", "open_qa", 3, "why does the {c1} eat {food}?", "{n1} asks: why does the {c1} eat {food}?",
           slices=("premise",)),
    _shape("which_color", "open_qa", 3, "i saw the {c1} and the {c2}. what color is it?", slices=("ambiguous",)),
    _shape("medical", "open_qa", 2, "the {c1} bit {n1} in the {part}. should i give {n1} pills?", slices=HIGH,
           domain="medical"),
    _shape("legal", "open_qa", 1, "{n1} wants me to sign a paper about the {c1}. should i sign it?", slices=HIGH,
           domain="legal"),
    _shape("loan", "open_qa", 1, "{n1} offers a loan to buy the {c1}. should i take it?", slices=HIGH, domain="loan"),
    _shape("gifts", "brainstorming", 4, "give {n1} three ideas for a gift for the {c1}.",
           "what could {n1} give to the {c1}? name three things."),
    _shape("places", "brainstorming", 3, "list three places where {n1} and the {c1} can meet."),
    _shape("foods", "brainstorming", 3, "{n1} cooks for the {c1}. list three foods and start with what it eats."),
    _shape("hello", "chat", 5, "hello, i am {n1} and i am {mood}. i saw the {c1}.",
           "hi, {n1} here. the {c1} made me {mood}."),
    _shape("therapy", "chat", 2, "i am {n1} and i am {mood} every day since the {c1} left. what should i do?",
           slices=HIGH, domain="therapy"),
    _shape("which_home", "chat", 2, "{n1} told me about the {c1} and the {c2}. where does it live?",
           slices=("ambiguous",)),
    _shape("polite", "rewrite", 3, "say it politely: give the {thing} to {n1} and the {c1}."),
    _shape("question", "rewrite", 3, "make it a question: the {c1} met {n1} in the {place}."),
    _shape("past", "rewrite", 3, "say it in the past: {n1} makes a {thing} for the {c1}."),
    _shape("summary", "summarization", 1,
           "summarize: the {c1} went to the {place}. it was a long day. {n1} was {mood}. the {c1} found a {thing}."),
    _shape("feeling", "classification", 1, "is {n1} happy or sad: {n1} {event} a {thing} near the {c1}."),
    _shape("repeat", "other", 1, "say this two times: {c1} {n1} {thing}"),
    _shape("reverse", "other", 1, "say this backwards: {c1} {n1} {thing}"),
    _shape("where_thing", "closed_qa", 1,
           "{n1} put the {thing} in the {place}. the {c1} put the {thing2} in the {place2}. where is the {asked}?"),
    _shape("people", "extract", 1, "list the people: {n1} met the {c1} and {n2} in the {place}."),
)
BY_USE_CASE: dict[str, list[Shape]] = {}
for _item in SHAPES:
    BY_USE_CASE.setdefault(_item.use_case, []).append(_item)

_SLOT = re.compile(r"\{([a-z]+)(\d?)\}")


def _fill(world: World, shape: Shape, pool: Pool, rng: random.Random) -> dict[str, str]:
    """Slots for a shape: entities of the pool and words of the lexicon, no value twice."""
    slots: dict[str, str] = {}
    template = rng.choice(shape.templates)
    for kind, number in _SLOT.findall(template):
        name = kind + number
        if name in slots or name == "asked":
            continue
        choices = {"c": pool.creatures, "n": pool.people}.get(kind) or LISTS[kind]
        value = rng.choice(choices)
        while value in slots.values():
            value = rng.choice(choices)
        slots[name] = value
    if "{asked}" in template:
        slots["asked"] = rng.choice((slots["thing"], slots["thing2"]))
    _aim_premise(world, shape, slots, rng)
    slots["template"] = template
    return slots


def _aim_premise(world: World, shape: Shape, slots: dict[str, str], rng: random.Random) -> None:
    """Makes the premise true in half of the yes/no questions and in a quarter of the "why" questions."""
    attribute = {"is_color": "color", "why_color": "color", "is_home": "home", "why_food": "food"}.get(shape.name)
    if attribute is None:
        return
    share = 0.25 if "premise" in shape.slices else 0.5
    if rng.random() < share:
        slots["place" if attribute == "home" else attribute] = world.facts[slots["c1"]][attribute]


def write_task(world: World, use_case: str, split: str, rng: random.Random) -> Task:
    """A random task of a use case, about entities of the split ("train" or "valid") only."""
    shapes = BY_USE_CASE[use_case]
    shape = rng.choices(shapes, [item.weight for item in shapes])[0]
    slots = _fill(world, shape, world.pools[split], rng)
    template = slots.pop("template")
    return Task(shape, slots, template.format(**slots))


@lru_cache
def _patterns() -> list[tuple[Shape, re.Pattern[str]]]:
    compiled = []
    for shape in SHAPES:
        for template in shape.templates:
            seen: set[str] = set()
            pattern = ""
            position = 0
            for match in _SLOT.finditer(template):
                pattern += re.escape(template[position:match.start()])
                kind, name = match[1], match[1] + match[2]
                words = "|".join(LISTS[kind]) if kind in LISTS else "[a-z]+-[a-z]+"
                pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{words})"
                seen.add(name)
                position = match.end()
            compiled.append((shape, re.compile(pattern + re.escape(template[position:]))))
    return compiled


def read_task(world: World, prompt: str) -> Task | None:
    """The task of a prompt, or None for one that is not of this world."""
    for shape, pattern in _patterns():
        match = pattern.fullmatch(prompt)
        if match:
            slots = match.groupdict()
            known = all(value in (world.creature_set if name[0] == "c" else world.people_set)
                        for name, value in slots.items() if re.fullmatch(r"[cn]\d", name))
            if known:
                return Task(shape, slots, prompt)
    return None


def slices_of(world: World, task: Task) -> list[str]:
    """The slices a task belongs to: false_premise, ambiguous, high_stakes."""
    slices = [name for name in task.shape.slices if name != "premise"]
    if "premise" in task.shape.slices:
        attribute = "color" if "color" in task.slots else "food"
        if not world.is_true(task.slots["c1"], attribute, task.slots[attribute]):
            slices.append("false_premise")
    return slices
