"""torch.compile changes speed, not numbers: the same loss and gradients as the plain passes."""

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from rlhf.fast.decoder import Decoder, KVCache
from rlhf.model.forward import next_token_logits
from rlhf.model.load import compile_model, load_policy
from rlhf.model.sampling import Sampling, compiled, prefill, sample_responses

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                                                   reason="torch.compile needs a C++ compiler")]


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "qwen2"])
def test_compiled_passes_give_the_same_loss_and_gradients(make_policy: Callable[..., Any], name: str) -> None:
    found = []
    for on in (False, True):
        model = make_policy(name).train()
        compile_model(model, on)
        losses = []
        for length in (7, 12, 9):  # lengths differ from batch to batch
            ids = torch.randint(3, 300, (4, length), generator=torch.Generator().manual_seed(length))
            losses.append(next_token_logits(model, ids).log_softmax(-1).gather(2, ids[:, 1:, None]).mean())
        torch.stack(losses).sum().backward()
        found.append(([loss.item() for loss in losses], {key: value.grad for key, value in model.named_parameters()}))
        assert hasattr(model.base_model, "_compiled_call_impl")
        assert (model.base_model._compiled_call_impl is not None) == on
    (plain, gradients), (compiled, ours) = found
    assert compiled == pytest.approx(plain, abs=1e-5)
    for key, value in gradients.items():
        assert torch.allclose(ours[key], value, atol=1e-5), key


def test_a_compiled_sampler_draws_the_same_and_is_compiled_once(policy_folder: Path) -> None:
    """Prompts of all lengths, rows that leave and come, weights that change from call to call as PPO's do."""
    policy = load_policy(policy_folder)
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 300) for _ in range(draw.randint(1, 20))] for _ in range(24)]
    stops = tuple(range(3, 20))
    torch._dynamo.reset()
    compiled.cache_clear()
    before, graphs = counters["stats"]["unique_graphs"], []
    for number in range(3):
        plain, other = (sample_responses(policy, prompts, Sampling(12, stops, 0, batch_size=8, compile=on),
                                         torch.Generator().manual_seed(number)) for on in (False, True))
        assert len(set(map(len, plain))) > 5
        assert sum(one == two for one, two in zip(plain, other, strict=True)) >= 23  # rounding may turn a draw
        graphs.append(counters["stats"]["unique_graphs"] - before)
        with torch.no_grad():
            for item in policy.parameters():
                item.mul_(1.01)
    assert 0 < graphs[-1] <= 4  # of reading and of a step; of a single row too, a case of its own to the compiler


def step_states(decoder: Decoder, cache: KVCache, rope: tuple[torch.Tensor, torch.Tensor] | None, ids: torch.Tensor,
                positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return decoder.hidden(ids.unsqueeze(1), positions.unsqueeze(1), cache, None, rope, columns)[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "qwen2"])
def test_compiled_states_are_the_models_own(make_policy: Callable[..., Any], name: str, precision: str) -> None:
    """Prompts, then two tokens after them, against float64 passes over the whole texts. Llama and Qwen2 share keys."""
    model = make_policy(name)
    exact = copy.deepcopy(model).double()
    draw = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in (9, 7, 4)]
    decoder = Decoder(model, precision, compiled=True)
    assert decoder.kept == (torch.bfloat16 if precision == "bf16" else torch.float32)
    cache, rope = decoder.new_cache(3, 12), decoder.rope(12)
    width = max(map(len, texts)) - 2
    ids = torch.tensor([[*text[:-2], *[0] * (width - len(text) + 2)] for text in texts])
    last = torch.tensor([len(text) - 3 for text in texts])
    positions = torch.arange(width).expand(3, width)
    found = [compiled(prefill)(decoder, cache, rope, ids, positions, torch.arange(3), last)]
    for step in (1, 2):
        tokens = torch.tensor([text[len(text) - 3 + step] for text in texts])
        columns = torch.arange(int(last.max()) + step + 1)
        found.append(compiled(step_states)(decoder, cache, rope, tokens, last + step, columns))
    expected = [exact.base_model(torch.tensor([text])).last_hidden_state[0] for text in texts]
    tolerance = 1e-4 if precision == "fp32" else 0.06
    for step, states in enumerate(found):
        for row, whole in enumerate(expected):
            own = whole[last[row] + step]
            assert (states[row] - own).norm() < tolerance * own.norm(), (step, row)
