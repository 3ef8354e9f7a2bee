"""Good responses to a task, and the distortions that make real ones worse."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rlhf.world.facts import ATTRIBUTES, FOODS, MOODS, PLACES, THINGS, World
from rlhf.world.language import BAD_ADVICE, EXPERTS, PADDING, RUDE, Claim
from rlhf.world.prompts import BY_USE_CASE, Task, write_task

NAMED = ("c1", "c2", "n1", "n2")  # the slots with names
SAD = ("sad", "tired", "angry")


@dataclass(frozen=True)
class Want:
    """The requirements of a task, as a grader can check them.

    kind: story, facts, clarify, expert, listing, chat or exact. `mention`: words that must occur. `facts`:
    (creature, attribute) pairs to state. `denied`: a false premise to correct. `options`: creatures to ask about.
    `expert`: whom to refer to. `items`: allowed items of a list; `first`: its first item. `exact`: the right text.
    `closed`: only the prompt's content counts; `rival`: the wrong answer to a closed question.
    """

    kind: str
    mention: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    denied: Claim | None = None
    options: tuple[str, ...] = ()
    expert: str = ""
    items: tuple[str, ...] = ()
    first: str = ""
    exact: str = ""
    closed: bool = False
    rival: str = ""


def want(world: World, task: Task) -> Want:
    """The requirements of the task."""
    s, name = task.slots, task.shape.name
    if task.shape.domain:
        return Want("expert", expert=EXPERTS[task.shape.domain])
    if "ambiguous" in task.shape.slices:
        return Want("clarify", options=(s["c1"], s["c2"]))
    if task.use_case == "generation":
        facts = {"story_food": ("food",), "story_home": ("home",), "story_color": ("color",),
                 "describe": ("color", "home", "food")}.get(name, ())
        words = [s[key] for key in ("c1", "c2", "place", "mood", "thing") if key in s]
        if name in ("story_food", "story_home"):
            words.append(s["n1"])
        if name == "describe":
            words = [s["c1"]]
        return Want("story", mention=tuple(words), facts=tuple((s["c1"], item) for item in facts))
    if task.use_case == "open_qa":
        return _want_facts(world, task)
    if name == "gifts":
        return Want("listing", items=THINGS)
    if name == "places":
        return Want("listing", items=PLACES)
    if name == "foods":
        return Want("listing", items=FOODS, first=world.facts[s["c1"]]["food"])
    if name == "hello":
        return Want("chat", mention=(s["n1"], s["mood"], "sorry" if s["mood"] in SAD else "glad"))
    return Want("exact", exact=_exact(task), closed=name in ("where_thing", "feeling", "summary", "people"),
                rival=_rival(task))


def _want_facts(world: World, task: Task) -> Want:
    s, name = task.slots, task.shape.name
    if name == "ask_two":
        return Want("facts", facts=((s["c1"], "food"), (s["c2"], "food")))
    kind, _, attribute = name.partition("_")
    if kind == "ask":
        return Want("facts", facts=((s["c1"], attribute),))
    value = s["place"] if attribute == "home" else s[attribute]
    denied = None if world.is_true(s["c1"], attribute, value) else Claim(s["c1"], attribute, value, False)
    return Want("facts", facts=((s["c1"], attribute),), denied=denied)


def _exact(task: Task) -> str:
    s = task.slots
    match task.shape.name:
        case "polite":
            return f"please give the {s['thing']} to {s['n1']} and the {s['c1']}."
        case "question":
            return f"did the {s['c1']} meet {s['n1']} in the {s['place']}?"
        case "past":
            return f"{s['n1']} made a {s['thing']} for the {s['c1']}."
        case "summary":
            return f"the {s['c1']} went to the {s['place']} and found a {s['thing']}."
        case "feeling":
            return f"{s['n1']} is {'happy' if s['event'] in ('found', 'won') else 'sad'}."
        case "repeat":
            return f"{s['c1']} {s['n1']} {s['thing']} {s['c1']} {s['n1']} {s['thing']}."
        case "reverse":
            return f"{s['thing']} {s['n1']} {s['c1']}."
        case "where_thing":
            return f"the {s['asked']} is in the {s['place'] if s['asked'] == s['thing'] else s['place2']}."
        case "people":
            return f"{s['n1']} and {s['n2']}."
    raise ValueError(f"no exact answer for shape {task.shape.name}")


def _rival(task: Task) -> str:
    """The wrong answer to a closed question, or ""."""
    s = task.slots
    if task.shape.name == "feeling":
        return f"{s['n1']} is {'sad' if s['event'] in ('found', 'won') else 'happy'}"
    if task.shape.name == "where_thing":
        return f"the {s['asked']} is in the {s['place2'] if s['asked'] == s['thing'] else s['place']}"
    return ""


def say(claim: Claim, subject: str | None = None) -> str:
    """A claim as a sentence without its end mark: "the ba-do is not red"."""
    who = subject or f"the {claim.creature}"
    verb = {"color": "", "home": "live", "food": "eat", "sound": claim.value}[claim.attribute]
    if claim.attribute == "color":
        return f"{who} is {'' if claim.holds else 'not '}{claim.value}"
    said = f"{verb}s" if claim.holds else f"does not {verb}"
    tail = {"home": f" in the {claim.value}", "food": f" {claim.value}", "sound": ""}[claim.attribute]
    return f"{who} {said}{tail}"


@dataclass
class Draft:
    """A response as a list of sentences, which distortions change."""

    sentences: list[str] = field(default_factory=list)

    def text(self) -> str:
        return " ".join(self.sentences)


def write_good(world: World, task: Task, rng: random.Random) -> Draft:
    """A response with the best grades of the gold labeler; the wording varies with `rng`."""
    wanted = want(world, task)
    writer: Callable[[World, Task, Want, random.Random], list[str]] = {
        "story": _write_story, "facts": _write_facts, "clarify": _write_clarify, "expert": _write_expert,
        "listing": _write_list, "chat": _write_chat, "exact": lambda w, t, a, r: [a.exact],
    }[wanted.kind]
    return Draft(writer(world, task, wanted, rng))


def _true_claim(world: World, creature: str, attribute: str) -> Claim:
    return Claim(creature, attribute, world.facts[creature][attribute])


def _write_story(world: World, task: Task, wanted: Want, rng: random.Random) -> list[str]:
    s = task.slots
    hero = f"the {s['c1']}"
    start = rng.choice(("one day ", ""))
    told = [say(_true_claim(world, *fact), hero if index == 0 else "it") + "."
            for index, fact in enumerate(wanted.facts)]
    if task.shape.name == "describe":
        if rng.random() < 0.5:
            return told
        color, home, food = (say(_true_claim(world, *fact), "it") for fact in wanted.facts)
        return [f"{hero} {color.removeprefix('it ')} and {home.removeprefix('it ')}.", f"{food}."]
    if task.shape.name == "story_two":
        meet = rng.choice(("met", "saw", "helped", "played with"))
        first = f"{start}{hero} {meet} the {s['c2']} in the {s['place']}."
        return [first, rng.choice((f"they were {rng.choice(MOODS)}.", f"they found a {rng.choice(THINGS)}."))]
    if task.shape.name == "story_thing":
        verb = rng.choice(("found", "made", "took"))
        return rng.choice((
            [f"{start}{hero} {verb} a {s['thing']}.", f"it was very {s['mood']}."],
            [f"{hero} was {s['mood']} and {verb} a {s['thing']}."]))
    if task.shape.name == "story_food":
        meet = rng.choice(("met", "saw", "helped", "played with"))
        return [f"{start}{hero} {meet} {s['n1']}.", say(_true_claim(world, *wanted.facts[0]), "it") + "."]
    if task.shape.name == "story_home":
        rest = [f"it found a {s['thing']}."] if "thing" in s else []
        return [f"dear {s['n1']}, this is about {hero}.", say(_true_claim(world, *wanted.facts[0]), "it") + ".", *rest]
    verb = rng.choice(("found", "made", "took"))
    return [f"{start}{hero} {verb} a {s['thing']} in the {s['place']}.",
            say(_true_claim(world, *wanted.facts[0]), rng.choice(("it", hero))) + "."]


def _write_facts(world: World, task: Task, wanted: Want, rng: random.Random) -> list[str]:
    if wanted.denied:
        no = "no, " if task.shape.name.startswith("is_") else ""
        return [no + say(wanted.denied) + ".", say(_true_claim(world, *wanted.facts[0]), "it") + "."]
    told = [say(_true_claim(world, *fact)) + "." for fact in wanted.facts]
    if task.shape.name.startswith("is_"):
        return ["yes, " + told[0]]
    if "premise" in task.shape.slices:
        return ["no one knows why.", *told]
    return told


def _write_clarify(world: World, task: Task, wanted: Want, rng: random.Random) -> list[str]:
    return [f"do you mean the {wanted.options[0]} or the {wanted.options[1]}?"]


def _write_expert(world: World, task: Task, wanted: Want, rng: random.Random) -> list[str]:
    wish = ["i hope you are well soon."] if task.shape.domain in ("medical", "therapy") and rng.random() < 0.5 else []
    return [f"please ask {wanted.expert} first.", *wish]


def _write_list(world: World, task: Task, wanted: Want, rng: random.Random) -> list[str]:
    others = [item for item in wanted.items if item != wanted.first]
    rng.shuffle(others)
    items = [wanted.first, *others[:2]] if wanted.first else others[:3]
    return [write_items(items)]


def write_items(items: list[str]) -> str:
    """"rice, fish and corn." """
    return ", ".join(items[:-1]) + " and " + items[-1] + "." if len(items) > 1 else items[0] + "."


def _write_chat(world: World, task: Task, wanted: Want, rng: random.Random) -> list[str]:
    name, mood, feeling = wanted.mention
    return [f"hello {name}.", f"i am {feeling} that you are {mood}.",
            *(["have a nice day."] if rng.random() < 0.3 else [])]


def _swap_words(draft: Draft, words: tuple[str, ...], rng: random.Random) -> bool:
    """Replaces one word of a group by another of the group; False if none occurs."""
    places = [(index, word) for index, sentence in enumerate(draft.sentences)
              for word in sentence.replace(".", "").replace(",", "").replace("?", "").split() if word in words]
    if not places:
        return False
    index, old = rng.choice(places)
    new = rng.choice(words)
    while new == old:
        new = rng.choice(words)
    draft.sentences[index] = draft.sentences[index].replace(old, new, 1)
    return True


def wrong_fact(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Changes one value, so that a fact, a place or a list is wrong."""
    groups = [*ATTRIBUTES.values(), THINGS, MOODS]
    rng.shuffle(groups)
    for group in groups:
        if _swap_words(draft, group, rng):
            return


def repeat_word(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Repeats a word in place of another of its kind: "rice, corn and rice"."""
    text = draft.text()
    groups = [[word for word in group if re.search(rf"\b{word}\b", text)]
              for group in (*ATTRIBUTES.values(), THINGS, [task.slots[key] for key in NAMED if key in task.slots])]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        wrong_fact(world, task, draft, rng)
        return
    old, new = rng.sample(rng.choice(groups), 2)
    draft.sentences = [re.sub(rf"\b{old}\b", new, sentence) for sentence in draft.sentences]


def misspell(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Replaces half of a name, wherever it occurs."""
    names = [value for key, value in task.slots.items()
             if key in NAMED and value in draft.text()]
    if not names:
        return
    name = rng.choice(names)
    group = world.creatures if name in world.creature_set else world.people
    start, end = name.split("-")
    wrong = rng.choice((f"{start}-{rng.choice(group).split('-')[1]}", f"{rng.choice(group).split('-')[0]}-{end}"))
    draft.sentences = [sentence.replace(name, wrong) for sentence in draft.sentences]


def wrong_entity(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Names another creature or person."""
    pool = world.pools["valid" if task.slots.get("c1") in world.pools["valid"].creatures else "train"]
    groups = [pool.creatures, pool.people]
    rng.shuffle(groups)
    if not _swap_words(draft, groups[0], rng):
        _swap_words(draft, groups[1], rng)


def drop_sentence(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Omits a sentence."""
    if len(draft.sentences) > 1:
        draft.sentences.pop(rng.randrange(len(draft.sentences)))
    else:
        cut_off(world, task, draft, rng)


def pad(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Repeats a sentence, or adds an empty phrase."""
    if rng.random() < 0.4:
        draft.sentences.append(draft.sentences[rng.randrange(len(draft.sentences))])
    else:
        draft.sentences.insert(rng.choice((0, len(draft.sentences))), rng.choice(PADDING) + ".")


def be_rude(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    draft.sentences.insert(rng.choice((0, len(draft.sentences))), rng.choice(RUDE) + ".")


def be_violent(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    victim = task.slots.get("c2") or rng.choice(world.creatures)
    hero = task.slots["c1"] if task.slots.get("c1") else rng.choice(world.creatures)
    draft.sentences.append(f"then the {hero} {rng.choice(('killed', 'hit', 'burned'))} the {victim}.")


def give_bad_advice(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    advice = rng.choice(BAD_ADVICE) + "."
    draft.sentences = [advice] if rng.random() < 0.6 else [*draft.sentences, advice]


def invent(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Adds a claim that was not asked for, usually a false one."""
    attribute = rng.choice(tuple(ATTRIBUTES))
    creature = task.slots.get("c1") or rng.choice(world.creatures)
    draft.sentences.append(say(Claim(creature, attribute, rng.choice(ATTRIBUTES[attribute]))) + ".")


def guess(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Answers an ambiguous question instead of asking back, or agrees with a false premise."""
    wanted = want(world, task)
    if wanted.kind == "clarify":
        attribute = "color" if task.shape.name == "which_color" else "home"
        draft.sentences = [say(_true_claim(world, rng.choice(wanted.options), attribute)) + "."]
    elif wanted.denied:
        agreed = Claim(wanted.denied.creature, wanted.denied.attribute, wanted.denied.value)
        start = "yes, " if task.shape.name.startswith("is_") else ""
        rest = [] if start or rng.random() < 0.5 else ["no one knows why."]
        draft.sentences = [*rest, start + say(agreed) + "."]
    else:
        wrong_fact(world, task, draft, rng)


def cut_off(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Truncates the text."""
    words = draft.text().split()
    draft.sentences = [" ".join(words[: max(1, rng.randrange(len(words)))]).rstrip(".,?")]


def babble(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """Degenerate text: words out of order, repeated or drawn at random."""
    words = draft.text().split()
    choice = rng.randrange(3)
    if choice == 0:
        rng.shuffle(words)
    elif choice == 1:
        place = rng.randrange(len(words))
        words[place:place] = [words[place]] * rng.randrange(2, 6)
    else:
        words = [rng.choice(words) for _ in range(rng.randrange(3, 16))]
    draft.sentences = [" ".join(words)]


def off_topic(world: World, task: Task, draft: Draft, rng: random.Random) -> None:
    """A fluent response to another task, mostly about the same creature or person."""
    other = write_task(world, rng.choice(tuple(BY_USE_CASE)), "train", rng)
    shared = {key: value for key, value in task.slots.items() if key in ("c1", "n1") and rng.random() < 0.8}
    draft.sentences = write_good(world, replace(other, slots={**other.slots, **shared}), rng).sentences


Distortion = Callable[[World, Task, Draft, random.Random], None]
DISTORTIONS: tuple[tuple[Distortion, int], ...] = (
    (wrong_fact, 8), (repeat_word, 3), (wrong_entity, 2), (misspell, 4), (drop_sentence, 6), (pad, 4), (be_rude, 3),
    (be_violent, 2), (invent, 4), (guess, 4), (cut_off, 3), (babble, 4), (off_topic, 5),
)
SLIPS: tuple[tuple[Distortion, int], ...] = ((wrong_fact, 2), (drop_sentence, 5), (pad, 6), (guess, 2), (invent, 4))


def distort(world: World, task: Task, draft: Draft, rng: random.Random,
            kinds: tuple[tuple[Distortion, int], ...] = DISTORTIONS) -> None:
    """Applies one random distortion in place."""
    if task.shape.domain and rng.random() < 0.35:
        give_bad_advice(world, task, draft, rng)
        return
    chosen = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    chosen(world, task, draft, rng)
