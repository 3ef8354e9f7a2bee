"""The lexicon and the facts of the world: creatures with four attributes each, people, places, things."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")
PLACES = ("forest", "desert", "village", "island", "valley", "harbor", "garden", "city")
FOODS = ("rice", "fish", "grass", "honey", "nuts", "bread", "corn", "apples")
SOUNDS = ("sing", "hum", "howl", "bark", "click", "purr", "roar", "squeak")
MOODS = ("happy", "sad", "brave", "tired", "calm", "angry")
THINGS = ("lamp", "boat", "drum", "kite", "ring", "book", "basket", "rope", "bell", "cup")
ATTRIBUTES = {"color": COLORS, "home": PLACES, "food": FOODS, "sound": SOUNDS}

CREATURES = 240
PEOPLE = 80
VALID_SHARE = 0.25

# Names are syllables joined by a hyphen, where tokenizers split. The syllables of a held-out name occur in training
# prompts too, so a model can learn to copy names instead of memorising them.
_CONSONANTS = "bdgklmnrtz"
_VOWELS = "aeiou"
_ENDINGS = ("lan", "mir", "ros", "tel", "vik", "sun")


def split_rng(seed: int, *names: object) -> random.Random:
    """A generator for one named purpose, so that the draws of one part never change those of another."""
    return random.Random("/".join(map(str, (seed, *names))))


@dataclass(frozen=True)
class Pool:
    """The names that prompts of one split may contain; train and valid have none in common."""

    creatures: tuple[str, ...]
    people: tuple[str, ...]


class World:
    """Names and facts, a function of the seed alone.

    `facts[creature]` maps each attribute (color, home, food, sound) to its true value. `pools["train"]` and
    `pools["valid"]` hold disjoint creatures and people: prompts of the valid splits are about entities that no
    training prompt mentions.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = split_rng(seed, "names")
        self.creatures = _names(rng, CREATURES, lambda: new_creature(rng))
        self.people = _names(rng, PEOPLE, lambda: new_person(rng))
        rng = split_rng(seed, "facts")
        self.facts = {
            creature: {name: rng.choice(values) for name, values in ATTRIBUTES.items()} for creature in self.creatures
        }
        cut_creatures, cut_people = int(CREATURES * VALID_SHARE), int(PEOPLE * VALID_SHARE)
        self.pools = {
            "valid": Pool(self.creatures[:cut_creatures], self.people[:cut_people]),
            "train": Pool(self.creatures[cut_creatures:], self.people[cut_people:]),
        }

    @cached_property
    def creature_set(self) -> frozenset[str]:
        return frozenset(self.creatures)

    @cached_property
    def people_set(self) -> frozenset[str]:
        return frozenset(self.people)

    def is_true(self, creature: str, attribute: str, value: str) -> bool:
        """Whether the creature's attribute has this value; False for a creature that does not exist."""
        return self.facts.get(creature, {}).get(attribute) == value


def new_creature(rng: random.Random) -> str:
    """A creature's name, such as "zi-bu"."""
    return f"{_syllable(rng)}-{_syllable(rng)}"


def new_person(rng: random.Random) -> str:
    """A person's name, such as "ka-lan"."""
    return f"{_syllable(rng)}-{rng.choice(_ENDINGS)}"


def _syllable(rng: random.Random) -> str:
    return rng.choice(_CONSONANTS) + rng.choice(_VOWELS)


def _names(rng: random.Random, count: int, make: Callable[[], str]) -> tuple[str, ...]:
    """`count` different names."""
    names: dict[str, None] = {}
    while len(names) < count:
        names.setdefault(make())
    return tuple(names)
