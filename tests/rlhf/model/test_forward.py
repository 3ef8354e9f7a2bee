"""Forward passes that leave out what nobody reads give the same states and gradients; all of it can be switched off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import rlhf.fast.packed_attention
import rlhf.model.forward
import rlhf.model.sampling
from rlhf.data.packing import PackedBatch
from rlhf.fast.blocks import blocks_of
from rlhf.model.forward import hidden_states, hidden_states_at
from rlhf.model.load import load_policy, no_dropout, save_memory
from rlhf.model.responses import response_log_probs
from rlhf.model.sampling import Sampling, sample_responses
from tests.rlhf.conftest import needs_fast
from tests.rlhf.model.test_load import head_seed, padded


def mlps_of(model: Any) -> list[Any]:
    blocks: Any = blocks_of(model)
    return [block.mlp for block in blocks]


def plainly(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def compare_gradients(model: Any, found: Tensor, expected: Tensor, tolerance: float) -> None:
    weights = torch.randn(expected.shape, generator=head_seed(5), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((states * weights).sum(), list(model.base_model.parameters()),
                                        materialize_grads=True, allow_unused=True) for states in (found, expected))
    assert not len(expected) or sum(float(item.abs().sum()) for item in theirs) > 1
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@needs_fast
@pytest.mark.parametrize("places", [[4, 9, 23], [5, 6], []])
def test_the_last_mlp_runs_only_where_it_is_read(policy_folder: Path, tokenizer: PreTrainedTokenizerFast,
                                                 places: list[int], tokens_of: Callable[[Any], list[int]]) -> None:
    """Same states and gradients as when it runs everywhere, in float64, and it does not."""
    policy = load_policy(policy_folder).double()
    ids, _ = padded(tokenizer.pad_token_id)
    seen = tokens_of(mlps_of(policy)[-1])
    chosen = torch.tensor(places, dtype=torch.long)
    expected = hidden_states(policy, PackedBatch(ids)).flatten(0, 1)[chosen]
    found = hidden_states_at(policy, PackedBatch(ids), chosen)
    assert seen == [ids.numel(), len(places)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    compare_gradients(policy, found, expected, 1e-10)
    assert torch.equal(hidden_states(policy, PackedBatch(ids)).flatten(0, 1)[chosen], expected)  # and it is whole again
    save_memory(policy.train(), True)  # backwards the pass is made anew, when nobody says any more what is read
    no_dropout(policy)
    hidden_states_at(policy, PackedBatch(ids), chosen)
    assert seen[-1] == ids.numel()


def test_fast_passes_are_switched_off_whole_and_change_nothing(
        policy_folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """INSTRUCTFLOW_FAST=off: transformers' own forward passes and sampling, the same results up to rounding."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 6, 7]]
    stops = (tokenizer.eos_token_id,)
    found = []
    for switch in ("on", "off"):
        monkeypatch.setenv("INSTRUCTFLOW_FAST", switch)
        if switch == "off":
            for name in ("last_mlp_at", "first_block_per_unique_token", "fused_rope", "last_block_at", "round_up"):
                monkeypatch.setattr(rlhf.model.forward, name, None)
            for name in ("pack", "enable_packed_attention"):
                monkeypatch.setattr(rlhf.fast.packed_attention, name, None)
            monkeypatch.setattr(rlhf.model.sampling, "decoder_for", None)
        model = load_policy(policy_folder)
        responses = sample_responses(model, prompts, Sampling(9, stops, tokenizer.pad_token_id), head_seed(4))
        log_probs, _ = response_log_probs(model, prompts, responses, 9, pad_id=tokenizer.pad_token_id, temperature=0.7,
                                          precision="fp32")
        found.append((responses, log_probs))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)
