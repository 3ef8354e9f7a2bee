"""Texts of many lengths in one row: the states and gradients of each text alone, whatever stands beside it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.data.packing import PackedBatch
from rlhf.fast.blocks import round_up
from rlhf.fast.packed_attention import NAME, attend, enable_packed_attention, similar_lengths
from rlhf.model.device import autocast
from rlhf.model.forward import head_at, hidden_states, hidden_states_at, pack
from rlhf.model.load import load_policy, no_dropout, save_memory
from tests.rlhf.conftest import needs_fast

pytestmark = needs_fast

PROMPTS = [[7, 9, 30, 41, 8, 11, 60], [5], [], [99, 100, 101, 102, 103, 104, 105, 106, 12, 13, 14]]
OWNER = [0, 0, 1, 2, 3, 3, 3, 1, 2, 0]


def random_texts(count: int, longest: int, seed: int = 4) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 300) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def grouped(policy: Any) -> Any:
    assert enable_packed_attention(policy).config._attn_implementation == NAME
    return policy.double()


def exact(policy: Any) -> Any:
    """In float64; the plain attention of some architectures has its softmax in float32."""
    policy.set_attn_implementation("sdpa")
    return policy.double()


def alone(model: Any, text: list[int], before: list[int]) -> Tensor:
    """States of a text after its prompt, in a pass of its own."""
    ids = torch.tensor([[*before, *text]])
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(before):]


def all_places(laid: PackedBatch, texts: list[list[int]]) -> Tensor:
    return laid.token_indices([0] * len(texts), [len(text) for text in texts])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_states_and_gradients_are_those_of_each_text_alone(make_policy: Callable[..., Any], architecture: str,
                                                           shared: bool, recomputed: bool) -> None:
    """In float64, forty texts of four blocks or more; with prompts that several share, one of them empty."""
    texts = random_texts(40, 30)
    owner = (OWNER * 4) if shared else [2] * 40
    plain = exact(make_policy(architecture))
    model = grouped(make_policy(architecture))
    for one in (plain, model):
        no_dropout(one)
        save_memory(one.train(), recomputed)
    laid = pack(model, texts, 0, *((PROMPTS, owner) if shared else ()))
    assert laid.layout is not None
    assert len(laid.ids) == 1
    assert len(laid.layout.blocks) >= 3 + shared
    expected = torch.cat([alone(plain, text, PROMPTS[place]) for text, place in zip(texts, owner, strict=True)])
    found = hidden_states_at(model, laid, all_places(laid, texts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((states * weights).sum(), list(one.base_model.parameters()))
                    for states, one in ((found, model), (expected, plain)))
    assert sum(float(item.abs().sum()) for item in theirs) > 1
    # RMSNorm is in float32, and here a prompt's gradients are added before it, not after
    tolerance = 1e-9 if not shared or architecture in ("gpt_neox", "gpt2") else 1e-4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_text_changes_no_other(make_policy: Callable[..., Any], architecture: str) -> None:
    model = grouped(make_policy(architecture))
    texts = random_texts(20, 30)
    found = []
    for change in (0, 1):
        some = [[token + change for token in text] if place == 7 else text for place, text in enumerate(texts)]
        laid = pack(model, some, 0, PROMPTS, OWNER * 2)
        with torch.no_grad():
            states = hidden_states_at(model, laid, all_places(laid, some)).split([len(text) for text in some])
        found.append(states)
    for place, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other) == (place != 7)


def test_bf16_is_as_near_to_float64_as_each_text_alone(make_policy: Callable[..., Any], architecture: str) -> None:
    texts = random_texts(40, 30)
    errors = []
    reference = exact(make_policy(architecture))
    model = make_policy(architecture)
    assert enable_packed_attention(model) is model
    plain = make_policy(architecture)
    laid = pack(model, texts, 0, PROMPTS, OWNER * 4)
    with torch.no_grad():
        expected = torch.cat([alone(reference, text, PROMPTS[place])
                              for text, place in zip(texts, OWNER * 4, strict=True)])
        with autocast("bf16"):
            one = hidden_states_at(model, laid, all_places(laid, texts))
            other = torch.cat([alone(plain, text, PROMPTS[place]) for text, place in
                               zip(texts, OWNER * 4, strict=True)])
        errors = [(states - expected).pow(2).mean().sqrt().item() for states in (one, other)]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_other_attentions_get_a_padded_batch_with_the_same_states(make_policy: Callable[..., Any],
                                                                  architecture: str) -> None:
    texts = random_texts(10, 30)
    found = []
    for attention in (NAME, "sdpa", "eager"):
        model = grouped(make_policy(architecture))
        model.set_attn_implementation(attention)
        laid = pack(model, texts, 0, PROMPTS, OWNER)
        assert (laid.layout is None) == (attention != NAME)
        assert len(laid.ids) == (1 if attention == NAME else 16)
        with torch.no_grad():
            found.append(hidden_states_at(model, laid, all_places(laid, texts)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)


def test_a_compiled_backbone_gets_a_padded_batch(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    assert pack(model, [[5, 6]], 0).layout is not None
    model.base_model.compile()
    assert pack(model, [[5, 6]], 0).layout is None


def test_passes_without_groups_stay_what_they_are(make_policy: Callable[..., Any], architecture: str) -> None:
    """A padded batch with its mask, left-padded as for generation, and plain rows."""
    ids = torch.tensor([[0, 0, 7, 9, 30], [12, 5, 44, 8, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    plain, model = exact(make_policy(architecture)), grouped(make_policy(architecture))
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            found, expected = (one.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state
                               for one in (model, plain))
            rows = mask.bool() if given else torch.ones_like(mask, dtype=torch.bool)
            torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-10)
        ours, theirs = (one.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
                        for one in (model, plain))
    assert torch.equal(ours, theirs)


def test_attention_needs_a_mask_where_it_has_no_groups() -> None:
    some = torch.ones(1, 2, 3, 4)
    with pytest.raises(AssertionError):
        attend(torch.nn.Module(), some, some, some, None)


def test_the_layout_by_hand(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    laid = pack(model, [[21, 22], [31, 32, 33]], 0, [[11, 12], [13]], [1, 0])
    # the prompts' block of two rows of 8, then the texts', the longest first, after the positions of their prompts
    assert laid.layout is not None
    assert laid.layout.blocks == ((2, 8), (2, 8))
    assert laid.ids[0, :32].tolist() == [11, 12, *[0] * 6, 13, *[0] * 7, 31, 32, 33, *[0] * 5, 21, 22, *[0] * 6]
    assert laid.positions is not None
    assert laid.positions[0, :32].tolist() == [0, 1, *[0] * 14, 2, 3, 4, *[0] * 5, 1, 2, *[0] * 6]
    assert laid.starts == [24, 16]
    assert laid.layout.owner is not None
    assert laid.layout.owner.tolist() == [0, 1]
    assert laid.layout.visible is not None
    assert laid.layout.visible.tolist() == [[True, True, *[False] * 6], [True, *[False] * 7]]
    assert laid.token_indices([1, 0], [1, 3]).tolist() == [25, 16, 17, 18]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=90))
def test_blocks_are_of_like_length(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    blocks = similar_lengths(lengths, range(len(lengths)), "cpu")
    assert [index for block in blocks for index in block] == list(range(len(lengths)))
    assert all(len(block) >= 16 for block in blocks[:-1])
    for block in blocks:  # what is beyond the least number of rows is nearly as long as the longest
        assert len(block) <= 16 or lengths[block[-1]] >= 0.9 * lengths[block[0]]


@given(count=st.integers(1, 10**6))
def test_rounding_adds_a_sixteenth_at_most_and_leaves_few_numbers(count: int) -> None:
    found = round_up(count)
    assert count <= found <= count + count / 16
    assert round_up(found) == found
    assert len({round_up(number) for number in range(4096, 8192)}) == 17


@pytest.mark.parametrize("places", [[3, 9, 4], list(range(40)), list(range(100, 140))])
def test_reading_a_round_number_of_places_changes_no_number_and_no_gradient(policy_folder: Path,
                                                                            places: list[int]) -> None:
    model = load_policy(policy_folder).double()
    laid = pack(model, random_texts(12, 30), 0)
    chosen = torch.tensor(places)
    head = model.get_output_embeddings()
    expected = head(hidden_states(model, laid).flatten(0, 1)[chosen])
    found = head_at(model, head, laid, chosen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
                    for logits in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
