"""The connection itself: several workers, types, and what each end refuses before anything is sent."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.engines.transfer import PROTOCOL, Joining, Receiver, Sender, TransferRefused, Update

SHAPES = {"wte": [5, 3], "head": [7], "scalar": []}


def nothing() -> None:
    return None


class Worker(threading.Thread):
    """One worker of an engine: joins, then takes as many updates as it is asked."""

    def __init__(self, joining: dict[str, Any], place: int, shapes: dict[str, list[int]] = SHAPES) -> None:
        super().__init__(daemon=True)
        self.receiver = Receiver(shapes, {"dtype": "bfloat16", "place": place}, torch.device("cpu"))
        self.joining, self.place = joining, place
        self.got: dict[str, Tensor] = {}

    def run(self) -> None:
        self.receiver.join(self.joining, self.place)

    def update(self, info: dict[str, Any]) -> None:
        self.receiver.receive(info, self.got.__setitem__)


def connected(count: int, shapes: dict[str, list[int]] = SHAPES) -> tuple[Sender, list[Worker]]:
    sender = Sender("127.0.0.1", count)
    workers = [Worker(sender.joining(), place, shapes) for place in range(count)]
    for worker in workers:
        worker.start()
    sender.join(nothing)
    for worker in workers:
        worker.join()
    return sender, workers


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=noise).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_gets_every_tensor(count: int, dtype: torch.dtype) -> None:
    sender, workers = connected(count)
    assert sender.facts["dtype"] == "bfloat16"
    for _ in range(2):
        values = weights(dtype)
        info = sender.next_update({name: value.to("meta") for name, value in values.items()})
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(worker.update, info) for worker in workers]
            sender.accepted(nothing)
            for value in values.values():
                sender.send(value).wait()
            sender.loaded(nothing)
            for item in waiting:
                item.result()
        for worker in workers:
            assert list(worker.got) == list(values)
            assert all(torch.equal(worker.got[name], value) for name, value in values.items())
            assert {value.dtype for value in worker.got.values()} == {dtype}
            worker.got.clear()


def test_one_worker_of_another_model_stops_the_update_for_all() -> None:
    sender, (right, wrong) = connected(2)
    wrong.receiver.expected = {**SHAPES, "wte": [5, 4]}
    info = sender.next_update(weights(torch.float32))
    with ThreadPoolExecutor() as pool:
        pool.submit(right.update, info)
        refused = pool.submit(wrong.update, info)
        with pytest.raises(TransferRefused, match=r"wte is \[5, 4\] in the engine and \[5, 3\] in the policy"):
            sender.accepted(nothing)
        with pytest.raises(TransferRefused):
            refused.result()
        sender.close()  # the other one, which waits for the first tensor, is let go
    assert not right.got


@pytest.mark.parametrize(("change", "said"), [
    ({"names": ["wte", "head"], "dtypes": ["float32"] * 2, "shapes": [[5, 3], [7]]},
     r"1 tensors of the engine's are not in the policy \(scalar\)"),
    ({"names": ["wte", "head", "scalar", "x"], "dtypes": ["float32"] * 4, "shapes": [[5, 3], [7], [], [1]]},
     r"1 tensors of the policy's are not in the engine \(x\)"),
    ({"shapes": [[3, 5], [7], []]}, r"1 tensors of another shape \(wte is \[5, 3\] in the engine and \[3, 5\]"),
    ({"dtypes": ["float32", "float32", "system"]}, r"1 tensors of an unknown type \(system\)"),
    ({"dtypes": ["float32"]}, "3 names, 1 types and 3 shapes"),
    ({"names": ["wte", "wte", "scalar"], "shapes": [[5, 3], [5, 3], []]}, "a tensor is named twice"),
])
def test_anything_but_all_tensors_of_the_model_is_refused(change: dict[str, Any], said: str) -> None:
    update = replace(Update.of("a", 1, weights(torch.float32)), **change)
    assert re.search(said, update.problem(SHAPES)), update.problem(SHAPES)


def test_the_update_of_the_model_is_taken() -> None:
    assert Update.of("a", 1, weights(torch.float32)).problem(SHAPES) == ""


def test_an_update_of_another_trainer_is_refused() -> None:
    _, [worker] = connected(1)
    with pytest.raises(TransferRefused, match="another trainer has connected meanwhile"):
        worker.update(asdict(Update.of("another", 1, weights(torch.float32))))
    with pytest.raises(TransferRefused, match="no update of an instructflow trainer"):
        worker.update({"names": []})
    with pytest.raises(TransferRefused, match="before a trainer has connected"):
        Receiver(SHAPES, {}, torch.device("cpu")).receive({}, lambda name, value: None)


def test_another_version_of_the_connection_is_told_to_both() -> None:
    sender = Sender("127.0.0.1", 1)
    worker = Receiver(SHAPES, {}, torch.device("cpu"))
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(worker.join, {**sender.joining(), "protocol": PROTOCOL + 1}, 0)
        with pytest.raises(TransferRefused, match="install the same instructflow in both environments"):
            sender.join(nothing)
        with pytest.raises(TransferRefused, match=f"version {PROTOCOL + 1}"):
            refused.result()
    with pytest.raises(TransferRefused, match="no connection of an instructflow trainer"):
        worker.join({"address": "127.0.0.1"}, 0)
    if not torch.cuda.is_available():
        with pytest.raises(TransferRefused, match="nccl: needs a GPU at both ends"):
            raise_for(Joining("127.0.0.1", 1, 1, 2, "a", "nccl"))
    with pytest.raises(TransferRefused, match="must be gloo or nccl"):
        raise_for(Joining("127.0.0.1", 1, 1, 2, "a", "carrier pigeon"))


def raise_for(joining: Joining) -> None:
    from rlhf.engines.transfer import group_of

    group_of(None, 1, joining.world_size, joining.transport, joining.address)


def test_a_request_that_fails_ends_the_waiting() -> None:
    sender = Sender("127.0.0.1", 1)
    with pytest.raises(OSError, match="refused"):
        sender.join(lambda: OSError("refused"))
