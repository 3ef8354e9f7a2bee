"""Makes the base model in models/pretrain: a small GPT trained on data/corpus.jsonl, or a Hugging Face model.

    python -m tasks.pretrain
"""

from pathlib import Path

from rlhf.data.schema import read_rows
from rlhf.evaluation.multiple_choice import choose
from rlhf.model.load import load_policy
from rlhf.model.tokenizer import load_tokenizer
from rlhf.pretrain import pretrain, stored_texts, take_base_model
from rlhf.training.journal import Journal
from rlhf.world.facts import World
from rlhf.world.tax import fact_items
from tasks.stage import Stage, run_stage

JOURNAL = ["pretrain/loss", "pretrain/lr", "pretrain/grad_norm"]


def make_base(stage: Stage) -> None:
    """Trains the base model, or takes one as it is; measures whether a small one knows the world's facts."""
    params = stage.params.stages.pretrain
    if params.base_model:
        metrics = take_base_model(params, stage.scratch)
        Journal(stage.scratch / "journal.csv", JOURNAL, None).close()  # nothing was trained; DVC wants the file
    else:
        texts = stored_texts((row["text"] for row in read_rows(Path("data/corpus.jsonl"))), stage.scratch)
        metrics = pretrain(params, texts, stage.params.seed, stage.scratch)
        folder = stage.scratch / "model"
        facts = fact_items(World(stage.params.seed))
        chosen = choose(load_policy(folder), load_tokenizer(folder), facts, params.precision)
        right = [choice == fact["answer"] for choice, fact in zip(chosen, facts, strict=True)]
        metrics["pretrain/fact_accuracy"] = sum(right) / len(right)
    stage.publish("model", "models/pretrain")
    stage.finish(metrics, ["models/pretrain"])


if __name__ == "__main__":
    run_stage("pretrain", make_base)
