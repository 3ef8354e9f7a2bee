"""Measures a round: its policy on held-out prompts, its reward model on what that policy writes.

    python -m tasks.rounds.scores --round r2

Held-out prompts are those of stage evaluate. The gold labeler judges where there is one, else the profile's judge.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlops.config.paths import MODELS, PROMPTS
from rlhf.evaluation.generate import answer, kl_to_reference, sample_several
from rlhf.evaluation.held_out import held_out_rows, judge_of
from rlhf.evaluation.preference import compare_all, outcome
from rlhf.evaluation.statistics import with_interval
from rlhf.model.chat_format import load_codec
from rlhf.model.load import load_scorer
from rlhf.params import EvaluateParams
from rlhf.reward_model import accuracy, score_rows
from rlhf.training.seeding import seed_everything
from rlhf.world.gold import gold_labeler
from rlhf.world.labeler import GoldLabeler
from tasks.rm import gold_ranked
from tasks.stage import Stage, run_stage

SFT = MODELS["sft"]
SAMPLES = 4  # completions a prompt on which the reward model's accuracy is measured


def score(stage: Stage) -> None:
    """Writes metrics/round_scores@<round>.json."""
    params, seed, number = stage.params.stages.evaluate, stage.params.seed, stage.round.number
    seed_everything(seed)
    labeler = gold_labeler(seed)
    policy, rm = (Path("models/rounds") / stage.key / name for name in ("ppo", "rm"))
    prompts = [row["prompt"] for row in held_out_rows(PROMPTS, params.prompts, seed)]
    found = {"policy": answer(policy, rm, prompts, params, seed), "sft": answer(SFT, rm, prompts, params, seed)}
    metrics: dict[str, Any] = {"round/number": number, "round/prompts": len(prompts),
                               "round/rm_score": sum(found["policy"].rm_scores) / len(prompts)}
    kl = kl_to_reference(policy, SFT, prompts, found["policy"], params.precision, params.temperature)
    metrics |= with_interval("round/kl", kl.exact, params.bootstrap, seed)
    judge, kind = judge_of(params, labeler, rm)
    outcomes = compare_all(prompts, {name: one.texts for name, one in found.items()}, judge)
    metrics |= with_interval("round/win_rate_vs_sft" if kind != "own" else "round/rm_prefers_vs_sft",
                             outcome(outcomes, "policy", "sft"), params.bootstrap, seed)
    if labeler:
        for name, one in found.items():
            metrics |= with_interval("round/gold" if name == "policy" else "round/gold_sft",
                                     labeler.scores(prompts, one.texts), params.bootstrap, seed)
        metrics["round/rm_accuracy_on_policy"] = accuracy_on(policy, rm, prompts, labeler, params, stage)
    stage.finish(metrics)


def accuracy_on(policy: Path, rm: Path, prompts: Sequence[str], labeler: GoldLabeler, params: EvaluateParams,
                stage: Stage) -> float:
    """Share of pairs of the policy's own samples that the reward model ranks as the gold labeler does."""
    texts = sample_several(policy, prompts, SAMPLES, params, stage.params.seed)
    rows = [gold_ranked({"prompt": prompt, "completions": list(dict.fromkeys(some))}, labeler)
            for prompt, some in zip(prompts, texts, strict=True)]
    return accuracy(score_rows(load_scorer(rm), load_codec(rm),
                               [row for row in rows if len(row["completions"]) > 1], stage.params.stages.rm))


if __name__ == "__main__":
    run_stage("round_scores", score, of_a_round=True)
