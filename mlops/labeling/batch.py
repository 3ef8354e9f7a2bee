"""A batch for labeling: prompts with several completions each, and who ranks what in which order.

Where the completions come from is kept apart from what a labeler sees, and each labeler sees them in an order of their
own: neither a model's name nor a place can be learned.
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
    """One prompt with its completions. `made_by`: the model of each; no labeler is shown it."""

    item_id: str
    row: Mapping[str, Any]  # the PPO dataset's: prompt_id, user_id, source, split, use_case, prompt
    completions: tuple[str, ...]
    made_by: tuple[str, ...]


@dataclass(frozen=True)
class Assignment:
    """`order[i]` is the place in the item's completions of what the labeler sees as the i-th."""

    item_id: str
    labeler_id: str
    order: tuple[int, ...]


def make_items(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Sequence[str]]], k: int,
               seed: int) -> list[Item]:
    """One item a prompt, of `k` different completions from the models in turn.

    `answers[model][i]` are that model's completions of `rows[i]`, more than it contributes where some are equal: people
    are not asked which of two equal texts is better. A prompt with fewer than `MIN_CHOICES` different ones is left out.
    Raises UserError for a `k` that the reward model's schema does not have.
    """
    if not MIN_CHOICES <= k <= MAX_K:
        raise UserError(f"{k} completions an item: must be {MIN_CHOICES} to {MAX_K}")
    items: list[Item] = []
    for place, row in enumerate(rows):
        rng = random.Random(f"{seed} items {row['prompt_id']}")
        queues = {model: list(dict.fromkeys(text for text in found[place] if text.strip()))
                  for model, found in sorted(answers.items())}
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
    """From what is shown, so that no label can end at an item that says something else."""
    shown = json.dumps([row["prompt_id"], row["prompt"], *completions])
    return f"item-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"


def assign(items: Sequence[Item], labelers: Sequence[str], overlap: float, per_item: int,
           seed: int) -> list[Assignment]:
    """Gives a share `overlap` of the items to `per_item` labelers each, the others to one; loads differ by one at most.

    Raises UserError: no or double labelers, fewer than `per_item`.
    """
    if len(set(labelers)) != len(labelers) or not labelers:
        raise UserError(f"labelers: expected different names, found {', '.join(labelers) or 'none'}")
    if not 1 <= per_item <= len(labelers):
        raise UserError(f"{per_item} labelers an item: there are {len(labelers)}")
    rng = random.Random(f"{seed} assign")
    shared = set(rng.sample(range(len(items)), round(overlap * len(items))))
    load = dict.fromkeys(sorted(labelers), 0)
    found = []
    for place in sorted(range(len(items)), key=lambda place: place not in shared):  # shared ones first, then level out
        count = per_item if place in shared else 1
        names = list(load)
        rng.shuffle(names)
        for name in sorted(names, key=lambda name: load[name])[:count]:
            load[name] += 1
            order = list(range(len(items[place].completions)))
            rng.shuffle(order)
            found.append(Assignment(items[place].item_id, name, tuple(order)))
    return sorted(found, key=lambda item: (item.item_id, item.labeler_id))


def in_item_order(shown: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks as shown → ranks in the item's own order."""
    ranks = [0] * len(order)
    for place, rank in zip(order, shown, strict=True):
        ranks[place] = rank
    return tuple(ranks)


def write_batch(folder: Path, items: Sequence[Item], assignments: Sequence[Assignment]) -> None:
    """items.jsonl and assignments.jsonl; equal batches are equal bytes."""
    write_rows(folder / "items.jsonl", ({"item_id": item.item_id, **item.row, "completions": list(item.completions),
                                         "made_by": list(item.made_by)} for item in items))
    write_rows(folder / "assignments.jsonl", ({"item_id": item.item_id, "labeler_id": item.labeler_id,
                                               "order": list(item.order)} for item in assignments))


def read_batch(folder: Path) -> tuple[dict[str, Item], list[Assignment]]:
    """Items by id, and the assignments. Raises UserError where a file is missing or broken."""
    own = {"item_id", "completions", "made_by"}
    items = {row["item_id"]: Item(row["item_id"], {key: value for key, value in row.items() if key not in own},
                                  tuple(row["completions"]), tuple(row["made_by"]))
             for row in read_rows(folder / "items.jsonl")}
    assignments = [Assignment(row["item_id"], row["labeler_id"], tuple(row["order"]))
                   for row in read_rows(folder / "assignments.jsonl")]
    return items, assignments
