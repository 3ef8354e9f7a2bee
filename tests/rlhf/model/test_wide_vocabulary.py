"""A wide vocabulary's logits are made in parts: the same loss and gradients, and never more logits alive at once."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf.model.forward
from rlhf.data.packing import PackedBatch
from rlhf.model.log_probs import log_probs_in_parts, token_log_probs
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
    for log_probs in (token_log_probs(head(states), ids), log_probs_in_parts(states, head, ids, rows)):
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
            log_probs_in_parts(states, head, ids, rows).mean().backward()
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
