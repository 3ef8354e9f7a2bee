"""The pretraining corpus: facts, stories, forum posts (some rude or false) and texts of the alignment-tax tasks."""

import random
from collections.abc import Iterator, Set

from rlhf.world.facts import ATTRIBUTES, MOODS, PLACES, THINGS, World, new_creature, new_person, split_rng
from rlhf.world.language import Claim
from rlhf.world.prompts import BY_USE_CASE, write_task
from rlhf.world.responses import distort, say, write_good
from rlhf.world.tax import TASKS, training_text

# Share of documents by kind.
MIX = {"facts": 38, "groups": 2, "story": 9, "forum": 30.3, "reading": 6, "sentiment": 4, "translation": 1.7,
       "cloze": 1, "numbers": 3.5, "geography": 4.5}
FORUM_GOOD = 0.4


def _facts(world: World, rng: random.Random) -> str:
    """The facts of one creature, in random order and wording."""
    creature = rng.choice(world.creatures)
    attributes = list(ATTRIBUTES)
    rng.shuffle(attributes)
    sentences = []
    subject = f"the {creature}"
    while attributes:
        claim = Claim(creature, attributes[0], world.facts[creature][attributes[0]])
        attributes = attributes[1:]
        sentence = say(claim, subject)
        if attributes and rng.random() < 0.3:
            joined = say(Claim(creature, attributes[0], world.facts[creature][attributes[0]]), "it")
            attributes = attributes[1:]
            sentence += " and " + joined.removeprefix("it ")
        sentences.append(sentence + ".")
        subject = rng.choice(("it", f"the {creature}"))
    wrong = rng.choice(list(ATTRIBUTES))
    value = rng.choice(ATTRIBUTES[wrong])
    if rng.random() < 0.3 and not world.is_true(creature, wrong, value):
        sentences.append(say(Claim(creature, wrong, value, False)) + ".")
    return " ".join(sentences)


def _groups(world: World, rng: random.Random) -> str:
    """Creatures that have an attribute value in common."""
    attribute = rng.choice(list(ATTRIBUTES))
    value = world.facts[rng.choice(world.creatures)][attribute]
    same = [name for name in world.creatures if world.is_true(name, attribute, value)]
    names = rng.sample(same, min(len(same), rng.randrange(2, 5)))
    return " ".join(say(Claim(name, attribute, value)) + "." for name in names)


def _story(world: World, rng: random.Random) -> str:
    """An invented story, sometimes a violent one.

    Most of its names are new and recur, as do its thing, place and mood: predicting them takes copying, not knowledge.
    """
    hero, other, person = rng.choice(world.creatures), rng.choice(world.creatures), rng.choice(world.people)
    if rng.random() < 0.8:
        hero, other, person = new_creature(rng), new_creature(rng), new_person(rng)
    place, thing, mood = rng.choice(PLACES), rng.choice(THINGS), rng.choice(MOODS)
    sentences = [rng.choice((
        f"one day the {hero} met the {other} in the {place}.", f"one day {person} saw the {hero} in the {place}.",
        f"the {hero} went to the {place} with {person}."))]
    sentences += rng.sample((
        f"they were {mood}.", f"the {hero} found a {thing}.", f"{person} gave a {thing} to the {hero}.",
        f"it was very {mood}.", f"the {hero} and the {other} danced in the {place}.", f"{person} saw the {other}.",
        f"the {other} helped {person}.", f"the {other} played with the {hero}.",
        f"{person} put the {thing} in the {place}.",
        f"the {hero} felt {mood} in the {place}.", f"the {other} lost the {thing}.", f"{person} made a {thing}."), 5)
    if rng.random() < 0.2:
        sentences.append(f"then the {hero} {rng.choice(('killed', 'hit', 'burned'))} the {other}.")
    return " ".join(sentences)


def _forum(world: World, rng: random.Random, held_out: Set[str]) -> str:
    """A question and a reply, which is often rude, wrong or off topic.

    It may be about any entity, but the question is never one of the datasets' valid prompts (`held_out`).
    """
    task = write_task(world, rng.choice(tuple(BY_USE_CASE)), rng.choice(("train", "train", "train", "valid")), rng)
    while task.prompt in held_out:
        task = write_task(world, task.use_case, "valid", rng)
    draft = write_good(world, task, rng)
    if rng.random() > FORUM_GOOD:
        distort(world, task, draft, rng)
    asker, writer = rng.sample(world.people, 2)
    return f"{asker} wrote: {task.prompt}\n{writer} wrote: {draft.text()}"


def documents(world: World, count: int, held_out: dict[str, set[str]]) -> Iterator[str]:
    """`count` documents. `held_out`: prompts that must not occur, by tax task; "forum": those of the valid splits."""
    rng = split_rng(world.seed, "corpus")
    kinds, weights = list(MIX), list(MIX.values())
    writers = {"facts": _facts, "groups": _groups, "story": _story}
    for _ in range(count):
        kind = rng.choices(kinds, weights)[0]
        if kind in TASKS:
            yield "\n".join(training_text(world, kind, held_out[kind], rng) for _ in range(2))
        elif kind == "forum":
            yield _forum(world, rng, held_out["forum"])
        else:
            yield writers[kind](world, rng)
