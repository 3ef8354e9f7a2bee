"""The held-out prompts of an evaluation, the judge of preferences, and the best-of-n curve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.data.schema import read_rows
from rlhf.evaluation.generate import rm_scores, sample_several
from rlhf.evaluation.overoptimisation import best_of_n
from rlhf.evaluation.preference import Judge, gold_judge, model_judge, reward_judge
from rlhf.params import EvaluateParams
from rlhf.training import distributed
from rlhf.training.seeding import generator
from rlhf.world.labeler import GoldLabeler


@dataclass(frozen=True)
class HeldOut:
    """The rows of the validation split of the PPO prompts that every model answers."""

    rows: list[dict[str, Any]]
    labeler: GoldLabeler | None

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    def slices(self) -> list[list[str]]:
        """The slices of each prompt (false premise, ambiguous, high stakes); empty without a gold labeler."""
        return [self.labeler.slices(prompt) if self.labeler else [] for prompt in self.prompts]


def held_out_rows(prompts: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Seeded sample of `count` validation rows of data/ppo.jsonl, in file order.

    In the embedded world these are about entities that no training prompt mentions.
    """
    rows = [row for row in read_rows(prompts) if row["split"] == "valid"]
    chosen = torch.randperm(len(rows), generator=generator(seed, "held out"))[:count].tolist()
    return [rows[index] for index in sorted(chosen)]


JudgeKind = Literal["gold", "model", "reward_model", "held_out", "own"]


def judge_of(params: EvaluateParams, labeler: GoldLabeler | None, rm: Path, held_out: Path | None = None
             ) -> tuple[Judge, JudgeKind]:
    """(judge, what it is): the gold labeler, a model that the parameters name, the reward model in the folder
    `held_out` (trained on comparisons that `rm` never saw), or `rm` itself, PPO's own: it is no independent judge."""
    if params.judge == "model":
        return model_judge(params.judge_model, params.precision), "model"
    if params.judge == "reward_model":
        return reward_judge(Path(params.judge_model), params.precision), "reward_model"
    if labeler:
        return gold_judge(labeler), "gold"
    if held_out and (held_out / "config.json").is_file():
        return reward_judge(held_out, params.precision), "held_out"
    return reward_judge(rm, params.precision), "own"


def best_of_curve(policy: Path, rm: Path, held_out: HeldOut, params: EvaluateParams, seed: int
                  ) -> list[dict[str, float]]:
    """Proxy and gold score of the best of n samples of a policy, n a power of two; empty without a gold labeler."""
    if not params.best_of or not held_out.labeler:
        return []
    prompts = held_out.prompts[: params.best_of_prompts]
    samples = sample_several(policy, prompts, params.best_of, params, seed)
    repeated = [prompt for prompt in prompts for _ in range(params.best_of)]
    texts = [text for group in samples for text in group]
    proxy, gold = ([values[start:start + params.best_of] for start in range(0, len(values), params.best_of)]
                   for values in (rm_scores(rm, repeated, texts, params.precision),
                                  distributed.by_rows(held_out.labeler.scores, repeated, texts)))
    sizes = [2 ** power for power in range(params.best_of.bit_length())]
    return best_of_n(proxy, gold, sizes)
