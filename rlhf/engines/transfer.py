"""The connection by which an engine gets a policy's weights, tensor by tensor: both of its ends.

A process group of torch (gloo, or NCCL between GPUs) joins the trainer's main process, rank 0, to the workers of one
engine. Each engine has a group of its own, so one that dies takes no other with it. The workers are told what to do by
vLLM's weight-transfer requests (rlhf/engines/server.py); what they answer, vLLM does not pass on, so they write it into
the group's store: whether their model is the trainer's, and whether an update is one of all its tensors.

This file needs torch alone: it also runs in vLLM's environment (rlhf/engines/vllm_plugin.py).
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "instructflow"  # vllm serve --weight-transfer-config '{"backend": "instructflow"}'
PROTOCOL = 1
JOIN_SECONDS = 120.0  # until all have joined a group
MOVE_SECONDS = 300.0  # for one tensor; a worker waits twice as long, since the trainer may wait for another engine
POLL_SECONDS = 0.02
NAMED = 3  # tensors in a message, at most


class TransferRefused(Exception):
    """What one end refuses of the other, in one line: another model, not all tensors, other shapes."""


@dataclass(frozen=True)
class Joining:
    """What the trainer tells an engine's workers for a group with it: vLLM's `init_info`."""

    address: str
    port: int
    first_rank: int  # of the engine's first worker; the trainer is 0
    world_size: int
    connection: str  # its name, which each update repeats
    transport: str = "gloo"
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Update:
    """An update's tensors in the order in which they come: vLLM's `update_info`."""

    connection: str
    number: int  # of this connection, from 1
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    @classmethod
    def of(cls, connection: str, number: int, tensors: Mapping[str, Tensor]) -> "Update":
        """The update of these tensors, whose values may still be on the meta device."""
        dtypes = [str(value.dtype).removeprefix("torch.") for value in tensors.values()]
        return cls(connection, number, list(tensors), dtypes, [list(value.shape) for value in tensors.values()])

    def problem(self, expected: Mapping[str, Sequence[int]]) -> str:
        """Why this is no update of a model with these tensors (name -> shape), in one line; empty where it is one."""
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            return f"{len(self.names)} names, {len(self.dtypes)} types and {len(self.shapes)} shapes"
        sent = dict(zip(self.names, self.shapes, strict=True))
        if len(sent) < len(self.names):
            return "a tensor is named twice"
        other = [f"{name} is {list(expected[name])} in the engine and {list(shape)} in the policy"
                 for name, shape in sent.items() if name in expected and list(shape) != list(expected[name])]
        missing = [name for name in expected if name not in sent]
        beyond = [name for name in sent if name not in expected]
        unknown = sorted({name for name in self.dtypes if not isinstance(getattr(torch, name, None), torch.dtype)})
        problems = [f"{len(found)} tensors {what} ({', '.join(found[:NAMED])}{', ...' if len(found) > NAMED else ''})"
                    for found, what in ((other, "of another shape"), (missing, "of the engine's are not in the policy"),
                                        (beyond, "of the policy's are not in the engine"),
                                        (unknown, "of an unknown type")) if found]
        return "; ".join(problems)


def group_of(store: Any, rank: int, size: int, transport: str, address: str) -> Any:
    """A process group that torch.distributed does not know of. `address`: of this process, for gloo."""
    timeout = timedelta(seconds=2 * MOVE_SECONDS if rank else MOVE_SECONDS)
    if transport == "gloo":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout, options._threads = timeout, 2
        return dist.ProcessGroupGloo(dist.PrefixStore("group", store), rank, size, options)
    if transport == "nccl" and not torch.cuda.is_available():
        raise TransferRefused("transport nccl: needs a GPU at both ends; gloo needs none")
    if transport == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(dist.PrefixStore("group", store), rank, size, options)
    raise TransferRefused(f"transport {transport!r}: must be gloo or nccl")


def broadcast(group: Any, value: Tensor) -> Any:
    """Begins to move a tensor from rank 0 to the others; `wait()` of what it returns raises RuntimeError where one of
    them is gone."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([value], options)


def own_address(other: str, port: int) -> str:
    """This machine's address on the way to another."""
    with socket.create_connection((other, port), timeout=JOIN_SECONDS) as connection:
        return str(connection.getsockname()[0])


# --- the engine's end ------------------------------------------------------------------------------------------------

class Receiver:
    """A worker's end. `expected`: name -> shape of the tensors of its whole model, as a Hugging Face folder has them;
    `facts`: what the trainer may want to know of it."""

    def __init__(self, expected: Mapping[str, Sequence[int]], facts: Mapping[str, Any], device: torch.device) -> None:
        self.expected, self.facts, self.device = expected, facts, device
        self.store: Any = None
        self.group: Any = None
        self.connection = ""
        self.rank = 0

    def join(self, info: Mapping[str, Any], worker: int) -> None:
        """Joins the group of a trainer, instead of any other. `worker`: this one's number among the engine's workers.

        Raises TransferRefused where the trainer speaks another version of this.
        """
        self.leave()
        try:
            joining = Joining(**info)
        except TypeError as error:
            raise TransferRefused(f"no connection of an instructflow trainer: {error}") from None
        self.rank, self.connection = joining.first_rank + worker, joining.connection
        address = own_address(joining.address, joining.port)
        self.store = dist.TCPStore(joining.address, joining.port, is_master=False,
                                   timeout=timedelta(seconds=JOIN_SECONDS))
        problem = "" if joining.protocol == PROTOCOL else (
            f"the trainer speaks version {joining.protocol} of the connection and the engine version {PROTOCOL}: "
            "install the same instructflow in both environments")
        self.store.set(f"hello/{self.rank}", json.dumps({**self.facts, "problem": problem}))
        if problem:
            raise TransferRefused(problem)
        self.group = group_of(self.store, self.rank, joining.world_size, joining.transport, address)

    def receive(self, info: Mapping[str, Any], load: Callable[[str, Tensor], object]) -> None:
        """Gets an update's tensors and hands each to `load`.

        Raises TransferRefused for anything but all tensors of this model, before the first; and what `load` raises, of
        the first tensor that it refuses, after the last one: the other workers still get theirs.
        """
        if self.group is None:
            raise TransferRefused("an update before a trainer has connected")
        try:
            update = Update(**info)
        except TypeError as error:
            raise TransferRefused(f"no update of an instructflow trainer: {error}") from None
        if update.connection != self.connection:
            raise TransferRefused("another trainer has connected meanwhile")
        problem = update.problem(self.expected)
        self.store.set(f"update/{update.number}/{self.rank}", problem)
        if problem:
            raise TransferRefused(problem)
        failed: Exception | None = None
        for name, dtype, shape in zip(update.names, update.dtypes, update.shapes, strict=True):
            value = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            broadcast(self.group, value).wait()
            if failed is None:
                try:
                    load(name, value)
                except Exception as error:
                    failed = error
        self.store.set(f"loaded/{update.number}/{self.rank}", "" if failed is None else
                       f"cannot be loaded: {type(failed).__name__}: {failed}"[:500])
        if failed is not None:
            raise failed

    def leave(self) -> None:
        """Forgets the trainer."""
        self.group = self.store = None


# --- the trainer's end -----------------------------------------------------------------------------------------------

class Sender:
    """The trainer's end of the connection to one engine with `workers` workers. `address`: of this process, for them.

    What it waits for, the workers do when vLLM tells them; `failed()` is the error where that request has failed.
    """

    def __init__(self, address: str, workers: int, transport: str = "gloo") -> None:
        self.address, self.workers, self.transport = address, workers, transport
        self.name = secrets.token_hex(8)
        self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False,
                                   timeout=timedelta(seconds=JOIN_SECONDS))
        self.group: Any = None
        self.facts: dict[str, Any] = {}
        self.updates = 0

    def joining(self) -> dict[str, Any]:
        """What the workers need to join."""
        return asdict(Joining(self.address, self.store.port, 1, self.workers + 1, self.name, self.transport))

    def join(self, failed: Callable[[], Exception | None]) -> None:
        """Waits until all workers are there. Raises TransferRefused where one refuses, and what `failed` returns."""
        hellos = [json.loads(text) for text in self._said("hello", failed, JOIN_SECONDS)]
        if problem := next((item["problem"] for item in hellos if item["problem"]), ""):
            raise TransferRefused(problem)
        self.facts = hellos[0]
        self.group = group_of(self.store, 0, self.workers + 1, self.transport, self.address)

    def next_update(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the workers need for an update with these tensors."""
        self.updates += 1
        return asdict(Update.of(self.name, self.updates, tensors))

    def accepted(self, failed: Callable[[], Exception | None]) -> None:
        """Waits until all workers take the update. Raises TransferRefused where one does not, and what `failed`
        returns."""
        self._refuse(self._said(f"update/{self.updates}", failed, JOIN_SECONDS))

    def send(self, value: Tensor) -> Any:
        """Begins to send the update's next tensor; as `broadcast`."""
        return broadcast(self.group, value)

    def loaded(self, failed: Callable[[], Exception | None]) -> None:
        """Waits until all workers have loaded the update. Raises as `accepted` does."""
        self._refuse(self._said(f"loaded/{self.updates}", failed, MOVE_SECONDS))

    def _refuse(self, problems: Iterable[str]) -> None:
        if problem := next((item for item in problems if item), ""):
            raise TransferRefused(problem)

    def _said(self, what: str, failed: Callable[[], Exception | None], seconds: float) -> list[str]:
        """What each worker has written."""
        keys, limit = [f"{what}/{rank}" for rank in range(1, self.workers + 1)], time.monotonic() + seconds
        while not self.store.check(keys):
            error = failed()
            if error is not None and not self.store.check(keys):
                raise error
            if time.monotonic() > limit:
                raise TimeoutError(f"no answer after {seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        return [self.store.get(key).decode() for key in keys]

    def close(self) -> None:
        """Ends the connection."""
        self.group = None
        with suppress(AttributeError):
            del self.store
