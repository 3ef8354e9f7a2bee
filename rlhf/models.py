"""Policies, reward and value models as plain Hugging Face classes: build, load, save, and what is set on them."""

import copy
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf import parallel
from rlhf.errors import UserError
from rlhf.files import writes
from rlhf.params import PretrainParams
from rlhf.texts import compiled, use_groups

RESIDUAL_DROPOUTS = ("resid_dropout", "mlp.dropout", "post_attention_dropout", "post_mlp_dropout")


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Arithmetic of a forward pass: bfloat16 matrix products for "bf16", plain float32 for "fp32"."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")


def small_gpt(params: PretrainParams, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-NeoX of the given shape with fresh weights, tied embeddings and no dropout.

    Rotary positions: at this size they learn in two thirds of the steps that GPT-2's learned ones need.
    """
    return use_groups(GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=len(tokenizer), max_position_embeddings=params.context, hidden_size=params.n_embd,
        num_hidden_layers=params.n_layer, num_attention_heads=params.n_head, intermediate_size=4 * params.n_embd,
        rotary_pct=0.5, tie_word_embeddings=True, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))).to(device())


def _loading() -> dict[str, Any]:
    """Arguments of every from_pretrained: float32 weights, no remote code.

    On a CPU plain attention: at these lengths its backward pass is one and a half times as fast as the fused one.
    """
    attention = {} if device().type == "cuda" else {"attn_implementation": "eager"}
    return {"dtype": torch.float32, "trust_remote_code": False, **attention}


def load_policy(folder: str | Path) -> PreTrainedModel:
    """A causal language model in float32, dropout off."""
    return use_groups(AutoModelForCausalLM.from_pretrained(str(folder), **_loading())).to(device()).eval()


def load_scorer(folder: str | Path) -> PreTrainedModel:
    """A reward or value model: backbone and one linear head, in float32, dropout off."""
    model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1, **_loading())
    if getattr(model.config, "score_shift", 0.0):
        _add_bias(model, model.config.score_shift)
    return use_groups(model).to(device()).eval()


def new_scorer(policy_folder: str | Path, pad_id: int, seed: torch.Generator) -> PreTrainedModel:
    """A reward model on a policy's backbone; the head starts at N(0, 1/(d+1)), without bias [Ziegler]."""
    model = load_scorer(policy_folder)
    model.config.pad_token_id = pad_id
    width = model.score.weight.shape[1]
    fresh = torch.randn(model.score.weight.shape, generator=seed) / math.sqrt(width + 1)
    with torch.no_grad():
        model.score.weight.copy_(fresh)
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, untie: bool = False) -> None:
    """A Hugging Face folder: safetensors, configuration, tokenizer. Only the first process writes.

    `untie`: an output layer that shares its weights with the embeddings is written as one of its own.
    """
    weights = {name: value for name, value in model.state_dict().items() if name != "score.bias"}
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    if parallel.sharded(model):  # tied weights are no longer one tensor when they are whole: only the first name stays
        weights = {name: parallel.whole(value) for name, value in weights.items() if untie or name not in tied}
    elif untie:
        weights |= {name: weights[name].clone() for name in tied}
    if not writes():
        return
    model.save_pretrained(folder, state_dict=weights)
    if untie:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Sets the dropout of the residual branches; embedding and attention layers keep 0 [InstructGPT: residual 0.2].

    Raises UserError for an architecture that has none there (Llama, Qwen) and a probability that is not 0.
    """
    no_dropout(model)
    branches = [module for name, module in model.named_modules()
                if isinstance(module, torch.nn.Dropout) and name.endswith(RESIDUAL_DROPOUTS)]
    if probability and not branches:
        raise UserError(f"dropout = {probability:g}: {type(model).__name__} has no residual dropout; set it to 0")
    for module in branches:
        module.p = probability


def shift_scores(model: PreTrainedModel, shift: float) -> None:
    """Adds a constant to every score without adding a parameter.

    The classification head of Hugging Face models has no bias, so the constant goes into the bias of the final
    norm, along the head's direction: w·(x + b + shift·w/|w|²) = w·(x + b) + shift. The saved model then gives the
    shifted scores in any program that loads it. A backbone whose final norm has no bias (RMSNorm: Llama, Qwen) has no
    such place: there the constant is `score_shift` in the configuration, which `load_scorer` adds and plain
    transformers leaves out; differences between scores are the same in both.
    """
    norms = [module for _, module in model.base_model.named_children() if getattr(module, "bias", None) is not None]
    final = norms[-1] if norms else None
    weight = parallel.whole(model.score.weight)[0]
    if final is None or final.bias.shape != weight.shape:
        model.config.score_shift = getattr(model.config, "score_shift", 0.0) + shift
        _add_bias(model, model.config.score_shift)
        return
    with torch.no_grad():
        final.bias += parallel.like(shift * weight / weight.square().sum(), final.bias)


def _add_bias(model: PreTrainedModel, value: float) -> None:
    """Gives the head a bias that stays as it is."""
    bias = torch.full((1,), value, dtype=model.score.weight.dtype, device=model.score.weight.device)
    model.score.bias = torch.nn.Parameter(bias, requires_grad=False)


def scale_scores(model: PreTrainedModel, gain: float) -> None:
    """Multiplies every score by a constant; to be done before a shift."""
    with torch.no_grad():
        model.score.weight *= gain


def check_length(model: PreTrainedModel, tokens: int, parameter: str) -> None:
    """Raises UserError where a parameter allows sequences longer than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", tokens)
    if tokens > positions:
        raise UserError(f"{parameter} = {tokens}: must be at most {positions}, the positions that the model has")


def save_memory(model: PreTrainedModel, on: bool) -> None:
    """Gradient checkpointing: Hugging Face models recompute activations only in training mode, so every dropout that
    is to stay off must be 0 (`no_dropout`)."""
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def no_dropout(model: PreTrainedModel) -> None:
    """Dropout 0 everywhere, attention's included: training mode then computes what evaluation mode does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def plain_passes(model: PreTrainedModel) -> bool:
    """Whether a pass does what its code says, once: no activations that are made anew backwards, nothing compiled."""
    name = "is_activation_checkpointing"  # older transformers have the other one, newer ones warn of it
    recomputes = model.training and getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")
    return not recomputes and not compiled(model)


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """A transformer's blocks in their order; None where it has no such list."""
    return next((module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList)), None)


def compile_passes(model: PreTrainedModel, on: bool) -> None:
    """torch.compile of the backbone, in place: names of weights stay as they are."""
    if on:
        model.base_model.compile(dynamic=True)


def adamw(model: PreTrainedModel, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
          weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW; weight decay, where asked for, on matrices only."""
    matrices = [item for item in model.parameters() if item.requires_grad and item.dim() >= 2]
    vectors = [item for item in model.parameters() if item.requires_grad and item.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def muon_and_adamw(model: PreTrainedModel, lr: float, muon_lr: float,
                   weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, heads, norms and biases.

    Muon orthogonalises each update; from scratch, a small model then learns in well under half the steps
    (docs/notebook.md has the figures).
    """
    heads = [model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None)]
    embeddings = {id(head.weight) for head in heads if head is not None}
    embeddings |= {id(item) for name, item in model.named_parameters() if "wpe" in name}
    blocks = [item for item in model.parameters() if item.dim() == 2 and id(item) not in embeddings]
    taken = {id(item) for item in blocks}
    rest = [item for item in model.parameters() if id(item) not in taken]
    return [torch.optim.Muon(blocks, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def cosine_factor(step: int, total: int, warmup: int = 0, floor: float = 0.1) -> float:
    """Share of the peak learning rate at step 0 .. total-1: linear warm-up, then a cosine down to `floor`

    [InstructGPT App. C: cosine to 10 %, no warm-up].
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def scale_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times the one the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * factor
