"""Trains the reward model on the ranked completions: models/rm.

    python -m tasks.rm
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from rlhf.data.schema import read_rows
from rlhf.files import write_csv
from rlhf.reward_model import (
    Scored,
    accuracy,
    calibration,
    calibration_error,
    sample_rows,
    score_rows,
    train_reward_model,
)
from rlhf.tokenizer import PromptCodec, load_tokenizer
from rlhf.world.labeler import GoldLabeler
from tasks.gold import gold_labeler
from tasks.stage import Stage, run_stage

CURVE = "rm_calibration.csv"


def train(stage: Stage) -> None:
    """Trains from models/sft, then measures on valid rows: accuracy, calibration, agreement with the gold labeler."""
    params = stage.params.stages.rm
    rows = list(read_rows(Path("data/rm.jsonl")))
    model, metrics = train_reward_model(params, rows, labeler_demonstrations(), Path("models/sft"), stage.params.seed,
                                        stage.scratch)
    valid = sample_rows([row for row in rows if row["split"] == "valid"], params.max_valid_prompts, stage.params.seed)
    scored = score_rows(model, PromptCodec(load_tokenizer("models/sft")), valid, params)
    metrics |= measure(scored, {row["labeler_id"] for row in rows if row["split"] == "train"},
                       gold_labeler(stage.params.seed))
    curve = calibration(scored)
    metrics["rm/calibration_error"] = calibration_error(curve)
    write_csv(stage.scratch / CURVE, curve)
    stage.publish(CURVE, f"metrics/{CURVE}")
    stage.publish("model", "models/rm")
    stage.finish(metrics, ["models/rm"])


def labeler_demonstrations() -> list[dict[str, Any]]:
    """Valid demonstrations by labelers, by anyone where there are none: what scores mean 0 is measured on."""
    rows = [row for row in read_rows(Path("data/sft.jsonl")) if row["split"] == "valid"]
    return [row for row in rows if row["source"] == "labeler"] or rows


def measure(scored: list[Scored], training_labelers: set[str], labeler: GoldLabeler | None) -> dict[str, float]:
    """Accuracy on valid labels of training labelers, of held-out ones, by K, by use case, and by the gold labeler."""
    known = [item for item in scored if item.row["labeler_id"] in training_labelers]
    others = [item for item in scored if item.row["labeler_id"] not in training_labelers]
    metrics = {"rm/accuracy": accuracy(known)}
    if others:
        metrics["rm/accuracy_heldout_labelers"] = accuracy(others)
    if labeler:
        metrics["rm/accuracy_gold"] = accuracy([Scored(gold_ranked(item.row, labeler), item.scores)
                                                for item in scored])
    groups: dict[str, list[Scored]] = defaultdict(list)
    for item in scored:
        groups[f"rm/accuracy/k{len(item.scores)}"].append(item)
        groups[f"rm/accuracy/{item.row['use_case']}"].append(item)
    return metrics | {name: accuracy(group) for name, group in sorted(groups.items())}


def gold_ranked(row: dict[str, Any], labeler: GoldLabeler) -> dict[str, Any]:
    """The same completions ranked by the noise-free labeler."""
    return {**row, "ranks": labeler.rank(row["prompt"], row["completions"])}


if __name__ == "__main__":
    run_stage("rm", train)
