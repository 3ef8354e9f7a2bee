"""Trains the reward model on the ranked completions: models/rm.

    python -m tasks.rm
"""

from pathlib import Path
from typing import Any

from rlhf.data.schema import read_rows
from rlhf.reward_model import measure_accuracy, sample_rows, train_reward_model
from rlhf.tokenizer import PromptCodec, load_tokenizer
from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler
from tasks.stage import Stage, run_stage


def train(stage: Stage) -> None:
    """Trains from models/sft, then measures accuracy on valid labels, held-out labelers and the gold labeler."""
    params = stage.params.stages.rm
    rows = list(read_rows(Path("data/rm.jsonl")))
    demonstrations = [row for row in read_rows(Path("data/sft.jsonl"))
                      if row["split"] == "valid" and row["source"] == "labeler"]
    model, metrics = train_reward_model(params, rows, demonstrations, Path("models/sft"), stage.params.seed,
                                        stage.scratch)
    codec = PromptCodec(load_tokenizer("models/sft"))
    training_labelers = {row["labeler_id"] for row in rows if row["split"] == "train"}
    valid = sample_rows([row for row in rows if row["split"] == "valid"], params.max_valid_prompts, stage.params.seed)
    sets = {
        "rm/accuracy": [row for row in valid if row["labeler_id"] in training_labelers],
        "rm/accuracy_heldout_labelers": [row for row in valid if row["labeler_id"] not in training_labelers],
        "rm/accuracy_gold": gold_ranked(valid, GoldLabeler(World(stage.params.seed))),
    }
    for name, chosen in sets.items():
        metrics[name] = measure_accuracy(model, codec, chosen, params)
    stage.publish("model", "models/rm")
    stage.finish(metrics, ["models/rm"])


def gold_ranked(rows: list[dict[str, Any]], labeler: GoldLabeler) -> list[dict[str, Any]]:
    """The same completions ranked by the noise-free labeler."""
    return [{**row, "ranks": labeler.rank(row["prompt"], row["completions"])} for row in rows]


if __name__ == "__main__":
    run_stage("rm", train)
