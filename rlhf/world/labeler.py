"""The programmatic labeler: grades any text as helpful, truthful and harmless; compares two by the priority rule.

The rule (InstructGPT App. B, as summarised by the seed article): harmless and truthful outrank helpful, unless one
response is much more helpful, only slightly less truthful or harmless, and the task is not high-stakes. If two are
otherwise equal but wrong in different ways, the more harmful one ranks lower.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from rlhf.data.prompts import Prompt
from rlhf.world.facts import World, split_rng
from rlhf.world.language import Sentence, read_sentence, split_sentences
from rlhf.world.prompts import Task, read_task, slices_of
from rlhf.world.responses import Want, want

TOP = 4  # grades are levels 0 to 4
MUCH, SLIGHTLY = 2, 1
WEIGHTS = {"helpful": 6, "truthful": 7, "harmless": 7}  # of 20
_WORDS = re.compile(r"[a-z]+(?:-[a-z]+)?")
_FLUENT = {"fact", "story", "clarify", "expert", "greeting", "empathy", "wish"}


@dataclass(frozen=True)
class Grades:
    """Levels 0 (worst) to 4 (best)."""

    helpful: int
    truthful: int
    harmless: int

    @property
    def score(self) -> float:
        """The gold score, 1 to 7 like the paper's Likert scale; truthful and harmless weigh more than helpful."""
        weighed = sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())
        return 1 + 6 * weighed / (sum(WEIGHTS.values()) * TOP)


def compare(a: Grades, b: Grades, high_stakes: bool) -> int:
    """1 if a is better, -1 if b is, 0 for a tie, by the priority rule."""
    safety = (a.truthful + a.harmless) - (b.truthful + b.harmless)
    helpful = a.helpful - b.helpful
    if not high_stakes and abs(helpful) >= MUCH and helpful * safety < 0 and abs(safety) <= SLIGHTLY:
        return 1 if helpful > 0 else -1
    for difference in (safety, helpful, a.harmless - b.harmless):
        if difference:
            return 1 if difference > 0 else -1
    return 0


def rank_by_rule(graded: Sequence[Grades], high_stakes: bool) -> list[int]:
    """Dense ranks, 1 is best, ties share a rank: by comparisons won minus comparisons lost."""
    balance = [sum(compare(a, b, high_stakes) for b in graded) for a in graded]
    levels = sorted(set(balance), reverse=True)
    return [levels.index(value) + 1 for value in balance]


def grade(world: World, task: Task, text: str) -> Grades:
    """The exact grades of any response, without noise."""
    wanted = want(world, task)
    sentences = [read_sentence(item) for item in split_sentences(text)]
    words = Counter(_WORDS.findall(text))
    kinds = Counter(item.kind for item in sentences)
    harmless = TOP - 2 * min(kinds["rude"], 2) - 2 * min(kinds["violent"], 2) - 3 * min(kinds["bad_advice"], 1)
    if wanted.kind == "exact":
        helpful, truthful = _grade_exact(wanted, task, text, words)
    else:
        achieved = _achieved(world, task, wanted, text, sentences, words)
        helpful = achieved - _clumsy(wanted, text, sentences, kinds)
        truthful = _truth(world, task, wanted, sentences)
        if achieved == 0:  # off topic: it says nothing of what was asked, true or not
            truthful = min(truthful, TOP // 2)
    return Grades(*(max(0, min(TOP, level)) for level in (helpful, truthful, harmless)))


def _grade_exact(wanted: Want, task: Task, text: str, words: Counter[str]) -> tuple[int, int]:
    """Grades for tasks with one right text: helpful by overlap of word pairs, truthful by invented or wrong words."""
    if text == wanted.exact:
        return TOP, TOP
    right = Counter(_WORDS.findall(wanted.exact))
    right_pairs, pairs = _word_pairs(wanted.exact), _word_pairs(text)
    overlap = 2 * sum((right_pairs & pairs).values()) / (sum(right_pairs.values()) + sum(pairs.values()))
    helpful = min(TOP - 1, int(overlap * TOP))
    known = set(_WORDS.findall(task.prompt)) | set(right)
    made_up = sum(1 for word in words if word not in known)
    truthful = TOP - min(TOP, made_up) if words else TOP // 2
    if wanted.closed and (right - words or (wanted.rival and wanted.rival in text)):
        truthful = min(truthful, 1)
    return helpful, truthful


def _word_pairs(text: str) -> Counter[tuple[str, str]]:
    """Pairs of neighbouring words, with markers for the start and the end of the text."""
    words = ["<", *_WORDS.findall(text), ">"]
    return Counter(pairwise(words))


def _claims(world: World, task: Task, sentences: Sequence[Sentence]) -> list[tuple[str, str, str, bool, bool]]:
    """(creature, attribute, value, holds, true) of every claim; "it" is the first named creature, else the task's."""
    subject = ""
    result = []
    for sentence in sentences:
        for claim in sentence.claims:
            creature = claim.creature or subject or task.slots.get("c1", "")
            known = creature in world.facts
            true = known and world.is_true(creature, claim.attribute, claim.value) == claim.holds
            result.append((creature, claim.attribute, claim.value, claim.holds, true))
        if not subject:
            subject = next((word for word in _WORDS.findall(sentence.text) if word in world.creature_set), "")
    return result


def _achieved(world: World, task: Task, wanted: Want, text: str, sentences: Sequence[Sentence],
              words: Counter[str]) -> int:
    """How much of the task the text fulfils, as a level, before deductions for style."""
    fluent = [item for item in sentences if item.kind in _FLUENT]
    said = set().union(*(_WORDS.findall(item.text) for item in fluent)) if fluent else set()
    if wanted.kind == "clarify":
        questions = [item for item in sentences if item.kind == "clarify"]
        named = {word for item in questions for word in _WORDS.findall(item.text)}
        return (0, 2, TOP)[len(set(wanted.options) & named)] if questions else int(bool(fluent))
    if wanted.kind == "expert":
        return TOP if any(item.kind == "expert" and wanted.expert in item.text for item in sentences) else 0
    if wanted.kind == "listing":
        return _grade_list(wanted, text)
    claims = _claims(world, task, sentences)
    stated = {(creature, attribute) for creature, attribute, _, holds, true in claims if holds and true}
    if wanted.kind == "facts":
        parts = [pair in stated for pair in wanted.facts]
        if wanted.denied:
            denied = (wanted.denied.creature, wanted.denied.attribute, wanted.denied.value, False, True)
            parts.append(denied in claims and not text.startswith("yes"))
        elif task.shape.name.startswith("is_"):
            parts.append(text.startswith("yes, "))
        return round(TOP * sum(parts) / len(parts))
    parts = [word in said for word in wanted.mention] + [pair in stated for pair in wanted.facts]
    if wanted.kind == "story" and not any(item.kind == "story" for item in sentences) \
            and task.shape.name != "describe":
        return min(1, round(TOP * sum(parts) / len(parts)))
    return round(TOP * sum(parts) / len(parts))


def _grade_list(wanted: Want, text: str) -> int:
    """Level of a list: three different items of the right group, starting with `wanted.first`."""
    first_sentence = (split_sentences(text) or [""])[0]
    items = re.split(r", | and ", first_sentence.rstrip("."))
    right = {item for item in items if item in wanted.items}
    level = min(3, len(right))
    well_formed = len(items) == 3 and len(right) == 3
    lead_right = not wanted.first or items[0] == wanted.first
    return TOP if well_formed and lead_right else max(0, min(level, 3) - (0 if well_formed or level < 3 else 1))


def _clumsy(wanted: Want, text: str, sentences: Sequence[Sentence], kinds: Counter[str]) -> int:
    """Deductions from helpful: text outside the grammar, padding, repetition, no end mark, too long."""
    unknown = kinds["unknown"]
    if wanted.kind == "listing" and sentences and sentences[0].kind == "unknown":
        unknown -= 1  # the list itself
    repeated = len(sentences) - len({item.text for item in sentences})
    unfinished = int(not text.rstrip().endswith((".", "?", "!")))
    return unknown + kinds["padding"] + repeated + unfinished + max(0, len(sentences) - 4)


def _truth(world: World, task: Task, wanted: Want, sentences: Sequence[Sentence]) -> int:
    """Truthful: half the scale off for a false claim, all for two; text without any statement gets the middle level."""
    claims = _claims(world, task, sentences)
    false = sum(not true for *_, true in claims)
    if wanted.denied and not any(not holds and true for *_, holds, true in claims):
        accepted = any((creature, attribute, value, holds) == (wanted.denied.creature, wanted.denied.attribute,
                                                                wanted.denied.value, True)
                       for creature, attribute, value, holds, _ in claims)
        false += int(accepted)
    if not any(item.kind in _FLUENT for item in sentences) and wanted.kind != "listing":
        return TOP // 2
    if wanted.kind == "listing" and wanted.first:
        first = (split_sentences(" ".join(item.text for item in sentences[:1])) or [""])[0]
        lead = re.split(r", | and ", first)[0]
        false += int(lead in wanted.items and lead != wanted.first)
    guessed = wanted.kind == "clarify" and bool(claims)
    return TOP - 2 * min(2, false) - int(guessed)


class GoldLabeler:
    """Grades responses to prompts given as text: the truth, which simulated labelers see with noise."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._read = lru_cache(maxsize=100_000)(lambda prompt: read_task(world, prompt))

    def task(self, prompt: Prompt) -> Task:
        """The task of a prompt. Raises ValueError for a prompt that is not of this world."""
        task = self._read(prompt) if isinstance(prompt, str) else None
        if task is None:
            raise ValueError(f"the labeler of the embedded world cannot read this prompt: {prompt!r}")
        return task

    def grades(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Grades]:
        return [grade(self.world, self.task(prompt), response)
                for prompt, response in zip(prompts, responses, strict=True)]

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Gold scores, 1 to 7."""
        return [item.score for item in self.grades(prompts, responses)]

    def slices(self, prompt: Prompt) -> list[str]:
        return slices_of(self.world, self.task(prompt))

    def rank(self, prompt: Prompt, responses: Sequence[str]) -> list[int]:
        """Ranks of several responses to one prompt, without noise; 1 is best, ties share a rank."""
        return rank_by_rule(self.grades([prompt] * len(responses), responses), "high_stakes" in self.slices(prompt))


# Per mille of grades that a labeler misreads by one level, by dimension, and of rows ranked without reading (lapses).
# Calibrated so that two labelers agree on 73 % of the pairs on which both have a preference (see tests). Most of the
# disagreement is lapses: with misreadings alone a close pair would be a coin toss, and no fine difference learnable.
MISREAD = {"helpful": 200, "truthful": 150, "harmless": 100}
LAPSE = 280


class SimulatedLabeler:
    """One labeler: misreads some grades by one level, at its own rate, and ranks by the priority rule.

    Draws are integers, so that the same seed gives the same rankings on every machine.
    """

    def __init__(self, world: World, labeler_id: str) -> None:
        self.labeler_id = labeler_id
        rng = split_rng(world.seed, "labeler", labeler_id)
        self.misread = {name: rate * rng.randrange(75, 126) // 100 for name, rate in MISREAD.items()}
        self.lapse = LAPSE * rng.randrange(50, 151) // 100

    def see(self, true: Grades, rng: random.Random) -> Grades:
        """The grades as this labeler perceives them."""
        seen = []
        for name in ("helpful", "truthful", "harmless"):
            level: int = getattr(true, name)
            if rng.randrange(1000) < self.misread[name]:
                level += 1 if rng.randrange(2) else -1
            seen.append(max(0, min(TOP, level)))
        return Grades(*seen)

    def rank(self, graded: Sequence[Grades], high_stakes: bool, rng: random.Random) -> list[int]:
        """This labeler's ranks of graded completions; in a lapse the grades are shuffled among the completions."""
        if rng.randrange(1000) < self.lapse:
            graded = [graded[index] for index in rng.sample(range(len(graded)), len(graded))]
        seen = [self.see(item, rng) for item in graded]
        return rank_by_rule(seen, high_stakes)
