"""GPT-NeoX's passes on a CPU, which do less than transformers': the same states and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox

from rlhf.data.packing import PackedBatch
from rlhf.fast.packed_attention import enable_packed_attention
from rlhf.model.device import autocast
from rlhf.model.forward import head_at, hidden_states, hidden_states_at, pack
from rlhf.model.load import no_dropout, save_memory
from rlhf.model.lora import add_adapter
from rlhf.params import PpoParams
from tests.rlhf.conftest import needs_fast
from tests.rlhf.model.test_forward import compare_gradients, mlps_of, plainly
from tests.rlhf.model.test_load import head_seed

pytestmark = needs_fast


def repeated(count: int, different: int) -> list[list[int]]:
    """Texts of one to thirty tokens out of `different` ones."""
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 31, (count,), generator=draw).tolist()
    return [torch.randint(3, 3 + different, (length,), generator=draw).tolist() for length in lengths]


# --- the first block -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packed", [False, True])
def test_the_first_block_looks_at_each_different_token_once(
        make_policy: Callable[..., Any], packed: bool, tokens_of: Callable[[Any], list[int]]) -> None:
    """Same states and gradients as transformers' own pass, in float64; and the block is whole again afterwards."""
    policy = make_policy("gpt_neox").double()
    texts = repeated(40, 40)
    if packed:
        enable_packed_attention(policy)
    else:
        policy.set_attn_implementation("sdpa")  # the plain one has its softmax in float32
    laid = pack(policy, texts, 0)
    assert (laid.layout is not None) == packed
    first, second = map(tokens_of, mlps_of(policy))
    found = hidden_states(policy, laid)
    assert first == [42]  # forty, and PAD, rounded up
    assert second == [laid.ids.numel()]
    places = laid.token_indices([0] * len(texts), list(map(len, texts)))
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
    add_adapter(policy, ppo_params(lora_rank=2), head_seed(3))
    for name, item in policy.named_parameters():
        if "lora_B" in name:  # they start at 0
            torch.nn.init.normal_(item, generator=head_seed(2))
    first = tokens_of(mlps_of(policy)[0])
    found, expected = hidden_states(policy, PackedBatch(ids)), plainly(policy, ids)
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
    hidden_states(policy, PackedBatch(ids))
    assert first == [ids.numel()]


def test_gradients_of_a_token_that_comes_often_are_added_up_exactly(make_policy: Callable[..., Any]) -> None:
    """4,000 of a handful of tokens: added up in bfloat16, a sum stops growing at some 256 times its parts."""
    policy = make_policy("gpt_neox")
    exact = make_policy("gpt_neox").double()
    ids = torch.randint(6, (40, 100), generator=head_seed(1))
    for model in (policy, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is policy):
            states = hidden_states(model, PackedBatch(ids)) if model is policy else plainly(model, ids)
        states.double().square().sum().backward()
    for name in ("layers.0.mlp.dense_4h_to_h.bias", "layers.0.attention.query_key_value.weight"):
        one, other = (dict(model.base_model.named_parameters())[name].grad.double() for model in (policy, exact))
        assert (one - other).norm() < 0.02 * other.norm()


# --- positions -------------------------------------------------------------------------------------------------------

@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often transformers' own code has turned queries and keys by their positions."""
    seen: list[str] = []
    own = modeling_gpt_neox.apply_rotary_pos_emb

    def counting(*arguments: Any, **more: Any) -> Any:
        seen.append("transformers")
        return own(*arguments, **more)

    monkeypatch.setattr(modeling_gpt_neox, "apply_rotary_pos_emb", counting)
    return seen


def neox(share: float, bias: bool = True, parallel_residual: bool = True) -> Any:
    """Two blocks of two heads of 16, of whose numbers positions turn a `share`."""
    torch.manual_seed(3)
    config = GPTNeoXConfig(vocab_size=300, max_position_embeddings=64, hidden_size=32, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=64, rotary_pct=share, attention_bias=bias,
                           use_parallel_residual=parallel_residual, initializer_range=0.2, attn_implementation="sdpa")
    model = GPTNeoXForCausalLM(config).eval()
    for name, item in model.named_parameters():  # they start at 0, and norms' weights at 1
        if item.dim() == 1:
            torch.nn.init.normal_(item, mean=float("norm.weight" in name), std=0.3, generator=head_seed(4))
    return model


@pytest.mark.parametrize(("share", "bias"), [(0.125, True), (0.25, False), (0.5, True), (1.0, True)])
def test_queries_and_keys_are_turned_as_transformers_turns_them(share: float, bias: bool, turns: list[str]) -> None:
    """In float64, states and gradients; and the blocks are whole again afterwards."""
    model = neox(share, bias).double()
    texts = repeated(40, 290)
    expected = torch.cat([plainly(model, torch.tensor([text]))[0] for text in texts])
    used = len(turns)
    assert used == 2 * len(texts)
    laid = pack(enable_packed_attention(model), texts, 0)
    states = hidden_states(model, laid)
    assert len(turns) == used
    found = states.flatten(0, 1)[laid.token_indices([0] * len(texts), list(map(len, texts)))]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    compare_gradients(model, found, expected, 1e-9)
    assert not any("forward" in vars(module) for module in model.modules())


def test_in_bfloat16_turned_together_is_as_near_to_the_truth(turns: list[str]) -> None:
    """Gradients of both ways against those in float64."""
    texts = repeated(40, 290)
    errors = []
    for recomputed in (False, True):  # where activations are made anew, transformers' own code turns them
        model, true = neox(0.5), neox(0.5).double()
        for one in (model, true):
            no_dropout(enable_packed_attention(one).train())
        save_memory(model, recomputed)
        for one in (model, true):
            with autocast("bf16" if one is model else "fp32"):
                states = hidden_states(one, pack(one, texts, 0))
            states.double().square().mean().backward()
        assert bool(turns) == recomputed
        pairs = [(a.grad.double() - b.grad, b.grad) for a, b in zip(model.base_model.parameters(),
                                                                  true.base_model.parameters(), strict=True)]
        errors.append(sum(float(gap.norm()) for gap, _ in pairs) / sum(float(whole.norm()) for _, whole in pairs))
    assert errors[0] < 0.02
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("case", ["none turned", "padded"])
def test_what_is_not_for_it_stays_with_transformers(case: str, turns: list[str]) -> None:
    model = neox(0.0 if case == "none turned" else 0.5)
    texts = repeated(5, 290)
    laid = pack(model if case == "padded" else enable_packed_attention(model), texts, 0)
    found = hidden_states(model, laid).flatten(0, 1)[laid.token_indices([0] * 5, list(map(len, texts)))]
    assert len(turns) == 2
    expected = torch.cat([plainly(model, torch.tensor([text]))[0] for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --- the last block --------------------------------------------------------------------------------------------------

def some_places(laid: PackedBatch, texts: list[list[int]], share: float) -> torch.Tensor:
    """Of each text the last tokens, `share` of them and at least one, in the order given."""
    counts = [max(1, int(share * len(text))) for text in texts]
    return laid.token_indices([len(text) - count for text, count in zip(texts, counts, strict=True)], counts)


def asked(model: Any) -> list[int]:
    """Of how many tokens the last block's attention gives what it has found, from now on."""
    seen: list[int] = []
    list(model.base_model.layers)[-1].attention.dense.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1]))
    return seen


@pytest.mark.parametrize("parallel_residual", [True, False])
@pytest.mark.parametrize(("share", "prompts"), [(0.0, False), (0.4, False), (0.0, True), (0.4, True)])
def test_the_last_block_asks_only_where_it_is_read(share: float, prompts: bool, parallel_residual: bool,
                                                   turns: list[str]) -> None:
    """In float64, states and gradients of the last tokens of forty texts of four blocks, some after a shared prompt."""
    model = neox(0.5, parallel_residual=parallel_residual).double()
    texts = repeated(40, 290)
    before = [[7, 9, 30, 41, 8, 11, 60], [5], []] if prompts else []
    owner = [index % 3 for index in range(40)] if prompts else []
    whole = torch.cat([plainly(model, torch.tensor([[*(before[owner[row]] if prompts else []), *text]]))[
        0, -max(1, int(share * len(text))):] for row, text in enumerate(texts)])
    enable_packed_attention(model)
    seen, used = asked(model), len(turns)
    laid = pack(model, texts, 0, before, owner)
    assert laid.layout is not None
    assert len(laid.layout.blocks) > 2
    places = some_places(laid, texts, share)
    order = torch.randperm(len(places), generator=head_seed(3))
    found = hidden_states_at(model, laid, places[order])
    assert seen == [len(places)]
    assert len(turns) == used
    torch.testing.assert_close(found, whole[order], rtol=0, atol=1e-11)
    compare_gradients(model, found, whole[order], 1e-9)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_round_number_of_places_is_read() -> None:
    """The last one again and again, which changes no number and no gradient."""
    model = neox(0.5).double()
    texts = repeated(40, 290)
    places = some_places(pack(enable_packed_attention(model), texts, 0), texts, 0.3)
    head = torch.nn.Linear(32, 3).double()
    expected = head(hidden_states_at(model, pack(model, texts, 0), places))
    seen = asked(model)
    found = head_at(model, head, pack(model, texts, 0), places)
    assert seen[0] > len(places)
    assert seen[0] % 8 == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    compare_gradients(model, found, expected, 1e-10)


@pytest.mark.parametrize("case", ["many", "none", "adapters", "padded", "recomputed"])
def test_the_last_block_asks_everywhere_where_it_has_to(case: str, ppo_params: Callable[..., PpoParams]) -> None:
    model = neox(0.5)
    texts = repeated(40, 290)
    if case != "padded":
        enable_packed_attention(model)
    laid = pack(model, texts, 0)
    places = some_places(laid, texts, 1.0 if case == "many" else 0.3)[:0 if case == "none" else None]
    expected = torch.cat([plainly(model, torch.tensor([text]))[0] for text in texts])
    everywhere = hidden_states(model, laid).flatten(0, 1)
    torch.testing.assert_close(everywhere[some_places(laid, texts, 1.0)], expected, rtol=0, atol=1e-4)
    if case == "adapters":
        add_adapter(model, ppo_params(lora_rank=2), head_seed(3))
    if case == "recomputed":
        no_dropout(model)
        save_memory(model.train(), True)
    seen = asked(model)
    found = hidden_states_at(model, laid, places)
    assert set(seen) == {laid.ids.shape[1]}
    torch.testing.assert_close(found, everywhere[places], rtol=0, atol=1e-5)


def test_dropout_of_the_last_block_is_what_the_model_says() -> None:
    """All is dropped: the residual stream goes through as it is."""
    model = neox(0.5)
    texts = repeated(40, 290)
    laid = pack(enable_packed_attention(model), texts, 0)
    places = some_places(laid, texts, 0.3)
    last = list(model.base_model.layers)[-1]
    last.train()
    last.post_attention_dropout.p = last.post_mlp_dropout.p = 1.0
    incoming: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, given: incoming.append(given[0]))
    found = hidden_states_at(model, laid, places)
    torch.testing.assert_close(found, model.base_model.final_layer_norm(incoming[0][0, places]))
