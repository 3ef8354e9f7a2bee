"""Trains the policy of an arm with PPO against the reward model: models/policies/<arm>.

    python -m tasks.ppo [--arm ppo_ptx]
    python -m tasks.ppo --memory    # what each moment takes on the devices at hand; loads nothing
"""

from functools import partial
from pathlib import Path

from mlops.config.paths import POLICIES
from rlhf.data.schema import read_rows
from rlhf.ppo.run import train_ppo
from rlhf.training.journal import read_journal
from rlhf.world.gold import gold_labeler
from tasks.memory import print_memory
from tasks.show import show_rows
from tasks.stage import Stage, run_stage


def train(stage: Stage) -> None:
    """PPO from models/sft on the train prompts of data/ppo.jsonl."""
    params = stage.params.stages.arms[stage.key]
    prompts = (row["prompt"] for row in read_rows(Path("data/ppo.jsonl")) if row["split"] == "train")
    labeler = gold_labeler(stage.params.seed)
    metrics = train_ppo(params, prompts, Path("models/sft"), Path("models/rm"), stage.params.seed, stage.scratch,
                        gold=labeler.scores if labeler else None, corpus=Path("data/corpus.jsonl"))
    metrics.update(summarise([{key: float(value) for key, value in row.items()}
                              for row in read_journal(stage.scratch / "journal.csv")]))
    folder = str(POLICIES / stage.key)
    stage.publish("model", folder)
    stage.finish(metrics, [folder])


def summarise(journal: list[dict[str, float]]) -> dict[str, float]:
    """Means over the last quarter of the iterations; gold score of the first iteration and of the last three."""
    quarter = journal[-max(1, len(journal) // 4):]
    mean = {name: sum(row[f"ppo/{name}"] for row in quarter) / len(quarter)
            for name in ("kl", "kl_k3", "beta", "reward", "rm_score", "entropy", "response_length", "eos_rate")}
    last = journal[-3:]
    gold = {"ppo/gold_first": journal[0]["ppo/gold"], "ppo/gold_last": sum(row["ppo/gold"] for row in last) / len(last)
            } if "ppo/gold" in journal[0] else {}
    return {
        **{f"ppo/{name}": value for name, value in mean.items()},
        "ppo/kl_goal": journal[-1]["ppo/kl_goal"],
        **gold,
        "ppo/kl_last": journal[-1]["ppo/kl"],
        "ppo/alarms": sum(row["ppo/alarm"] for row in journal),
    }


if __name__ == "__main__":
    run_stage("ppo", train, of_an_arm=True, show=partial(show_rows, "ppo", "models/sft"), memory=print_memory)
