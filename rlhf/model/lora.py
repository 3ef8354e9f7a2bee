"""Low-rank adapters (LoRA, through peft) on a model's linear layers, in place."""

from typing import Any

from transformers import PreTrainedModel

from rlhf.params import PpoParams


def add_adapter(model: PreTrainedModel, params: PpoParams, train_head: bool = False) -> Any:
    """Puts an adapter of `params.lora_rank` on every linear layer but the output, and freezes the other weights.

    Returns peft's wrapper, whose `disable_adapter()` gives the model as it was; `model` itself is changed in place.
    `train_head`: the scalar head of a scorer stays trainable.
    """
    from peft import LoraConfig, get_peft_model

    head: Any = {"exclude_modules": ["score"]} if train_head else {}
    wrapped = get_peft_model(model, LoraConfig(r=params.lora_rank, lora_alpha=params.lora_alpha, lora_dropout=0.0,
                                               target_modules="all-linear", bias="none", **head))
    if train_head:
        model.score.weight.requires_grad_(True)
    return wrapped
