"""Passes that leave out what nobody reads and do once what comes out the same: states and gradients of whole ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf.lora import add_adapter
from rlhf.models import load_policy, no_dropout, save_memory
from rlhf.params import PpoParams
from rlhf.passes import blocks_of, hidden_states, states_at
from rlhf.texts import Texts, lay_out, use_groups
from tests.rlhf.test_models import head_seed, padded


@pytest.fixture
def tokens_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """tokens_of(module): the numbers of tokens that the module is given from now on."""
    def watch(module: Any) -> list[int]:
        seen: list[int] = []
        kind = type(module)
        own = kind.forward

        def counting(some: torch.nn.Module, state: Tensor) -> Tensor:
            if some is module:
                seen.append(state.numel() // state.shape[-1])
            return own(some, state)

        monkeypatch.setattr(kind, "forward", counting)
        return seen
    return watch


def repeated(count: int, different: int) -> list[list[int]]:
    """Texts of one to thirty tokens out of `different` ones."""
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 31, (count,), generator=draw).tolist()
    return [torch.randint(3, 3 + different, (length,), generator=draw).tolist() for length in lengths]


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


@pytest.mark.parametrize("in_groups", [False, True])
def test_the_first_block_looks_at_each_different_token_once(
        make_policy: Callable[..., Any], in_groups: bool, tokens_of: Callable[[Any], list[int]]) -> None:
    """Same states and gradients as transformers' own pass, in float64; and the block is whole again afterwards."""
    policy = make_policy("gpt_neox").double()
    texts = repeated(40, 40)
    if in_groups:
        use_groups(policy)
    else:
        policy.set_attn_implementation("sdpa")  # the plain one has its softmax in float32
    laid = lay_out(policy, texts, 0)
    assert (laid.groups is not None) == in_groups
    first, second = map(tokens_of, mlps_of(policy))
    found = hidden_states(policy, laid)
    assert first == [42]  # forty, and PAD, rounded up
    assert second == [laid.ids.numel()]
    places = laid.places([0] * len(texts), list(map(len, texts)))
    expected = torch.cat([plainly(policy, torch.tensor([text]))[0] for text in texts])
    torch.testing.assert_close(found.flatten(0, 1)[places], expected, rtol=0, atol=1e-12)
    compare_gradients(policy, found.flatten(0, 1)[places], expected, 1e-9)
    assert first[1:] == list(map(len, texts))


def test_the_first_block_has_its_adapters(make_policy: Callable[..., Any], ppo_params: Callable[..., PpoParams],
                                          tokens_of: Callable[[Any], list[int]]) -> None:
    policy = make_policy("gpt_neox").double()
    policy.set_attn_implementation("sdpa")
    ids = torch.randint(20, (8, 40), generator=head_seed(1))
    before = plainly(policy, ids)
    add_adapter(policy, ppo_params(lora_rank=2))
    for name, item in policy.named_parameters():
        if "lora_B" in name:  # they start at 0
            torch.nn.init.normal_(item, generator=head_seed(2))
    first = tokens_of(mlps_of(policy)[0])
    found, expected = hidden_states(policy, Texts(ids)), plainly(policy, ids)
    assert first == [20, 320]
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # adapters are in float32


@pytest.mark.parametrize("case", ["few repeats", "llama", "gpt2", "one after the other", "dropout", "recomputed"])
def test_the_first_block_looks_at_every_token_where_it_has_to(
        case: str, make_policy: Callable[..., Any], tokens_of: Callable[[Any], list[int]]) -> None:
    policy = make_policy(case if case in ("llama", "gpt2") else "gpt_neox")
    if case == "one after the other":  # MLP after attention
        config = policy.config
        config.use_parallel_residual = False
        policy = AutoModelForCausalLM.from_config(config).eval()
    if case == "dropout":
        policy.train().base_model.emb_dropout.p = 0.5
    if case == "recomputed":
        save_memory(policy.train(), True)
    ids = torch.randint(300 if case == "few repeats" else 20, (8, 40), generator=head_seed(1))
    first = tokens_of(mlps_of(policy)[0])
    hidden_states(policy, Texts(ids))
    assert first == [ids.numel()]


def test_gradients_of_a_token_that_comes_often_are_added_up_exactly(make_policy: Callable[..., Any]) -> None:
    """4,000 of a handful of tokens: added up in bfloat16, a sum stops growing at some 256 times its parts."""
    policy = make_policy("gpt_neox")
    exact = make_policy("gpt_neox").double()
    ids = torch.randint(6, (40, 100), generator=head_seed(1))
    for model in (policy, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is policy):
            states = hidden_states(model, Texts(ids)) if model is policy else plainly(model, ids)
        states.double().square().sum().backward()
    for name in ("layers.0.mlp.dense_4h_to_h.bias", "layers.0.attention.query_key_value.weight"):
        one, other = (dict(model.base_model.named_parameters())[name].grad.double() for model in (policy, exact))
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("places", [[4, 9, 23], [5, 6], []])
def test_the_last_mlp_runs_only_where_it_is_read(policy_folder: Path, tokenizer: PreTrainedTokenizerFast,
                                                 places: list[int], tokens_of: Callable[[Any], list[int]]) -> None:
    """Same states and gradients as when it runs everywhere, in float64, and it does not."""
    policy = load_policy(policy_folder).double()
    ids, _ = padded(tokenizer.pad_token_id)
    seen = tokens_of(mlps_of(policy)[-1])
    chosen = torch.tensor(places, dtype=torch.long)
    expected = hidden_states(policy, Texts(ids)).flatten(0, 1)[chosen]
    found = states_at(policy, Texts(ids), chosen)
    assert seen == [ids.numel(), len(places)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    compare_gradients(policy, found, expected, 1e-10)
    assert torch.equal(hidden_states(policy, Texts(ids)).flatten(0, 1)[chosen], expected)  # and it is whole again
    save_memory(policy.train(), True)  # backwards the pass is made anew, when nobody says any more what is read
    no_dropout(policy)
    states_at(policy, Texts(ids), chosen)
    assert seen[-1] == ids.numel()
