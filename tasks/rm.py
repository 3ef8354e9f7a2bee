"""Trains the reward model on the ranked completions: models/rm.

    python -m tasks.rm
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.data.prompts import prompt_key
from rlhf.data.rows import Rows, of_split
from rlhf.files import write_csv
from rlhf.model.chat_format import load_codec
from rlhf.reward_model import (
    Scored,
    calibration,
    calibration_error,
    contradicted_pairs,
    sample_rows,
    score_rows,
    train_reward_model,
)
from rlhf.world.gold import gold_labeler
from rlhf.world.labeler import GoldLabeler
from tasks.memory import print_memory
from tasks.show import show_rows
from tasks.stage import Stage, run_stage

CURVE = "rm_calibration.csv"


def train(stage: Stage) -> None:
    """Trains from models/sft, then measures on valid rows: accuracy, calibration, agreement with the gold labeler."""
    params = stage.params.stages.rm
    rows = Rows(Path("data/rm.jsonl"))
    mine = rows_of(rows, stage.params.stages.judge.share, stage.params.seed)
    model, metrics = train_reward_model(params, mine, labeler_demonstrations(), Path("models/sft"), stage.params.seed,
                                        stage.scratch)
    valid = sample_rows(of_split(rows, "valid"), params.max_valid_prompts, stage.params.seed)
    scored = score_rows(model, load_codec("models/sft"), valid, params, stage.scratch)
    metrics |= measure(scored, {row["labeler_id"] for row in of_split(mine, "train")}, gold_labeler(stage.params.seed))
    curve = calibration(scored)
    metrics["rm/calibration_error"] = calibration_error(curve)
    write_csv(stage.scratch / CURVE, curve)
    stage.publish(CURVE, f"metrics/{CURVE}")
    stage.publish("model", "models/rm")
    stage.finish(metrics, ["models/rm"])


def rows_of(rows: Iterable[dict[str, Any]], share: float, seed: int, judges: bool = False) -> Iterable[dict[str, Any]]:
    """The rows that the reward model learns from, or its judge: a prompt's training rows are all the one's or all the
    other's. Valid rows are both's."""
    if not share:
        return rows

    def is_judges(row: dict[str, Any]) -> bool:
        digest = hashlib.sha256(f"{seed} judge {prompt_key(row['prompt'])}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    return Rows(rows, lambda row: row["split"] != "train" or is_judges(row) == judges)


def labeler_demonstrations() -> Iterable[dict[str, Any]]:
    """Valid demonstrations by labelers, by anyone where there are none: what scores mean 0 is measured on."""
    rows = of_split(Rows(Path("data/sft.jsonl")), "valid")
    mine = Rows(rows, lambda row: row["source"] == "labeler")
    return mine if any(True for _ in mine) else rows


def measure(scored: Iterable[Scored], training_labelers: set[str], labeler: GoldLabeler | None) -> dict[str, float]:
    """Accuracy on valid labels of training labelers, of held-out ones, by K, by use case, and by the gold labeler; the
    share of the pairs that no model can get right, since their labelers contradict each other. `scored` is passed over
    several times."""
    counts: dict[str, tuple[int, int]] = {"rm/accuracy": (0, 0)} | ({"rm/accuracy_gold": (0, 0)} if labeler else {})

    def count(name: str, item: Scored) -> None:
        agreed, pairs = counts.get(name, (0, 0))
        found = item.pairs()
        counts[name] = agreed + sum(agrees for _, agrees in found), pairs + len(found)

    for item in scored:
        count("rm/accuracy" if item.row["labeler_id"] in training_labelers else "rm/accuracy_heldout_labelers", item)
        count(f"rm/accuracy/k{len(item.scores)}", item)
        count(f"rm/accuracy/{item.row['use_case']}", item)
        if labeler:
            count("rm/accuracy_gold", Scored(gold_ranked(item.row, labeler), item.scores))
    rates = {name: agreed / max(1, pairs) for name, (agreed, pairs) in sorted(counts.items())}
    return rates | {"rm/contradicted_pairs": contradicted_pairs(scored)}


def gold_ranked(row: dict[str, Any], labeler: GoldLabeler) -> dict[str, Any]:
    """The same completions ranked by the noise-free labeler."""
    return {**row, "ranks": labeler.rank(row["prompt"], row["completions"])}


if __name__ == "__main__":
    run_stage("rm", train, show=partial(show_rows, "rm", "models/sft"), memory=print_memory)
