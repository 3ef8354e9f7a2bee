"""The models of a PPO run: policy, frozen reference, value model, reward model; with LoRA, adapters on two of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.model.adapter_folder import Adapter, adapter_on, put_on, scorer_on
from rlhf.model.chat_format import load_codec
from rlhf.model.device import device
from rlhf.model.layout import Layout
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
from rlhf.model.lora import NewAdapter, adapter_of, add_adapter, base_in_bf16, hold_in_bfloat16
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
        self.layout = Layout.of(params, "ppo")
        if params.reuse_forward_passes and params.micro_batch_tokens:
            raise UserError("ppo.reuse_forward_passes cannot be combined with ppo.micro_batch_tokens: the passes to "
                            "reuse are counted in micro-batches of ppo.micro_batch_size")
        self.params, self.seed = params, seed
        self.codec = load_codec(sft_folder)
        self.tokenizer = self.codec.tokenizer
        shared = adapter_on(begin_with or sft_folder, rm_folder, self.layout.nf4) if params.lora_rank else ""
        if isinstance(shared, Adapter):
            log.info("policy, value model and reward model share the weights of %s", begin_with or sft_folder)
            self.policy, self.value, self.reward_model = self._on_one_base(begin_with or sft_folder, shared)
        else:
            if shared:
                log.info("policy, value model and reward model have a base each: %s", shared)
            self.policy, self.value, self.reward_model = self._apart(sft_folder, rm_folder, begin_with or sft_folder)
        # With LoRA the policy without its adapter is the reference, if it began as the SFT policy: no second copy.
        self.reference: PreTrainedModel | None = None
        if not params.lora_rank or begin_with is not None:
            self.reference = load_policy(sft_folder, self.layout.frozen(params)).requires_grad_(False)
        check_length(self.policy, params.max_prompt_tokens + params.max_new_tokens,
                     "ppo.max_prompt_tokens + ppo.max_new_tokens")
        self.adapter = adapter_of(self.policy)
        # models that stand on the CPU between their uses: not those of shards, nor one whose weights are the policy's
        self.waiting = [model for model in (self.reference, self.reward_model) if model is not None
                        and params.frozen_on_cpu and not distributed.sharded(model) and not isinstance(shared, Adapter)]
        for model in self.waiting:
            model.to("cpu")
        for model in (self.policy, self.value):
            no_dropout(model)
            save_memory(model, params.gradient_checkpointing, params.offload_activations)
            compile_model(model, params.compile)

    def _apart(self, sft_folder: Path, rm_folder: Path, base_folder: Path
               ) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
        """Policy, value model and reward model, each with weights of its own."""
        params, layout = self.params, self.layout
        value_layout = policy_layout = layout
        if params.lora_rank:
            policy_layout, value_layout = (replace(layout, adapter=NewAdapter.of(params, self._noise(name), head))
                                           for name, head in (("policy", False), ("value", True)))
        policy = load_policy(base_folder, policy_layout)
        value = load_scorer(rm_folder, layout=value_layout) if params.value_init == "reward_model" else new_scorer(
            sft_folder, self.codec.pad_id, generator(self.seed, "ppo", "value head"), value_layout)
        return policy, value, load_scorer(rm_folder, layout=layout.frozen(params)).requires_grad_(False)

    def _on_one_base(self, base_folder: Path, adapter: Adapter
                     ) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
        """The same with LoRA, on the policy's base weights: the reward model was trained with LoRA on just these."""
        params = self.params
        policy = load_policy(base_folder, Layout(nf4=self.layout.nf4))
        reward_model, value = scorer_on(policy, self.codec.pad_id), scorer_on(policy, self.codec.pad_id)
        put_on(reward_model, adapter)
        if params.value_init == "policy":
            draw_head(value, generator(self.seed, "ppo", "value head"))
        else:
            put_on(value, adapter)
        add_adapter(policy, params, self._noise("policy"))
        add_adapter(value, params, self._noise("value"), train_head=True)
        if base_in_bf16(params):
            hold_in_bfloat16(reward_model)
        if params.shard:
            for model in (policy, value, reward_model):
                distributed.shard(model, params.precision, params.cpu_offload)
        return policy, value, reward_model.requires_grad_(False)

    def _noise(self, name: str) -> torch.Generator:
        """Draws how an adapter starts."""
        return generator(self.seed, "ppo", f"{name} adapter")

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The frozen SFT policy."""
        if self.reference is not None:
            yield self.reference
            return
        with self.adapter.disable_adapter():
            yield self.policy

    @contextmanager
    def in_use(self, model: PreTrainedModel | None) -> Iterator[None]:
        """A frozen model is on the device in this context; with `frozen_on_cpu` on the CPU before and after. A sharded
        one brings its blocks to the device itself."""
        if model is None or not any(model is one for one in self.waiting):
            yield
            return
        model.to(device())
        yield
        model.to("cpu")

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
