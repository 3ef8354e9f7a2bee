"""Several processes that train one model: each does its share of every batch, and all agree on everything else.

torchrun starts them, or `fork` on one machine's CPU. All run the same program on the same inputs; only the first writes
files. What a step adds up over its rows (loss, gradients, the journal's values) is added up over the processes, and
divided by counts of the whole batch: the same update for any number of them, up to rounding.

`shard` splits weights, gradients and optimizer state over the processes (FSDP2) instead of keeping them in each.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.files import hands_off

Item = TypeVar("Item")
Result = TypeVar("Result")
WAIT_HOURS = 4  # for the slowest process, before the others give up
BUCKET = 2**24  # entries of gradients that are added up at once


# --- who is there ----------------------------------------------------------------------------------------------------

def size() -> int:
    """How many processes train together; 1 where none were started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes files and speaks."""
    return rank() == 0


def join() -> None:
    """Joins the processes that torchrun has started; nothing happens where there are none or it has been done."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    else:
        dist.init_process_group("gloo")
    if not is_main():
        hands_off()


def fork(count: int) -> None:
    """Makes this process the first of `count` on this machine's CPU, with one thread each.

    Results depend on `count`, not on how many cores there are. To be called before anything is computed: threads do not
    survive a fork.
    """
    torch.set_num_threads(1)
    sys.stdout.flush(), sys.stderr.flush()  # or what is waiting in them is written twice
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    place = next((number for number in range(1, count) if os.fork() == 0), 0)
    if place:
        store = dist.TCPStore("127.0.0.1", store.port, count, is_master=False)
        hands_off()
    dist.init_process_group("gloo", store=store, rank=place, world_size=count, timeout=timedelta(hours=WAIT_HOURS))


def leave() -> None:
    """Ends the group. The first process waits until the others have come here too."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# --- what they tell each other ---------------------------------------------------------------------------------------

def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of what all have: every `size()`-th item. Of rows sorted by length all get like lengths."""
    return items if size() == 1 else items[rank()::size()]


def share_passes(model: nn.Module, batches: Sequence[Item]) -> Sequence[Item]:
    """This process's batches of an evaluation, for a ratio of sums: passes of a sharded model are everybody's."""
    return batches if sharded(model) else share(batches)


def all_reduce(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the processes, in float64."""
    if size() == 1 or not values:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether it is so in some process."""
    return all_reduce({"flag": float(flag)})["flag"] > 0 if size() > 1 else flag


def broadcast(thing: Item) -> Item:
    """What the first process has; the others' is ignored."""
    if size() == 1:
        return thing
    box = [thing]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(mine: Item) -> list[Item]:
    """What every process has, in their order."""
    if size() == 1:
        return [mine]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, mine)
    return found


def by_rows(function: Callable[..., Sequence[Result]], *columns: Sequence[Any]) -> list[Result]:
    """function(*columns), a value for each row: every process does its share of the rows and has all values."""
    parts = all_gather(list(function(*(share(column) for column in columns))))
    return [parts[row % len(parts)][row // len(parts)] for row in range(len(columns[0]))]


def barrier() -> None:
    """Waits for all."""
    if size() > 1:
        dist.barrier()


def check_divides(count: int, name: str) -> None:
    """Raises UserError where a batch cannot be shared out evenly."""
    if count % size():
        raise UserError(f"{name} = {count}: must be a multiple of {size()}, the number of processes")


# --- gradients -------------------------------------------------------------------------------------------------------

def backward(model: nn.Module, loss: Tensor) -> None:
    """loss.backward() of this process's part. FSDP takes the mean over the processes where a sum is wanted."""
    (loss * size() if sharded(model) else loss).backward()


def all_reduce_gradients(models: Sequence[nn.Module], values: Mapping[str, float]) -> dict[str, float]:
    """Adds up a step's gradients over the processes, in place, and `values`, which are returned."""
    if size() == 1:
        return dict(values)
    bucket: list[Tensor] = []
    for parameter in (item for model in models if not sharded(model)  # FSDP has done it in the backward pass
                      for item in model.parameters() if item.requires_grad):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(item.numel() for item in bucket) >= BUCKET:
            _all_reduce_flat(bucket)
            bucket = []
    if bucket:
        _all_reduce_flat(bucket)
    return all_reduce(values)


def _all_reduce_flat(gradients: list[Tensor]) -> None:
    flat = torch.cat([item.flatten() for item in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([item.numel() for item in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def clip_gradients(model: nn.Module, most: float) -> float:
    """Scales the gradients to a norm of at most `most`; returns the norm before."""
    return float(full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), most)))


# --- sharding --------------------------------------------------------------------------------------------------------

class _Root(nn.Module):
    """FSDP hands a module's weights out during that module's call: this one's call is whatever is to be computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


def shard(model: Any) -> None:
    """Splits a transformer over the processes, block by block, in place (FSDP2); one process keeps it as it is."""
    from torch.distributed.fsdp import fully_shard

    if size() == 1:
        return
    blocks = next(module for module in model.base_model.children() if isinstance(module, nn.ModuleList))
    for block in blocks:
        fully_shard(block)
    vars(model)["_root"] = fully_shard(_Root(model))  # not a submodule: it holds the model


def sharded(model: nn.Module) -> bool:
    return "_root" in vars(model)


def _parts(root: nn.Module) -> list[Any]:
    return [module for module in root.modules() if hasattr(module, "unshard")]


def compute(function: Callable[..., Result], model: nn.Module, *arguments: Any) -> Result:
    """function(model, *arguments), with all weights there where the model is sharded."""
    return vars(model)["_root"](function, *arguments) if sharded(model) else function(model, *arguments)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All weights of a sharded model in every process, to be read and not changed."""
    parts = _parts(vars(model)["_root"]) if sharded(model) else []
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its entries."""
    split: Any = tensor
    return split.full_tensor() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is split over processes (a DTensor, whose module takes a second to import)."""
    return hasattr(tensor, "full_tensor")


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor split as `other` is."""
    if not is_dtensor(other) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split: Any = other
    return distribute_tensor(tensor.to(other.device), split.device_mesh, split.placements)


def full_state(state: Any) -> Any:
    """A state_dict, of a model or an optimizer, with whole tensors: the same for any number of processes."""
    if isinstance(state, Mapping):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state(value) for value in state]
    return full_tensor(state) if isinstance(state, Tensor) else state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads whole tensors into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own[name]) if name in own else value for name, value in state.items()},
                          strict=strict)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads whole moments into an optimizer of a model, sharded or not."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    moments = {number: {name: shard_like(value, parameters[number]) if isinstance(value, Tensor) and value.dim() else value
                        for name, value in entry.items()} for number, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})
