"""Trains an independent judge where nobody else judges: models/judge.

    python -m tasks.judge

A reward model with another seed, on the part of the comparisons (`judge.share`) that the run's own reward model never
sees. Policies are optimised against the other one, so this one's preference is a measure. Where the share is 0, as with
the embedded world, whose gold labeler judges, the folder only says so.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.data.rows import Rows, of_split
from rlhf.files import write_atomic, write_json
from rlhf.model.chat_format import load_codec
from rlhf.reward_model import accuracy, sample_rows, score_rows, train_reward_model
from tasks.rm import labeler_demonstrations, rows_of
from tasks.show import show_rows
from tasks.stage import Stage, run_stage

APART = 1_000_003  # between the seeds of the reward model and of its judge
NONE = "none.json"


def train(stage: Stage) -> None:
    """Trains from models/sft on the judge's part and measures the accuracy on valid rows."""
    share, seed = stage.params.stages.judge.share, stage.params.seed
    params = replace(stage.params.stages.rm, max_prompts=0)
    if not share:
        (stage.scratch / "model").mkdir(exist_ok=True)
        write_json(stage.scratch / "model" / NONE, {"judge.share": 0})
        stage.publish("model", "models/judge")
        write_atomic(stage.scratch / "journal.csv", b"step\n")
        stage.finish({})
        return
    rows = Rows(Path("data/rm.jsonl"))
    model, metrics = train_reward_model(params, rows_of(rows, share, seed, judges=True), labeler_demonstrations(),
                                        Path("models/sft"), seed + APART, stage.scratch)
    valid: Iterable[dict[str, Any]] = sample_rows(of_split(rows, "valid"), params.max_valid_prompts, seed)
    found = {"judge/accuracy": accuracy(score_rows(model, load_codec("models/sft"), valid, params, stage.scratch))}
    found |= {f"judge/{name.removeprefix('rm/')}": value for name, value in metrics.items()
              if name.startswith("rm/") and name != "rm/accuracy"}
    stage.publish("model", "models/judge")
    stage.finish(found, ["models/judge"])


if __name__ == "__main__":
    run_stage("judge", train, show=partial(show_rows, "rm", "models/sft"))
