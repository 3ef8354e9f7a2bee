"""The models of a PPO run: policy, frozen reference, value model, reward model; with LoRA, adapters on two of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf.model.adapter_folder import adapter_on, put_on, scorer_on
from rlhf.model.chat_format import load_codec
from rlhf.model.load import (
    check_length,
    compile_model,
    draw_head,
    load_policy,
    load_scorer,
    new_scorer,
    no_dropout,
    save_memory,
    save_model,
)
from rlhf.model.lora import add_adapter, check_base, hold_in_bfloat16
from rlhf.model.responses import Prompts, Responses, response_log_probs, response_values
from rlhf.params import PpoParams
from rlhf.training import distributed
from rlhf.training.seeding import generator

log = logging.getLogger(__name__)


class PpoModels:
    """Loaded from the SFT and reward-model folders; the policy from `begin_with`, where that is not the SFT policy.

    Raises UserError where the parameters do not fit the models or each other.
    """

    def __init__(self, params: PpoParams, sft_folder: Path, rm_folder: Path, seed: int,
                 begin_with: Path | None = None) -> None:
        check_base(params, "ppo")
        self.params = params
        self.codec = load_codec(sft_folder)
        self.tokenizer = self.codec.tokenizer
        self.policy = load_policy(begin_with or sft_folder)
        check_length(self.policy, params.max_prompt_tokens + params.max_new_tokens,
                     "ppo.max_prompt_tokens + ppo.max_new_tokens")
        self.adapter: Any = None
        self.reward_model, self.value = self._scorers(sft_folder, rm_folder, begin_with or sft_folder, seed)
        if params.lora_rank:
            self.adapter = add_adapter(self.policy, params, generator(seed, "ppo", "policy adapter"))
            add_adapter(self.value, params, generator(seed, "ppo", "value adapter"), train_head=True)
            if params.lora_base == "bf16":
                hold_in_bfloat16(self.reward_model)
        # With LoRA the policy without its adapter is the reference: no second copy of the weights.
        self.reference = None if self.adapter else load_policy(sft_folder).requires_grad_(False)
        for model in (self.policy, self.value):
            no_dropout(model)
            save_memory(model, params.gradient_checkpointing)
            compile_model(model, params.compile)
        if params.shard:
            for model in filter(None, (self.policy, self.value, self.reference, self.reward_model)):
                distributed.shard(model)

    def _scorers(self, sft_folder: Path, rm_folder: Path, base_folder: Path, seed: int
                 ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Reward model (frozen) and value model, without the adapter that PPO trains. With LoRA they have the policy's
        own base weights where the reward model was trained with LoRA on just these."""
        pad_id, head = self.codec.pad_id, generator(seed, "ppo", "value head")
        from_policy = self.params.value_init == "policy"
        adapter = adapter_on(base_folder, rm_folder) if self.params.lora_rank else ""
        if isinstance(adapter, str):
            if adapter:
                log.info("policy, value model and reward model have a base each: %s", adapter)
            reward_model = load_scorer(rm_folder).requires_grad_(False)
            return reward_model, new_scorer(sft_folder, pad_id, head) if from_policy else load_scorer(rm_folder)
        log.info("policy, value model and reward model share the weights of %s", base_folder)
        reward_model, value = scorer_on(self.policy, pad_id), scorer_on(self.policy, pad_id)
        put_on(reward_model, adapter)
        if from_policy:
            draw_head(value, head)
        else:
            put_on(value, adapter)
        return reward_model.requires_grad_(False), value

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The frozen SFT policy."""
        if self.adapter is None:
            assert self.reference is not None
            yield self.reference
            return
        with self.adapter.disable_adapter():
            yield self.policy

    def train_mode(self, on: bool) -> None:
        """Training mode only switches gradient checkpointing on: dropout is 0 everywhere."""
        for model in (self.policy, self.value):
            model.train(on and self.params.gradient_checkpointing)

    def log_probs(self, model: PreTrainedModel, prompts: Prompts, responses: Responses, width: int) -> Tensor:
        """The policy's or the reference's log-probs of the response tokens at the sampling temperature: [B, width]."""
        return self.log_probs_and_entropy(model, prompts, responses, width, with_entropy=False)[0]

    def log_probs_and_entropy(self, model: PreTrainedModel, prompts: Prompts, responses: Responses, width: int,
                              with_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """As `log_probs`, and the entropies of the distributions that the tokens are drawn from: [B, width] each."""
        return response_log_probs(model, prompts, responses, width, pad_id=self.codec.pad_id,
                                  temperature=self.params.temperature, precision=self.params.precision,
                                  with_entropy=with_entropy)

    def values(self, prompts: Prompts, responses: Responses, width: int) -> Tensor:
        """Value of the state before each response token: [B, width]."""
        return response_values(self.value, prompts, responses, width, pad_id=self.codec.pad_id,
                               precision=self.params.precision)

    def save_policy(self, folder: Path, average: dict[str, Tensor]) -> None:
        """The policy as a plain Hugging Face folder: adapter merged, weights of `average` (a moving average by name)
        in place of its own."""
        self.train_mode(False)
        own = {name: value.detach().clone() for name, value in self.policy.named_parameters() if name in average}
        self.policy.load_state_dict(average, strict=False)
        save_model(self.policy, self.tokenizer, folder)
        self.policy.load_state_dict(own, strict=False)
