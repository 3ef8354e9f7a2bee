"""Fine-tunes the base model on the demonstrations: models/sft.

    python -m tasks.sft
    python -m tasks.sft --show 3    # only what training makes of the first rows: text, ids, tokens, mask of the loss
"""

from pathlib import Path

from mlops.config.loader import load_params
from rlhf.data.rows import Rows
from rlhf.sft import sft
from tasks.memory import print_memory
from tasks.show import show_rows
from tasks.stage import Stage, run_stage


def fine_tune(stage: Stage) -> None:
    """SFT on data/sft.jsonl from models/pretrain."""
    metrics = sft(stage.params.stages.sft, Rows(Path("data/sft.jsonl")), Path("models/pretrain"), stage.params.seed,
                  stage.scratch, corpus=Path("data/corpus.jsonl"))
    stage.publish("model", "models/sft")
    stage.finish(metrics, ["models/sft"])


def show(count: int) -> None:
    """Prints what SFT makes of the first rows."""
    show_rows("sft", "models/pretrain", count, load_params(Path.cwd()).stages.sft.train_on == "all_answers")


if __name__ == "__main__":
    run_stage("sft", fine_tune, show=show, memory=print_memory)
