"""Linear layers whose frozen weight is held in NF4, 4 bits a number, by bitsandbytes (QLoRA [Dettmers et al. 2023]).

A number is one of 16 levels, quantiles of a normal distribution, times the largest magnitude of its block of 64. Those
scales are 8-bit numbers in blocks of 256 themselves (double quantisation): 4.13 bits a number in all. A pass, forward
or backward, dequantises one layer after the other, into the type that it computes in.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.model.device import device

BLOCK = 64  # numbers of a weight that share a scale
HELD = ("codes", "scales", "scales_of_scales", "mean_scale", "levels")


def installed() -> bool:
    return find_spec("bitsandbytes") is not None


def _functional() -> Any:
    """bitsandbytes' functions. Its advice on a CPU is about a kernel that is not used here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


class Nf4Layer(nn.Module):
    """A linear layer with its weight in NF4, bias as it was. What it holds is in no state_dict: `weight`, dequantised
    anew each time it is asked for, is what a merged model is saved with."""

    codes: Tensor
    scales: Tensor
    scales_of_scales: Tensor
    mean_scale: Tensor
    levels: Tensor

    def __init__(self, layer: Any) -> None:
        """Of a linear layer, GPT-2's too; quantised where the passes are computed, and left there."""
        nn.Module.__init__(self)
        self.stored_transposed = isinstance(layer, Conv1D)
        stored = layer.weight.detach()
        self.exact_in_bfloat16 = torch.equal(stored, stored.to(torch.bfloat16).to(stored.dtype))
        weight = (stored.t() if self.stored_transposed else stored).to(device(), torch.float32).contiguous()
        self.outputs, self.inputs = weight.shape
        codes, state = _functional().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        for name, value in zip(HELD, (codes, state.absmax, state.state2.absmax, state.offset, state.state2.code),
                               strict=True):
            self.register_buffer(name, value, persistent=False)
        self.register_parameter("bias", layer.bias)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs]."""
        return dequantised(dtype, self.outputs, self.inputs, *self.held())

    def held(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in HELD)

    @property
    def weight(self) -> Tensor:
        """In float32, as the layer that it was made of stores it: [out, in], GPT-2's [in, out]."""
        weight = self.dequantised(torch.float32)
        return weight.t() if self.stored_transposed else weight

    def forward(self, states: Tensor) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = _Product.apply(states.to(dtype), bias, self.outputs, self.inputs, *self.held())
        return product


class Nf4Linear(Nf4Layer, nn.Linear):  # type: ignore[override]
    """In the place of a torch.nn.Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = self.inputs, self.outputs


class Nf4Conv1D(Nf4Layer, Conv1D):
    """In the place of a GPT-2 layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.nx, self.nf = self.inputs, self.outputs


def dequantised(dtype: torch.dtype, outputs: int, inputs: int, codes: Tensor, scales: Tensor, scales_of_scales: Tensor,
                mean_scale: Tensor, levels: Tensor) -> Tensor:
    """level · scale, rounded to `dtype` once.

    As one row: with AVX-512 bitsandbytes 0.50.2 begins a block with each row of [outputs, inputs], whatever its length.
    """
    functional = _functional()
    into = dtype if dtype == torch.bfloat16 else torch.float32
    second = functional.QuantState(absmax=scales_of_scales, code=levels, blocksize=256, dtype=torch.float32)
    state = functional.QuantState(absmax=scales, shape=torch.Size((1, outputs * inputs)), blocksize=BLOCK, dtype=into,
                                  quant_type="nf4", offset=mean_scale, state2=second)
    weight: Tensor = functional.dequantize_4bit(codes, state)
    return weight.view(outputs, inputs).to(dtype)


class _Product(torch.autograd.Function):
    """states · Wᵀ + bias, W dequantised in either direction: what is kept between them is 4 bits a number."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, bias: Tensor | None, outputs: int, inputs: int, *held: Tensor) -> Tensor:
        ctx.save_for_backward(*held)
        ctx.shape = outputs, inputs
        return F.linear(states, dequantised(states.dtype, outputs, inputs, *held), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = dequantised(gradient.dtype, *ctx.shape, *ctx.saved_tensors)
        return gradient @ weight, *[None] * (3 + len(HELD))


@torch.no_grad()
def quantise(model: PreTrainedModel) -> None:
    """Holds in NF4, in place, the weight of every linear layer that an adapter can be put on: all but the output layer
    and a scorer's head. Adapters, and what is in NF4, stay as they are."""
    left_out = {model.get_output_embeddings(), getattr(model, "score", None)}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name, module in linear:
        if not isinstance(module, Nf4Layer) and module not in left_out and ".lora_" not in name:
            parent, _, leaf = name.rpartition(".")
            kind = Nf4Conv1D if isinstance(module, Conv1D) else Nf4Linear
            setattr(model.get_submodule(parent), leaf, kind(module))
    unmap(model)


@torch.no_grad()
def unmap(model: nn.Module) -> None:
    """Copies the weights, so that nothing is left of the file that they are mapped from: all of it stays in memory as
    long as one of its tensors is in use."""
    for value in model.parameters():
        value.data = value.data.clone()


def nf4_layers(model: nn.Module) -> list[Nf4Layer]:
    return [module for module in model.modules() if isinstance(module, Nf4Layer)]
