"""A batch for labeling: prompts with several completions each, and the assignments of items to labelers.

A labeler never sees which model wrote a completion, and each labeler gets the completions in a random order of their
own, so that neither a model's name nor a position can bias the ranking.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.schema import MAX_K, read_rows, write_rows
from rlhf.errors import UserError

MIN_CHOICES = 2


@dataclass(frozen=True)
class Item:
    """One prompt with its completions. `made_by`: the model that wrote each; never shown to labelers."""

    item_id: str
    row: Mapping[str, Any]  # the PPO dataset's: prompt_id, user_id, source, split, use_case, prompt
    completions: tuple[str, ...]
    made_by: tuple[str, ...]


@dataclass(frozen=True)
class Assignment:
    """`order[i]`: index in the item's completions of the one shown as the i-th."""

    item_id: str
    labeler_id: str
    order: tuple[int, ...]


def make_items(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Sequence[str]]], k: int,
               seed: int) -> list[Item]:
    """One item per prompt with `k` distinct completions, taken from the models in turn.

    `answers[model][i]`: that model's completions of `rows[i]`, more than needed, since duplicates are dropped. A prompt
    with fewer than `MIN_CHOICES` distinct completions is left out. Raises UserError for a `k` outside the schema.
    """
    if not MIN_CHOICES <= k <= MAX_K:
        raise UserError(f"{k} completions per item: must be {MIN_CHOICES} to {MAX_K}")
    items: list[Item] = []
    for index, row in enumerate(rows):
        rng = random.Random(f"{seed} items {row['prompt_id']}")
        queues = {model: list(dict.fromkeys(text for text in completions[index] if text.strip()))
                  for model, completions in sorted(answers.items())}
        chosen: dict[str, str] = {}
        models = sorted(queues)
        rng.shuffle(models)
        while len(chosen) < k and any(queues.values()):
            for model in models:
                if queues[model] and len(chosen) < k:
                    chosen.setdefault(queues[model].pop(0), model)
        if len(chosen) >= MIN_CHOICES:
            pairs = sorted(chosen.items())
            rng.shuffle(pairs)
            texts = tuple(text for text, _ in pairs)
            items.append(Item(item_id(row, texts), dict(row), texts, tuple(model for _, model in pairs)))
    return items


def item_id(row: Mapping[str, Any], completions: Sequence[str]) -> str:
    """A hash of what is shown, so that a label can only belong to an item with this content."""
    shown = json.dumps([row["prompt_id"], row["prompt"], *completions])
    return f"item-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"


def assign(items: Sequence[Item], labelers: Sequence[str], overlap: float, per_item: int,
           seed: int) -> list[Assignment]:
    """Assigns a share `overlap` of the items to `per_item` labelers each, the rest to one; loads differ by at most one.

    Raises UserError for missing or repeated labelers, or fewer than `per_item`.
    """
    if len(set(labelers)) != len(labelers) or not labelers:
        raise UserError(f"labelers: expected distinct names, got {', '.join(labelers) or 'none'}")
    if overlap and not 1 <= per_item <= len(labelers):
        raise UserError(f"{per_item} labelers per item: only {len(labelers)} are named")
    rng = random.Random(f"{seed} assign")
    shared = set(rng.sample(range(len(items)), round(overlap * len(items))))
    load = dict.fromkeys(sorted(labelers), 0)
    assignments = []
    for index in sorted(range(len(items)), key=lambda index: index not in shared):  # shared first, the rest level loads
        count = per_item if index in shared else 1
        names = list(load)
        rng.shuffle(names)
        for name in sorted(names, key=lambda name: load[name])[:count]:
            load[name] += 1
            order = list(range(len(items[index].completions)))
            rng.shuffle(order)
            assignments.append(Assignment(items[index].item_id, name, tuple(order)))
    return sorted(assignments, key=lambda item: (item.item_id, item.labeler_id))


def in_item_order(shown: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks in the order shown → ranks in the item's own order."""
    ranks = [0] * len(order)
    for index, rank in zip(order, shown, strict=True):
        ranks[index] = rank
    return tuple(ranks)


def write_batch(folder: Path, items: Sequence[Item], assignments: Sequence[Assignment]) -> None:
    """Writes items.jsonl and assignments.jsonl; equal batches give equal bytes."""
    write_rows(folder / "items.jsonl", ({"item_id": item.item_id, **item.row, "completions": list(item.completions),
                                         "made_by": list(item.made_by)} for item in items))
    write_rows(folder / "assignments.jsonl", ({"item_id": item.item_id, "labeler_id": item.labeler_id,
                                               "order": list(item.order)} for item in assignments))


def read_batch(folder: Path) -> tuple[dict[str, Item], list[Assignment]]:
    """Items by id, and the assignments. Raises UserError for a folder without a batch and for a broken file."""
    if missing := [name for name in ("items.jsonl", "assignments.jsonl") if not (folder / name).is_file()]:
        raise UserError(f"{folder}: is no batch, it has no {' and no '.join(missing)}; "
                        f"`python -m mlops.labeling.collect {folder} --labelers ada bob` makes one")
    own = {"item_id", "completions", "made_by"}
    items = {row["item_id"]: Item(row["item_id"], {key: value for key, value in row.items() if key not in own},
                                  tuple(row["completions"]), tuple(row["made_by"]))
             for row in read_rows(folder / "items.jsonl")}
    assignments = [Assignment(row["item_id"], row["labeler_id"], tuple(row["order"]))
                   for row in read_rows(folder / "assignments.jsonl")]
    return items, assignments
