"""The three datasets of the embedded world at the paper's row counts, sources, splits and use-case mix.

`python -m tasks.ingest` writes them.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from rlhf.data.schema import MAX_K, MIN_K, USE_CASE_PERCENT, expected_rows, split_by_shares
from rlhf.world.facts import World, split_rng
from rlhf.world.labeler import SimulatedLabeler, grade
from rlhf.world.prompts import Task, slices_of, write_task
from rlhf.world.responses import SLIPS, distort, write_good

TRAINING_LABELERS = [f"labeler-{number:02d}" for number in range(1, 33)]
HELD_OUT_LABELERS = [f"labeler-{number:02d}" for number in range(33, 41)]
HELD_OUT_SHARE = 0.35  # of the valid rankings; the training rankings have none
SLIP_RATE = {"labeler": 0.5, "customer": 0.6}  # share of demonstrations with a flaw
USER_CAP = 200
FIRST_VALID_USER = 5001  # first user id of the valid splits, so that no user is in both


def _prompts(world: World, dataset: str, scale: float) -> Iterator[tuple[str, str, Task]]:
    """(split, source, task) of every row, prompts unique within the dataset, in a shuffled order per group."""
    seen: set[str] = set()
    for (split, source), count in expected_rows(dataset, scale).items():
        rng = split_rng(world.seed, dataset, split, source)
        use_cases = [name for name, number in split_by_shares(count, USE_CASE_PERCENT).items()
                     for _ in range(number)]
        rng.shuffle(use_cases)
        for use_case in use_cases:
            task = write_task(world, use_case, split, rng)
            tries = 0
            while task.prompt in seen:
                tries += 1
                if tries > 10_000:
                    raise RuntimeError(f"{dataset}: too few different {use_case} prompts for {count} {split} rows")
                task = write_task(world, use_case, split, rng)
            seen.add(task.prompt)
            yield split, source, task


class _Users:
    """Draws user ids: many users have few prompts, few have many, none exceeds the cap."""

    def __init__(self, source: str, split: str, rows: int, rng: random.Random) -> None:
        count = max(2, -(-rows // 80))
        start = 1 if split == "train" else FIRST_VALID_USER
        prefix = "writer" if source == "labeler" else "customer"
        self.names = [f"{prefix}-{number:05d}" for number in range(start, start + count)]
        self.left = dict.fromkeys(self.names, USER_CAP)
        self.weights = [1 / (rank + 5) for rank in range(count)]
        self.rng = rng

    def next(self) -> str:
        name = self.rng.choices(self.names, self.weights)[0]
        self.left[name] -= 1
        if self.left[name] == 0:
            index = self.names.index(name)
            del self.names[index], self.weights[index]
        return name


def _rows(world: World, dataset: str, scale: float,
          extra: Callable[[Task, str, str, random.Random], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    counts = expected_rows(dataset, scale)
    users: dict[tuple[str, str], _Users] = {}
    rng = split_rng(world.seed, dataset, "rows")
    for number, (split, source, task) in enumerate(_prompts(world, dataset, scale), start=1):
        key = (split, source)
        if key not in users:
            users[key] = _Users(source, split, counts[key], rng)
        more = extra(task, split, source, rng)
        row = {"prompt_id": f"{dataset}-{number:06d}", "user_id": users[key].next()}
        if "labeler_id" in more:
            row["labeler_id"] = more.pop("labeler_id")
        yield {**row, "source": source, "split": split, "use_case": task.use_case, "prompt": task.prompt, **more}


def sft_rows(world: World, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """Demonstrations, some with the flaws of real writers."""
    def demonstrate(task: Task, split: str, source: str, rng: random.Random) -> dict[str, Any]:
        draft = write_good(world, task, rng)
        if rng.random() < SLIP_RATE[source]:
            distort(world, task, draft, rng, SLIPS)
        return {"completion": draft.text()}

    yield from _rows(world, "sft", scale, demonstrate)


def ppo_rows(world: World, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """Prompts only."""
    yield from _rows(world, "ppo", scale, lambda task, split, source, rng: {})


def rm_rows(world: World, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rankings: K completions of mixed quality per prompt, ranked by one simulated labeler."""
    labelers = {name: SimulatedLabeler(world, name) for name in TRAINING_LABELERS + HELD_OUT_LABELERS}

    def rank(task: Task, split: str, source: str, rng: random.Random) -> dict[str, Any]:
        held_out = split == "valid" and rng.random() < HELD_OUT_SHARE
        labeler = labelers[rng.choice(HELD_OUT_LABELERS if held_out else TRAINING_LABELERS)]
        completions = candidates(world, task, rng.randrange(MIN_K, MAX_K + 1), rng)
        graded = [grade(world, task, text) for text in completions]
        high_stakes = "high_stakes" in slices_of(world, task)
        ranks = labeler.rank(graded, high_stakes, rng)
        while max(ranks) == 1:  # a ranking with only ties carries no signal: the labeler repeats it
            ranks = labeler.rank(graded, high_stakes, rng)
        return {"labeler_id": labeler.labeler_id, "completions": completions, "ranks": ranks}

    yield from _rows(world, "rm", scale, rank)


def candidates(world: World, task: Task, count: int, rng: random.Random) -> list[str]:
    """`count` different completions: some good, most with one or two distortions."""
    texts: list[str] = []
    while len(texts) < count:
        draft = write_good(world, task, rng)
        if rng.random() > 0.3:
            distort(world, task, draft, rng)
            if rng.random() < 0.3:
                distort(world, task, draft, rng)
        text = draft.text()
        if text and text not in texts:
            texts.append(text)
    rng.shuffle(texts)
    return texts
