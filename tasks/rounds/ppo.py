"""Trains a round's policy with PPO against the round's reward model: models/rounds/<round>/ppo.

    python -m tasks.rounds.ppo --round r2

It starts from the last round's policy and what its rule for beta remembers, or with `rounds.restart` from SFT; the KL
is to the SFT policy in every round. The parameters are those of the promoted arm. The warm-up has the same share of the
rollouts as in stage ppo, and so has the value model's: a whole one would be most of a round.
"""

from dataclasses import replace
from pathlib import Path

from rlhf.data.schema import read_rows
from rlhf.params import PpoParams, RoundsParams
from rlhf.ppo.run import train_ppo
from rlhf.training.journal import read_journal
from rlhf.world.gold import gold_labeler
from tasks.ppo import summarise
from tasks.stage import Stage, run_stage


def train(stage: Stage) -> None:
    """PPO of one round on the train prompts of data/ppo.jsonl."""
    start, rounds, seed = stage.round, stage.params.stages.rounds, stage.params.seed
    ppo = stage.params.stages.arms[stage.params.stages.promoted]
    params = round_params(ppo, rounds)
    prompts = (row["prompt"] for row in read_rows(Path("data/ppo.jsonl")) if row["split"] == "train")
    labeler = gold_labeler(seed)
    metrics = train_ppo(params, prompts, Path("models/sft"), Path("models/rounds") / stage.key / "rm",
                        seed + start.number, stage.scratch, gold=labeler.scores if labeler else None,
                        corpus=Path("data/corpus.jsonl"), begin_with=None if rounds.restart else Path(start.policy))
    metrics.update(summarise([{key: float(value) for key, value in row.items()}
                              for row in read_journal(stage.scratch / "journal.csv")]))
    stage.publish("model", f"models/rounds/{stage.key}/ppo")
    stage.finish(metrics)


def round_params(ppo: PpoParams, rounds: RoundsParams) -> PpoParams:
    """PPO's parameters in a round."""
    share = rounds.episodes / ppo.episodes
    return replace(ppo, episodes=rounds.episodes, warmup_iterations=round(ppo.warmup_iterations * share),
                   value_warmup_iterations=round(ppo.value_warmup_iterations * share))


if __name__ == "__main__":
    run_stage("round_ppo", train, of_a_round=True)
