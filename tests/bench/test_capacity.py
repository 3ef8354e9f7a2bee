"""bench/capacity_model.py counts parameters, FLOPs, state and activations as torch and transformers do."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bench.capacity_model import (
    Job,
    Machine,
    forward_flops,
    needed,
    peak,
    phases,
    stage_seconds,
    stage_work,
)
from rlhf.memory import Shape, activation_bytes, parameters
from rlhf.training.optim import adamw

SHAPES = [Shape("a", 3, 48, 4, 320, 200, 64, "gpt2"), Shape("b", 2, 64, 4, 320, 128, 64, "gpt_neox", tied=False),
          Shape("c", 2, 64, 4, 320, 160, 64, "gpt_neox"), Shape("d", 2, 64, 4, 320, 176, 64, "llama", kv_heads=2),
          Shape("e", 3, 64, 4, 320, 176, 64, "llama", tied=False)]
B13, B67, B175 = (Shape(name, layers, width, width // 128, 50257, 4 * width)  # GPT-3's
                  for name, layers, width in (("1.3B", 24, 2048), ("6.7B", 32, 4096), ("175B", 96, 12288)))
H100 = Machine(80e9, 989e12, 3.35e12, 0.4)


def model_of(shape: Shape, attention: str = "eager") -> Any:
    common: dict[str, Any] = {"vocab_size": shape.vocabulary, "attn_implementation": attention,
                              "tie_word_embeddings": shape.tied, "bos_token_id": 0, "eos_token_id": 0}
    if shape.family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(
            n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
            n_inner=shape.inner, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common))
    sizes = {"max_position_embeddings": shape.context, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
             "num_attention_heads": shape.heads, "intermediate_size": shape.inner}
    if shape.family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **common))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=shape.kv_heads or shape.heads, **sizes, **common))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_parameters_are_those_of_transformers(shape: Shape) -> None:
    model = model_of(shape)
    assert parameters(shape) == model.num_parameters()
    assert parameters(shape, head=False) == model.base_model.num_parameters() + shape.width


def test_the_sizes_of_gpt3() -> None:
    counts = [parameters(shape) / 1e9 for shape in (B13, B67, B175)]
    assert counts == pytest.approx([1.3, 6.7, 175], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_flops_are_those_that_torch_counts(shape: Shape) -> None:
    model, ids = model_of(shape), torch.zeros(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits = model(ids).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    expected = forward_flops(shape, 120, 40, 120, "eager")
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert backward.get_total_flops() == pytest.approx(2 * expected, rel=0.01)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_state_is_that_of_a_real_trainer(stage: str) -> None:
    shape = SHAPES[0]
    model = model_of(shape) if stage == "sft" else model_of(shape).base_model
    if stage == "rm":
        model.score = torch.nn.Linear(shape.width, 1, bias=False)
    optimizer = adamw(model, 1e-3)
    for item in model.parameters():
        item.grad = torch.ones_like(item)
    optimizer.step()
    held: list[Tensor] = [*model.parameters(), *(item.grad for item in model.parameters())]
    held += [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    job = Job(stage, shape, shape, 32, 64, 1)
    parts = phases(job)["update"]
    assert sum(parts[name] for name in ("weights", "moments", "gradients")) == sum(
        item.numel() * item.element_size() for item in held)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_activations_are_what_is_saved_for_the_backward_pass(family: str, precision: str, attention: str) -> None:
    rows, length, saved = 3, 64, []
    for layers in (2, 4):
        shape = Shape("x", layers, 256, 4, 128, 600, 128, family)
        model = model_of(shape, attention).train()
        own = {item.untyped_storage().data_ptr() for item in model.parameters()}
        sizes = {tuple(item.shape) for item in model.parameters()} | {item.shape[::-1] for item in model.parameters()}
        kept: dict[int, int] = {}

        def keep(item: Tensor, own: set[int] = own, sizes: Any = sizes, kept: dict[int, int] = kept) -> Tensor:
            storage = item.untyped_storage()
            if storage.data_ptr() not in own and item.shape not in sizes:  # bf16 copies of weights count elsewhere
                kept[storage.data_ptr()] = storage.nbytes()
            return item

        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda item: item),
              torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")):
            model.base_model(torch.zeros(rows, length, dtype=torch.long), use_cache=False)
        saved.append(sum(kept.values()))
    each = (saved[1] - saved[0]) / 2 / (rows * length)
    counted = activation_bytes(shape, length, attention == "eager", precision == "bf16")
    assert counted == pytest.approx(each, rel=0.05)


def test_shards_micro_batches_and_recomputing_save_memory() -> None:
    whole = Job("ppo", B13, B13, 512, 256_000, 1, micro=1)
    sharded = dataclasses.replace(whole, processes=8, sharding="fsdp")
    copies = dataclasses.replace(whole, processes=8)
    assert peak(sharded)[1] < peak(copies)[1] < peak(whole)[1]
    for changes in ({"micro": 8}, {"checkpointing": False}, {"attention": "eager"}):
        changed: Job = dataclasses.replace(whole, **changes)
        assert sum(phases(changed)["update"].values()) > sum(phases(whole)["update"].values())
    found = needed(whole, 72e9)
    assert found is not None
    assert peak(found)[1] <= 72e9 < peak(dataclasses.replace(found, processes=found.processes // 2))[1]


def test_time_is_of_the_order_of_the_matrix_products() -> None:
    job = Job("sft", B67, B67, 32, 12_725, 16)
    tokens = 12_725 * 16 * 400
    products = 8 * tokens * parameters(B67)  # forward, twice backward, once more recomputed
    assert stage_work(job)[0].flops == pytest.approx(products, rel=0.1)
    assert stage_seconds(job, H100) > products / (0.4 * 989e12)
