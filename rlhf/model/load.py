"""Policies, reward and value models as plain Hugging Face classes: build, load, save, and what is set on them."""

import copy
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.errors import UserError, disk_problem, first_line
from rlhf.files import is_writer
from rlhf.model.device import device
from rlhf.model.folders import check_folder
from rlhf.model.forward import prepare
from rlhf.model.layout import WHOLE, Layout
from rlhf.model.load_sharded import load_in_shards
from rlhf.model.lora import adapter_of, plain_weights, saved_dtype
from rlhf.model.nf4 import quantise
from rlhf.model.save_sharded import published, save_in_shards
from rlhf.model.vocabulary import is_mask, mask_untrained
from rlhf.params import PretrainParams, RmParams, SftParams
from rlhf.training import distributed

log = logging.getLogger(__name__)

RESIDUAL_DROPOUTS = ("resid_dropout", "mlp.dropout", "post_attention_dropout", "post_mlp_dropout")


def small_gpt(params: PretrainParams, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-NeoX of the given shape with fresh weights, tied embeddings and no dropout.

    Rotary positions: at this size they learn in two thirds of the steps that GPT-2's learned ones need.
    """
    return prepare(GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=len(tokenizer), max_position_embeddings=params.context, hidden_size=params.n_embd,
        num_hidden_layers=params.n_layer, num_attention_heads=params.n_head, intermediate_size=4 * params.n_embd,
        rotary_pct=0.5, tie_word_embeddings=True, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))).to(device())


def _attention() -> dict[str, Any]:
    """On a CPU plain attention: at these lengths its backward pass is one and a half times as fast as the fused one."""
    return {} if device().type == "cuda" else {"attn_implementation": "eager"}


def _read(kind: Any, folder: str | Path, new: frozenset[str], layout: Layout, **more: Any
          ) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(a model, what was missing, surplus, of another shape or not finite). No remote code, no pickle files (loading
    one can run code)."""
    splits = layout.shard and distributed.size() > 1
    if splits and (found := load_in_shards(kind, folder, new, layout, _attention(), **more)):
        return found
    model, report = kind.from_pretrained(
        str(folder), ignore_mismatched_sizes=True, dtype=layout.dtype, trust_remote_code=False, use_safetensors=True,
        output_loading_info=True, **_attention(), **more)
    report["not_finite"] = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    return model, report


def _load(kind: Any, folder: str | Path, new: frozenset[str] = frozenset(), layout: Layout = WHOLE,
          **more: Any) -> PreTrainedModel:
    """A model whose every tensor comes from the folder (or hub name), but for the `new` ones.

    transformers fills what is missing with random numbers and drops what is too much, with a warning. Raises UserError
    for tensors that are missing, of another shape, not finite, or of blocks that config.json does not count, and for a
    folder that cannot be read.
    """
    check_folder(folder)
    try:
        model, report = _read(kind, folder, new, layout, **more)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign configuration makes transformers raise
        if disk_problem(error, Path(folder)):
            raise
        raise UserError(f"{folder}: cannot be loaded: {first_line(error)}") from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{folder}: is an adapter, not a model: merge it into its base (peft's merge_and_unload)")
    if mismatched := sorted(str(item[0]) for item in report.get("mismatched_keys") or ()):
        raise UserError(f"{folder}: {_named(mismatched)} of another shape than config.json says")
    missing = sorted(set(report["missing_keys"]) - new)
    if missing:
        hint = "; it is no reward model" if missing == ["score.weight"] else ""
        raise UserError(f"{folder}: {_named(missing)} missing: they would be random numbers{hint}")
    shapes = {re.sub(r"\d+", "0", name) for name in model.state_dict()}
    dropped = sorted(report["unexpected_keys"])
    if beyond := [name for name in dropped if re.sub(r"\d+", "0", name) in shapes]:
        raise UserError(f"{folder}: {_named(beyond)} of blocks that config.json does not count: they would be dropped")
    if broken := report["not_finite"]:
        raise UserError(f"{folder}: {_named(broken)} not finite (NaN or infinity)")
    if dropped and kind is AutoModelForCausalLM:
        log.warning("%s: %s not used by %s", folder, _named(dropped), type(model).__name__)
    if layout.nf4:
        quantise(model)
    if layout.adapter and not adapter_of(model):
        layout.adapter.put(model)
    if layout.shard and not distributed.sharded(model):
        if distributed.size() > 1 and is_writer():
            log.warning("%s: each process loads it whole before it is split: its tensors have other names than %s "
                        "gives them", folder, type(model).__name__)
        distributed.shard(model, layout.precision, layout.cpu_offload)
    if layout.adapter:
        layout.adapter.draw(model)
    if layout.dtype == torch.bfloat16 and not distributed.sharded(model):
        distributed.keep_residual_in_float32(model)
    return model


def _named(tensors: Sequence[str]) -> str:
    """Count and the first names, as the subject of a sentence."""
    more = ", ..." if len(tensors) > 3 else ""
    return f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''} ({', '.join(tensors[:3])}{more})"


def load_policy(folder: str | Path, layout: Layout = WHOLE) -> PreTrainedModel:
    """A causal language model, dropout off, the rows that nobody trained masked (rlhf/model/vocabulary.py).

    Raises UserError for a model that is not whole (`_load`).
    """
    return mask_untrained(prepare(_load(AutoModelForCausalLM, folder, layout=layout)).to(device()).eval())


def load_scorer(folder: str | Path, new_head: bool = False, layout: Layout = WHOLE) -> PreTrainedModel:
    """A reward or value model: backbone and one linear head, dropout off.

    Raises UserError for a model that is not whole (`_load`); with `new_head` the head may be missing.
    """
    model = _load(AutoModelForSequenceClassification, folder, frozenset({"score.weight"} if new_head else ()),
                  layout, num_labels=1)
    if getattr(model.config, "score_shift", 0.0):
        add_bias(model, model.config.score_shift)
    return prepare(model).to(device()).eval()


def new_scorer(policy_folder: str | Path, pad_id: int, seed: torch.Generator, layout: Layout = WHOLE
               ) -> PreTrainedModel:
    """A reward model on a policy's backbone; the head starts at N(0, 1/(d+1)), without bias [Ziegler]."""
    model = load_scorer(policy_folder, new_head=True, layout=layout)
    model.config.pad_token_id = pad_id
    draw_head(model, seed)
    return model


def draw_head(model: PreTrainedModel, seed: torch.Generator) -> None:
    """A scorer's head from N(0, 1/(d+1)) [Ziegler]."""
    width = model.score.weight.shape[1]
    fresh = torch.randn(model.score.weight.shape, generator=seed) / math.sqrt(width + 1)
    with torch.no_grad():
        model.score.weight.copy_(distributed.shard_like(fresh, model.score.weight))


def not_saved(model: PreTrainedModel) -> set[str]:
    """Names in the state_dict that no folder has: what the scorer's shift and the mask of untrained rows need here."""
    return {"score.bias", *(f"{name}.bias" for name, module in model.named_modules() if is_mask(module))}


def weights_to_send(model: PreTrainedModel, dtype: torch.dtype | None = None
                    ) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """What another program needs to compute as this model does, as `published` of rlhf/model/save_sharded.py: adapters
    merged, an output layer of its own where it is tied to the embeddings. `dtype`: of all tensors."""
    weights, whole = published(model, not_saved(model), lambda _, value: value if dtype is None else value.to(dtype))
    return weights, whole


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, untie: bool = False) -> None:
    """A Hugging Face folder: safetensors, configuration, tokenizer. Only the first process writes.

    Active LoRA adapters are merged in the folder, not in the model. `untie`: an output layer that shares its weights
    with the embeddings is written as one of its own.
    """
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    absent = not_saved(model)
    dtype = saved_dtype(model)

    def typed(name: str, value: Tensor) -> Tensor:
        return value.to(dtype) if dtype and value.dim() == 2 and name != "score.weight" else value

    if distributed.sharded(model):
        save_in_shards(model, folder, absent | (set() if untie else tied), typed)
    elif is_writer():
        weights = {name: value for name, value in plain_weights(model).items() if name not in absent}
        weights |= {name: weights[name].clone() for name in tied} if untie else {}
        if dtype:
            weights = {name: typed(name, value) for name, value in weights.items() if untie or name not in tied}
        model.save_pretrained(folder, state_dict=weights)
    if not is_writer():
        return
    if untie or dtype:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = config.tie_word_embeddings and not untie
        config.dtype = dtype or config.dtype
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
    norm = final_norm(model)
    weight = distributed.full_tensor(model.score.weight)[0]
    if norm is None:
        model.config.score_shift = getattr(model.config, "score_shift", 0.0) + shift
        add_bias(model, model.config.score_shift)
        return
    final: Any = model.get_submodule(norm)
    with torch.no_grad():
        final.bias += distributed.shard_like(shift * weight / weight.square().sum(), final.bias)


def final_norm(model: PreTrainedModel) -> str | None:
    """The name of the norm before a scorer's head; None where it has no bias (RMSNorm)."""
    norms = [name for name, module in model.base_model.named_children() if getattr(module, "bias", None) is not None]
    if not norms or getattr(model.base_model, norms[-1]).bias.shape != model.score.weight.shape[1:]:
        return None
    return f"{model.base_model_prefix}.{norms[-1]}"


def add_bias(model: PreTrainedModel, value: float) -> None:
    """Gives the head a bias that stays as it is."""
    bias = torch.full((1,), value, dtype=model.score.weight.dtype, device=model.score.weight.device)
    model.score.bias = torch.nn.Parameter(bias, requires_grad=False)


def scale_scores(model: PreTrainedModel, gain: float) -> None:
    """Multiplies every score by a constant; to be done before a shift."""
    with torch.no_grad():
        model.score.weight *= gain


def context_of(model: PreTrainedModel, unknown: int = 2048) -> int:
    """How many tokens the model attends to; `unknown` where its configuration does not say."""
    return int(getattr(model.config, "max_position_embeddings", unknown))


def check_length(model: PreTrainedModel, tokens: int, parameter: str) -> None:
    """Raises UserError where a parameter allows sequences longer than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", tokens)
    if tokens > positions:
        raise UserError(f"{parameter} = {tokens}: must be at most {positions}, the positions that the model has")


def save_memory(model: PreTrainedModel, on: bool, on_cpu: bool = False) -> None:
    """Gradient checkpointing: Hugging Face models recompute activations only in training mode, so every dropout that
    is to stay off must be 0 (`no_dropout`). `on_cpu`: what it keeps is kept there (rlhf/model/forward.py)."""
    vars(model)["keeps_on_cpu"] = on and on_cpu
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def prepare_training(model: PreTrainedModel, params: SftParams | RmParams) -> None:
    """Training mode, with gradient checkpointing and torch.compile as the parameters say."""
    save_memory(model, params.gradient_checkpointing, params.offload_activations)
    compile_model(model, params.compile)
    model.train()


def no_dropout(model: PreTrainedModel) -> None:
    """Dropout 0 everywhere, attention's included: training mode then computes what evaluation mode does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def compile_model(model: PreTrainedModel, on: bool) -> None:
    """torch.compile of the backbone, in place: names of weights stay as they are."""
    if on:
        model.base_model.compile(dynamic=True)


