"""Low-rank adapters (LoRA, through peft) on a model's linear layers, in place; and the weights with adapters merged.

A layer then computes W·x + (alpha / rank)·B·(A·x) [Hu et al. 2021]; A and B are trained, W is not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.model.nf4 import Nf4Layer, installed, nf4_layers, quantise, unmap
from rlhf.params import PpoParams, RmParams, SftParams
from rlhf.training import distributed
from rlhf.training.hardware import in_bf16

PUBLISHED = "_published_in_bfloat16"  # an attribute of a model that holds frozen weights in bfloat16
WRAPPER = "_peft_wrapper"  # an attribute of a model with adapters; not a submodule: it contains the model
Params = SftParams | RmParams | PpoParams


def check_base(params: Params, section: str) -> None:
    """Raises UserError where `lora_base` does not fit the section's other parameters, or this machine."""
    if params.lora_base != "fp32" and not params.lora_rank:
        raise UserError(f"{section}.lora_base = {params.lora_base}: must be fp32 where {section}.lora_rank = 0, which "
                        "trains all weights")
    if params.lora_base == "bf16" and not in_bf16(params.precision):
        raise UserError(f"{section}.lora_base = bf16: must be fp32 where {section}.precision = {params.precision}, "
                        "which computes in float32 here")
    for option in ("shard", "compile"):
        if params.lora_base == "nf4" and getattr(params, option):
            raise UserError(f"{section}.lora_base = nf4: cannot be combined with {section}.{option} = true")
    if params.lora_base == "nf4" and not installed():
        raise UserError(f"{section}.lora_base = nf4: needs bitsandbytes: pip install 'instructflow[nf4]'")


def base_in_bf16(params: Params) -> bool:
    """Whether the frozen weights are held in bfloat16; with nf4 those that are not in NF4, where the passes are."""
    return params.lora_base != "fp32" and in_bf16(params.precision)


def add_adapter(model: PreTrainedModel, params: Params, noise: torch.Generator, train_head: bool = False) -> Any:
    """Puts an adapter of `params.lora_rank` on every linear layer but the output, and freezes the other weights.

    Returns peft's wrapper, whose `disable_adapter()` gives the model as it was; `model` itself is changed in place.
    `noise`: draws A; B starts at 0. `train_head`: the scalar head of a scorer stays trainable. With `params.lora_base`
    bf16 the frozen weights are held in bfloat16 (`hold_in_bfloat16`), adapters and head in float32; with nf4 those of
    the layers that have adapters in NF4 (rlhf/model/nf4.py).
    """
    if params.lora_base == "nf4":
        quantise(model)
    adapter = NewAdapter.of(params, noise, train_head)
    adapter.put(model)
    adapter.draw(model)
    return adapter_of(model)


@dataclass(frozen=True)
class NewAdapter:
    """An adapter that is to be trained: `put` on a model, whose weights may still be on the meta device, and then given
    its first values."""

    rank: int
    alpha: int
    base_in_bf16: bool
    noise: torch.Generator
    train_head: bool

    @classmethod
    def of(cls, params: Params, noise: torch.Generator, train_head: bool = False) -> "NewAdapter":
        return cls(params.lora_rank, params.lora_alpha, base_in_bf16(params), noise, train_head)

    def put(self, model: PreTrainedModel) -> None:
        """Adds the layers, says what is trained, holds the rest in bfloat16 where it is to be."""
        _wrapped(model, "default", self.rank, self.alpha)
        for layer in adapted_layers(model).values():
            layer._active_adapter = list(layer.lora_A)  # a frozen one too
        for name, value in model.named_parameters():
            value.requires_grad_(".default." in name or (self.train_head and name == "score.weight"))
        if self.base_in_bf16:
            hold_in_bfloat16(model)

    @torch.no_grad()
    def draw(self, model: PreTrainedModel) -> None:
        """A from `noise`, B = 0; the same values for any number of processes."""
        for layer in adapted_layers(model).values():  # in the order of the blocks
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            bound = 1 / math.sqrt(down.shape[1])
            drawn = torch.empty(down.shape).uniform_(-bound, bound, generator=self.noise)
            down.copy_(distributed.shard_like(drawn, down))
            up.zero_()


def adapter_of(model: PreTrainedModel) -> Any:
    """peft's wrapper of a model with adapters; None of one without."""
    return vars(model).get(WRAPPER)


def add_frozen_adapter(model: PreTrainedModel, rank: int, alpha: int) -> None:
    """Puts an adapter called `frozen` on the same layers, before any other, for values that somebody trained."""
    _wrapped(model, "frozen", rank, alpha)
    model.requires_grad_(False)


def _wrapped(model: PreTrainedModel, name: str, rank: int, alpha: int) -> Any:
    """peft's wrapper of the model with one more adapter on every linear layer but the output."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules="all-linear",
        exclude_modules=["score"] if hasattr(model, "score") else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()))  # GPT-2's linear layers
    if wrapped := vars(model).get(WRAPPER):
        wrapped.add_adapter(name, config)
    else:
        wrapped = vars(model)[WRAPPER] = get_peft_model(model, config, adapter_name=name)
    return wrapped


@torch.no_grad()
def hold_in_bfloat16(model: PreTrainedModel) -> None:
    """Holds matrices that are not trained in bfloat16: half their memory. Norms, biases and a scalar head stay float32,
    and so do the states between the blocks.

    Autocast rounds the weights of products to bfloat16 anyway, so a pass gives the same bits as before, but where an
    embedding loses something: a model that was published in bfloat16 loses nothing. That is remembered: `save_model`
    saves it in bfloat16 again, any other in float32.
    """
    frozen = [value for name, value in model.named_parameters()
              if value.dim() == 2 and not value.requires_grad and name != "score.weight" and ".lora_" not in name]
    vars(model)[PUBLISHED] = (all(value.is_meta or exact_in_bfloat16(value) for value in frozen)
                              and all(layer.exact_in_bfloat16 for layer in nf4_layers(model)))
    for value in frozen:
        value.data = value.data.to(torch.bfloat16)
    unmap(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda _, inputs, output: output.float())


def exact_in_bfloat16(values: Tensor) -> bool:
    """Whether no number loses anything in bfloat16."""
    return torch.equal(values, values.to(torch.bfloat16).to(values.dtype))


def saved_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The type that matrices are saved in where the model holds some in bfloat16 (`hold_in_bfloat16`); else None."""
    return {True: torch.bfloat16, False: torch.float32}.get(vars(model).get(PUBLISHED))


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The linear layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def plain_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state_dict as it would be without adapters: active ones merged, under the names of the plain model.

    Of a sharded model merged weights are whole tensors, and every process must call this. Of a base in NF4 they are on
    the CPU: the device may not hold all of them. The model stays as it is.
    """
    state = model.state_dict()
    weights = {plain_name(name): value for name, value in state.items() if ".lora_" not in name}
    place = "cpu" if nf4_layers(model) else None
    return weights | {name: merge().to(place) for name, merge in merges(model, state).items()}


def plain_name(name: str) -> str:
    """What a weight is called in the model without adapters."""
    return name.replace(".base_layer.", ".")


def merges(model: torch.nn.Module, state: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Plain name of each weight that has active adapters, or is in NF4 -> a function that gives it merged."""
    return {f"{name}.weight": partial(merged, layer, name, state) for name, layer in adapted_layers(model).items()
            if active(layer) or isinstance(layer.base_layer, Nf4Layer)}


def active(layer: Any) -> list[str]:
    """The adapters that a layer adds."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


def merged(layer: Any, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """W + Σ (alpha / rank)·B·A over a layer's active adapters, summed in float32 at least. As W is stored: [out, in],
    in GPT-2 [in, out]. `state`: the state_dict of its model, in which it is called `name`. W in NF4 is dequantised.
    """
    in_nf4 = isinstance(layer.base_layer, Nf4Layer)
    weight = layer.base_layer.weight if in_nf4 else distributed.full_tensor(state[f"{name}.base_layer.weight"])
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for adapter in active(layer):
        down, up = (distributed.full_tensor(state[f"{name}.lora_{part}.{adapter}.weight"]) for part in "AB")
        delta = layer.scaling[adapter] * (up @ down)
        total += delta.t() if layer.fan_in_fan_out else delta
    return total
