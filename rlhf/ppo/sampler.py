"""Who draws PPO's responses, and when: this process or engines, in their own iteration or in the one before.

With `ppo.staleness: 1` an iteration's responses come from the policy as it was before the last iteration's updates;
with engines they are drawn while those run. PPO's ratio is still that to the policy at the iteration's start. What lies
between that and the policy that drew the tokens, one iteration's training or an engine's rounding, is the correction
(`ppo.rollout_correction`): each token's loss is multiplied by π / π_drawn, at most by that number: truncated importance
sampling [Ionides 2008]; PPO with a policy that samples and another that is held near, Hilton et al. 2022.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.engines.pool import Pool
from rlhf.errors import Unavailable
from rlhf.model.responses import on_grid, response_mask
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.params import PpoParams
from rlhf.ppo.models import PpoModels
from rlhf.training import distributed
from rlhf.training.hardware import in_bf16
from rlhf.training.micro_batches import micro_batches
from rlhf.training.seeding import generator


@dataclass(frozen=True)
class Drawn:
    """The responses to an iteration's prompts, and the log-prob with which each of their tokens was drawn.

    `stale`: an iteration's updates lie between that policy and the one that is trained on them.
    """

    responses: list[list[int]]
    log_probs: list[list[float]]
    stale: bool = False

    def grid(self, mask: Tensor) -> Tensor:
        """The log-probs as [B, T], 0 where mask is 0."""
        values = torch.tensor([value for row in self.log_probs for value in row], device=mask.device)
        return on_grid(values, mask)


def correction(log_probs: Tensor, drawn_with: Tensor, largest: float) -> Tensor:
    """min(π / π_drawn, largest) for each token; 1 with `largest` 0. [B, T] each."""
    return (log_probs - drawn_with).exp().clamp(max=largest) if largest else torch.ones_like(log_probs)


class Sampler:
    """Draws the responses of a run's iterations. All processes call the same methods, which raise as `Pool.sample`."""

    def __init__(self, models: PpoModels, params: PpoParams, seed: int) -> None:
        self.models, self.params, self.seed = models, params, seed
        codec = models.codec
        self.sampling = Sampling(params.max_new_tokens, codec.stop_ids, codec.pad_id, params.temperature,
                                 params.precision, params.rollout_batch_size, params.compile_rollouts)
        dtype = torch.bfloat16 if in_bf16(params.precision) else torch.float32
        self.engines = Pool(params.vllm_url, models.policy.config.vocab_size, params.weight_transport,
                            dtype) if params.vllm_url else None
        self.ahead: Drawn | None = None  # the next iteration's
        self._waiting: Callable[[], Drawn] | None = None

    def noise(self, iteration: int) -> torch.Generator:
        """What decides every draw of an iteration."""
        return generator(self.seed, "ppo", iteration)

    def here(self, prompts: list[list[int]], iteration: int, rows: Sequence[int]) -> list[list[int]]:
        """Responses to prompts[rows] from the policy of now, drawn in this process."""
        return sample_responses(self.models.policy, prompts, self.sampling, self.noise(iteration), rows)

    def begin(self, prompts: list[list[int]], iteration: int) -> Callable[[], Drawn]:
        """Begins to draw a response to each prompt from the policy of now; what it returns waits for them.

        Engines draw while this process goes on; without them all is drawn before this returns.
        """
        if self.engines is None:
            drawn = self._by_shares(prompts, iteration)
            return lambda: drawn
        pool, policy = self.engines, self.models.policy
        job = pool.begin(policy, prompts, self.sampling, self.noise(iteration))

        def wait() -> Drawn:
            sampled = pool.finish(policy, job)
            return Drawn([response for response, _ in sampled], [log_probs for _, log_probs in sampled])

        return wait

    def turn(self, prompts: list[list[int]], iteration: int, following: list[list[int]] | None) -> Drawn | None:
        """This iteration's responses where they are there before it, and the beginning of those to the `following`
        prompts, from the policy of now; None where the iteration draws its own."""
        drawn = self.ahead or (self.begin(prompts, iteration)() if following else None)
        self._waiting = self.begin(following, iteration + 1) if following else None
        self.ahead = None
        return drawn

    def end_turn(self) -> None:
        """Waits for the responses to the following prompts. Without an engine the next iteration draws them."""
        if self._waiting is not None:
            with suppress(Unavailable):
                self.ahead = Drawn(**(asdict(self._waiting()) | {"stale": True}))
        self._waiting = None

    def state(self) -> dict[str, Any]:
        return {"ahead": asdict(self.ahead)} if self.ahead else {}

    def restore(self, values: dict[str, Any]) -> None:
        self.ahead = Drawn(**values["ahead"]) if "ahead" in values else None

    @torch.no_grad()
    def _by_shares(self, prompts: list[list[int]], iteration: int) -> Drawn:
        """Each process draws its share and computes its log-probs; all have all of them."""
        models, params = self.models, self.params
        models.train_mode(False)
        rows = distributed.share(sorted(range(len(prompts)), key=lambda row: len(prompts[row])))
        mine, own = self.here(prompts, iteration, rows), [prompts[row] for row in rows]
        width = max(map(len, mine))
        log_probs = torch.zeros_like(response_mask(mine, width))
        lengths = [len(prompt) + len(response) for prompt, response in zip(own, mine, strict=True)]
        for batch, _ in micro_batches(models.policy, lengths, 4 * params.micro_batch_size,
                                      4 * params.micro_batch_tokens):
            log_probs[batch] = models.log_probs(models.policy, [own[index] for index in batch],
                                                [mine[index] for index in batch], width)
        values = [row[:len(response)] for row, response in zip(log_probs.tolist(), mine, strict=True)]
        responses: dict[int, list[int]] = {}
        drawn_with: dict[int, list[float]] = {}
        for part_rows, part_responses, part_values in distributed.all_shares((rows, mine, values)):
            responses |= dict(zip(part_rows, part_responses, strict=True))
            drawn_with |= dict(zip(part_rows, part_values, strict=True))
        order = range(len(prompts))
        return Drawn([responses[row] for row in order], [drawn_with[row] for row in order])
