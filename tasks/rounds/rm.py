"""Trains a round's reward models on all labels so far, from the SFT policy and not from the last one [Ziegler §2.2].

    python -m tasks.rounds.rm --round r2

models/rounds/<round>/rm is the one PPO uses; ensemble/ has the others, which differ in the new head and the order of
the rows. Measured too: how often the *last* round's model agrees with this round's labels, which rank what the current
policy writes.
"""

import json
from dataclasses import replace
from pathlib import Path

from mlops.labeling.batch import read_batch
from rlhf.data.rows import Rows, of_split
from rlhf.files import publish, write_json
from rlhf.model.chat_format import load_codec
from rlhf.model.load import load_scorer
from rlhf.reward_model import accuracy, sample_rows, score_rows, train_reward_model
from rlhf.world.gold import gold_labeler
from tasks.rm import labeler_demonstrations, measure
from tasks.stage import Stage, run_stage

SFT = Path("models/sft")
MEMBERS = "members.json"
APART = 1000  # between the seeds of an ensemble's members


def train(stage: Stage) -> None:
    """Trains and measures; the members of an ensemble one after the other, each with checkpoints of its own."""
    start, rounds, seed = stage.round, stage.params.stages.rounds, stage.params.seed
    params = replace(stage.params.stages.rm, epochs=rounds.rm_epochs, max_prompts=0)
    rows = Rows(Path("feedback") / stage.key / "rm.jsonl")
    model, metrics = train_reward_model(params, rows, labeler_demonstrations(), SFT, seed, stage.scratch)
    codec = load_codec(SFT)
    valid = sample_rows(of_split(rows, "valid"), params.max_valid_prompts, seed)
    if any(True for _ in valid):
        metrics |= {name: value for name, value in measure(
            score_rows(model, codec, valid, params, stage.scratch),
            {row["labeler_id"] for row in of_split(rows, "train")},
            gold_labeler(seed)).items() if name.count("/") == 1}
    if start.number > 1:
        items, _ = read_batch(Path("feedback") / stage.key)
        prompts = {str(item.row["prompt_id"]) for item in items.values()}
        new = [row for row in rows if row["prompt_id"] in prompts and row["split"] == "train"]
        metrics["rm/accuracy_of_last_on_new"] = accuracy(score_rows(load_scorer(Path(start.reward_model)), codec, new,
                                                                    params))
    stage.publish("model", f"models/rounds/{stage.key}/rm")
    others = [f"{number}" for number in range(2, rounds.ensemble + 1)] if rounds.select == "disagreement" else []
    for name in others:
        place = stage.scratch / "ensemble" / name
        place.mkdir(parents=True, exist_ok=True)
        train_reward_model(params, rows, labeler_demonstrations(), SFT, seed + APART * int(name), place)
    made = stage.scratch / "others"
    made.mkdir(exist_ok=True)
    for name in others:
        publish(stage.scratch / "ensemble" / name / "model", made / name)
    write_json(made / MEMBERS, others)
    stage.publish("others", f"models/rounds/{stage.key}/ensemble")
    stage.finish(metrics)


def members(ensemble: Path) -> list[Path]:
    """The folders of a round's reward models, the one that PPO uses first."""
    others = json.loads((ensemble / MEMBERS).read_text(encoding="utf-8"))
    return [ensemble.parent / "rm", *(ensemble / name for name in others)]


if __name__ == "__main__":
    run_stage("round_rm", train, of_a_round=True)
