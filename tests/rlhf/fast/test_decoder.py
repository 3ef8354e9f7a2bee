"""The decoder against the Hugging Face model's own pass: prompts, single tokens, groups of heads, adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.fast.decoder import Decoder, decoder_for
from rlhf.model.device import autocast
from rlhf.model.load import load_policy
from rlhf.model.lora import add_adapter
from rlhf.params import PpoParams
from tests.rlhf.conftest import needs_fast

pytestmark = needs_fast


@pytest.fixture
def policy(policy_folder: Path) -> Any:
    model = load_policy(policy_folder)
    with torch.no_grad():  # biases are zero in a new model
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return model


def ids_of(model: Any, rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def decoded(decoder: Decoder, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of every position: the first `prompt` tokens in one pass, the others one by one; row 0 is row 1 there."""
    rows, length = ids.shape
    cache, rope = decoder.new_cache(rows + 1, length), decoder.rope(length)
    places = torch.arange(rows) + 1
    positions = torch.arange(length).expand(rows, -1)
    found = [decoder.logits(decoder.hidden(ids[:, :prompt], positions[:, :prompt], cache, places, rope, None))]
    for step in range(prompt, length):
        state = decoder.hidden(ids[:, step:step + 1], positions[:, step:step + 1], cache, places, rope,
                               torch.arange(step + 1))
        found.append(decoder.logits(state))
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 5, 12])
def test_same_logits_as_the_models_own_pass(policy: Any, prompt: int) -> None:
    ids = ids_of(policy, 3, 12)
    decoder = decoder_for(policy, "fp32")
    assert decoder is not None
    assert torch.allclose(decoded(decoder, ids, prompt), policy(ids).logits, atol=2e-5)


@torch.no_grad()
def test_bf16_is_as_far_from_fp32_as_the_models_own_bf16(policy: Any) -> None:
    ids = ids_of(policy, 4, 16)
    exact = torch.log_softmax(policy(ids).logits, dim=-1)
    with autocast("bf16"):
        usual = torch.log_softmax(policy(ids).logits.float(), dim=-1)
    decoder = decoder_for(policy, "bf16")
    assert decoder is not None
    mine = torch.log_softmax(decoded(decoder, ids, 6), dim=-1)
    assert 0 < (mine - exact).abs().mean() < 1.3 * (usual - exact).abs().mean()


@torch.no_grad()
def test_groups_of_heads() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
                                         num_key_value_heads=2, intermediate_size=64,
                                         max_position_embeddings=32)).eval()
    decoder = decoder_for(model, "fp32")
    assert decoder is not None
    ids = ids_of(model, 2, 9)
    assert torch.allclose(decoded(decoder, ids, 4), model(ids).logits, atol=2e-5)


@torch.no_grad()
def test_adapters_are_part_of_the_weights(policy: Any) -> None:
    adapter = add_adapter(policy, PpoParams(lora_rank=2), torch.Generator().manual_seed(11))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    ids = ids_of(policy, 2, 8)
    with_adapter = decoder_for(policy, "fp32")
    assert with_adapter is not None
    usual = policy(ids).logits
    assert torch.allclose(decoded(with_adapter, ids, 3), usual, atol=1e-4)
    with adapter.disable_adapter():
        without = decoder_for(policy, "fp32")
        assert without is not None
        assert torch.allclose(decoded(without, ids, 3), policy(ids).logits, atol=1e-4)
        assert not torch.allclose(policy(ids).logits, usual, atol=1e-2)


@pytest.mark.parametrize("config", [{"model_type": "mistral"}, {"model_type": "llama", "rope_parameters": {
    "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}, {"model_type": "qwen2", "use_sliding_window": True,
                                                                     "max_window_layers": 0, "sliding_window": 4}])
def test_what_it_does_not_know_it_leaves_to_the_model(config: dict[str, Any]) -> None:
    small = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**small, **config}))
    assert decoder_for(model, "fp32") is None
