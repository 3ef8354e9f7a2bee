"""Samples the current policy and makes a round's batch: feedback/<round>/items.jsonl and assignments.jsonl.

    python -m tasks.rounds.collect --round r2

Rounds share no prompt. With `rounds.select` disagreement more prompts are sampled than are labeled, and the last
round's ensemble of reward models chooses.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlops.labeling.batch import Item, assign, write_batch
from mlops.labeling.collect import sample_items
from mlops.labeling.selection import most_disputed
from mlops.labeling.store import LABELS, LabelStore
from mlops.labeling.terminal import SIMULATED
from rlhf.data.schema import read_rows
from rlhf.errors import UserError
from rlhf.evaluation.generate import rm_scores
from rlhf.params import RoundsParams
from tasks.rounds.rm import members
from tasks.stage import Stage, run_stage

SFT = "models/sft"


def collect(stage: Stage) -> None:
    """Writes the batch of a round."""
    rounds, seed, start = stage.params.stages.rounds, stage.params.seed, stage.round
    judges = members(Path(start.ensemble)) if rounds.select == "disagreement" and start.number > 1 else []
    rows = round_prompts(rounds, start.number, seed)
    policies = [start.policy, SFT] if rounds.with_sft and start.policy != SFT else [start.policy]
    items = sample_items(rows if judges else rows[: rounds.prompts], policies, rounds.k, stage.params.stages.evaluate,
                         seed + 100 * start.number)
    if judges:
        items = disputed(items, judges, rounds.prompts, stage.params.stages.evaluate.precision)
    assignments = assign(items, rounds.labelers, rounds.overlap, rounds.per_item, seed + start.number)
    keep_labels(Path("feedback") / stage.key / LABELS, items)
    write_batch(stage.scratch / "batch", items, assignments)
    for name in ("items.jsonl", "assignments.jsonl"):
        stage.publish(f"batch/{name}", f"feedback/{stage.key}/{name}")
    stage.finish({"collect/items": len(items), "collect/assignments": len(assignments),
                  "collect/completions": sum(len(item.completions) for item in items)})


def keep_labels(path: Path, items: Sequence[Item]) -> None:
    """Raises UserError where people have labeled another batch of this round: their work is not to be orphaned."""
    known = {item.item_id for item in items}
    lost = [label for label in LabelStore(path).all()
            if label.item_id not in known and not label.submission_id.startswith(SIMULATED)]
    if lost:
        raise UserError(f"{path}: {len(lost)} labels are of another batch: models, data or parameters have changed "
                        "since. Put them back, or move the folder away and label anew")


def round_prompts(rounds: RoundsParams, number: int, seed: int) -> list[dict[str, Any]]:
    """The train prompts that round `number` may use: `candidates` for each that it labels where it selects.

    Raises UserError where the data has not enough of them.
    """
    rows = [row for row in read_rows(Path("data/ppo.jsonl")) if row["split"] == "train"]
    random.Random(f"{seed} prompts of the rounds").shuffle(rows)
    size = rounds.prompts * (rounds.candidates if rounds.select == "disagreement" else 1)
    found = rows[size * (number - 1): size * number]
    if len(found) < size:
        raise UserError(f"data/ppo.jsonl: {len(rows):,} train prompts; {number} rounds of {size:,} need more: lower "
                        "rounds.prompts or rounds.candidates")
    return found


def disputed(items: Sequence[Item], judges: Sequence[Path], count: int, precision: str) -> list[Item]:
    """The `count` items that the reward models disagree on most."""
    prompts = [item.row["prompt"] for item in items for _ in item.completions]
    texts = [text for item in items for text in item.completions]
    scores = [iter(rm_scores(folder, prompts, texts, precision)) for folder in judges]
    by_item = [[[next(found) for _ in item.completions] for found in scores] for item in items]
    return [items[place] for place in most_disputed(by_item, count)]


if __name__ == "__main__":
    run_stage("round_collect", collect, of_a_round=True)
