"""A wide vocabulary's logits are made in parts: the same loss and gradients, and never more logits alive at once."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf.model.forward
import rlhf.model.log_probs
from rlhf.data.packing import PackedBatch
from rlhf.model.log_probs import log_probs_in_parts, token_log_probs
from rlhf.model.responses import response_log_probs
from rlhf.pretrain import lm_loss
from rlhf.sft import batch_loss

PLACES, WIDTH, VOCABULARY = 90, 8, 1000


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that exist at once, made while it is on; results of views are not counted twice."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for item in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(item, Tensor):
                storage = item.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return found

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def head_and_states(dtype: torch.dtype) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    head = torch.nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=draw))
        head.bias.copy_(torch.randn(VOCABULARY, generator=draw))
    states = torch.randn(PLACES, WIDTH, generator=draw).to(dtype).requires_grad_()
    return head, states, torch.randint(VOCABULARY, (PLACES,), generator=draw)


@pytest.mark.parametrize("rows", [1, 7, 45, 90, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_give_the_same_log_probs_and_gradients(rows: int, dtype: torch.dtype) -> None:
    head, states, ids = head_and_states(dtype)
    found = []
    for log_probs in (token_log_probs(head(states), ids), log_probs_in_parts(states, head, ids, rows)[0]):
        head.zero_grad()
        states.grad = None
        log_probs.pow(2).mean().backward()  # every place with a weight of its own
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        found.append((log_probs.detach(), states.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_parts_hold_fewer_logits_at_once() -> None:
    head, states, ids = head_and_states(torch.float32)
    most = []
    for rows in (PLACES, 9):
        head.zero_grad()
        states.grad = None
        with Alive() as alive:
            log_probs_in_parts(states, head, ids, rows)[0].mean().backward()
        most.append(alive.most)
    all_logits, tenth = 4 * PLACES * VOCABULARY, 4 * 9 * VOCABULARY
    assert most[0] > 2 * all_logits
    assert most[1] < 5 * tenth + 4 * 4 * WIDTH * VOCABULARY  # the rest are gradients of the head
    with Alive() as plain:
        token_log_probs(head(states), ids).mean().backward()
    assert plain.most > 2 * all_logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_takes_parts_where_the_logits_are_many(make_policy: Callable[..., Any], architecture: str,
                                                        precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_policy(architecture)
    ids = torch.randint(5, 200, (4, 20), generator=torch.Generator().manual_seed(3))
    places = torch.tensor([row * 20 + column for row in range(4) for column in range(6, 19)])
    found = []
    for most in (2**26, 5 * model.config.vocab_size):
        monkeypatch.setattr(rlhf.model.forward, "LOGITS_AT_ONCE", most)
        model.zero_grad()
        sizes: list[int] = []
        hook = model.get_output_embeddings().register_forward_hook(
            lambda _module, _given, made, sizes=sizes: sizes.append(len(made)))
        loss = batch_loss(model, PackedBatch(ids), places, precision)
        loss.backward()
        hook.remove()
        found.append((loss.item(), [item.grad.clone() for item in model.parameters() if item.grad is not None], sizes))
    (plain, expected, whole), (parts, gradients, pieces) = found
    assert whole == [52]
    assert max(pieces) == 5
    assert parts == pytest.approx(plain, rel=1e-6)
    # bf16: a part's gradient of the head is rounded before it is added, not after
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-7


def exact(model: Any, prompts: list[list[int]], responses: list[list[int]], temperature: float
          ) -> list[tuple[list[float], list[float]]]:
    """Log-probs and entropies of each response's tokens: transformers' own pass, one sequence at a time, in float64."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].double() / temperature
        log_probs = logits.log_softmax(-1)
        found.append((log_probs.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1).tolist(),
                      (-(log_probs.exp() * log_probs).sum(-1)).tolist()))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("most", [2**26, 700])
def test_ppo_s_log_probs_and_entropies_are_those_of_the_whole_logits(
        make_policy: Callable[..., Any], architecture: str, most: int, temperature: float,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.model.forward, "LOGITS_AT_ONCE", most)
    model = make_policy(architecture)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (3, 9, 1)]
    responses = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (7, 2, 12)]
    log_probs, entropies = response_log_probs(model, prompts, responses, 12, pad_id=0, temperature=temperature,
                                              precision="fp32", with_entropy=True)
    assert log_probs.requires_grad
    assert not entropies.requires_grad
    for row, (wanted, spread) in enumerate(exact(model, prompts, responses, temperature)):
        count = len(responses[row])
        assert log_probs[row, :count].tolist() == pytest.approx(wanted, abs=2e-5)
        assert entropies[row, :count].tolist() == pytest.approx(spread, abs=2e-5)
        assert not log_probs[row, count:].any()
        assert not entropies[row, count:].any()


def test_ppo_s_and_the_corpus_gradients_are_those_of_the_whole_logits(
        make_policy: Callable[..., Any], architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_policy(architecture)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (3, 9, 1)]
    responses = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (7, 2, 12)]
    weights = torch.randn(3, 12, generator=draw)
    corpus = torch.randint(5, 200, (3, 20), generator=draw)
    gradients = []
    for most in (2**26, 700):
        monkeypatch.setattr(rlhf.model.forward, "LOGITS_AT_ONCE", most)
        model.zero_grad()
        log_probs, _ = response_log_probs(model, prompts, responses, 12, pad_id=0, temperature=0.7, precision="fp32",
                                          with_entropy=True)
        ((log_probs * weights).sum() + lm_loss(model, corpus, "fp32")).backward()
        gradients.append([item.grad.clone() for item in model.parameters() if item.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


def test_ppo_s_peak_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward and the backward pass over the same tokens, the weights' own gradients aside."""
    monkeypatch.setattr(rlhf.model.forward, "LOGITS_AT_ONCE", 2**18)
    monkeypatch.setattr(rlhf.model.log_probs, "CACHED_LOGITS", 2**18)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 200, (20,), generator=draw).tolist() for _ in range(8)]
    responses = [torch.randint(5, 200, (20,), generator=draw).tolist() for _ in range(8)]
    peaks = []
    for vocabulary in (8_192, 131_072):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=False, attn_implementation="eager"))
        for item in (model.model.embed_tokens, model.lm_head):
            item.requires_grad_(False)
        with Alive() as alive:
            alive.known.update(item.untyped_storage()._cdata for item in model.parameters())
            log_probs, _ = response_log_probs(model, prompts, responses, 20, pad_id=0, temperature=0.7,
                                              precision="fp32", with_entropy=True)
            log_probs.sum().backward()
        peaks.append(alive.most)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    assert peaks[1] < 160 * 131_072 * 4 / 10  # a tenth of all logits
