"""Models for the tests of several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from rlhf.model.load import new_scorer, save_model


@pytest.fixture(scope="session")
def four_heads(tokenizer: PreTrainedTokenizerFast, make_policy: Callable[..., Any],
               tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folders of policy and reward model with 2 blocks of four heads; the Llama has four of keys and values, the Qwen2
    two, and biases."""
    folders: dict[str, tuple[Path, Path]] = {}
    for kind, config, kv_heads in (("llama", LlamaConfig, 4), ("qwen2", Qwen2Config, 2)):
        policy, scorer = (tmp_path_factory.mktemp(f"{kind}-{what}") for what in ("policy", "rm"))
        narrow = make_policy(kind)
        torch.manual_seed(0)
        shape = narrow.config.to_dict() | {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": 8}
        model = type(narrow)(config(**shape, attn_implementation="eager")).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "bias" in name:
                    value.normal_(std=0.2)
            model.lm_head.weight[tokenizer.eos_token_id] = torch.eye(32)[0] * 5
        save_model(model, tokenizer, policy)
        save_model(new_scorer(policy, tokenizer.pad_token_id, torch.Generator().manual_seed(3)), tokenizer, scorer)
        folders[kind] = (policy, scorer)
    return folders
