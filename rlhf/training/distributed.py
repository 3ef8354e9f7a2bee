"""Data-parallel training: each process computes its share of every batch.

torchrun starts the processes, or `fork` on one machine's CPU. All run the same program on the same inputs; only rank 0,
the main process, writes files. Sums over a batch's rows (loss, gradients, journal values) are reduced over the
processes and divided by counts of the whole batch, so the update is the same for any number of processes, up to
rounding.

`shard` splits weights, gradients and optimizer state over the processes (FSDP2); without it each has all of them. With
tensor parallelism (rlhf/training/tensor_parallel.py) a group of processes takes the share of one.
"""

import os
import re
import select
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.files import leave_writing_to_main
from rlhf.training import tensor_parallel
from rlhf.training.hardware import in_bf16
from rlhf.training.settings import number

Item = TypeVar("Item")
Result = TypeVar("Result")
WAIT_HOURS = 4.0  # timeout of a collective operation: the main process may measure meanwhile
PEER_SECONDS = 10.0  # until a process whose connection is closed has ended
PEER_GONE = re.compile(r"(closed|reset) by peer|broken pipe|remote process exited", re.I)  # as gloo and NCCL say it
BUCKET = 2**24  # gradient entries per all-reduce


# --- process group ---------------------------------------------------------------------------------------------------

def size() -> int:
    """The number of processes (world size); 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the main process: rank 0, which writes files and logs."""
    return rank() == 0


def patience() -> timedelta:
    """How long a process waits for the others in a collective operation, then it ends: INSTRUCTFLOW_COLLECTIVE_HOURS.
    Raises UserError where that is no number."""
    return timedelta(hours=number("INSTRUCTFLOW_COLLECTIVE_HOURS", WAIT_HOURS, 0.001))


def join() -> None:
    """Initialises the process group that torchrun started; does nothing without torchrun or when called again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])),
                                timeout=patience())
    else:
        dist.init_process_group("gloo", timeout=patience())
    if not is_main():
        leave_writing_to_main()


def fork(count: int) -> None:
    """Forks this process into `count` on this machine's CPU, with one thread each; it becomes rank 0.

    Results depend on `count`, not on the number of cores. Must be called before anything is computed: threads do not
    survive a fork.
    """
    torch.set_num_threads(1)
    sys.stdout.flush(), sys.stderr.flush()  # buffered output would be written twice
    reading, _forks.writing = os.pipe()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    own_rank = 0
    for place in range(1, count):
        if (pid := os.fork()) == 0:
            own_rank = place
            break
        _forks.pids.append(pid)
    _forks.reading = reading
    if own_rank:
        store = dist.TCPStore("127.0.0.1", store.port, count, is_master=False)
        leave_writing_to_main()
    dist.init_process_group("gloo", store=store, rank=own_rank, world_size=count,
                            timeout=patience())


@dataclass
class Forks:
    """The main process's forks, and the pipe by which they say why they end; -1: there are none."""

    pids: list[int] = field(default_factory=list)
    reading: int = -1
    writing: int = -1


_forks = Forks()


def tell_main(line: str) -> bool:
    """Says why this fork ends, for the main process to print; False where this is no fork."""
    if _forks.writing < 0 or is_main():
        return False
    os.write(_forks.writing, f"{line}\n".encode()[:select.PIPE_BUF])
    return True


def peer_gone(error: BaseException) -> bool:
    """Whether an error is only about the end of another process of the group, which says itself why it ended."""
    return size() > 1 and isinstance(error, RuntimeError) and PEER_GONE.search(str(error)) is not None


def end_of_fork() -> tuple[int, str]:
    """(exit code, its line) of the fork that ended first; (1, "") where none is known to have failed."""
    deadline, code = time.monotonic() + PEER_SECONDS, 0
    while _forks.pids and not code and time.monotonic() < deadline:
        for pid in list(_forks.pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _forks.pids.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    lines = b""
    if _forks.reading >= 0 and select.select([_forks.reading], [], [], 0)[0]:
        lines = os.read(_forks.reading, select.PIPE_BUF)
    return code if code > 0 else 128 - code if code else 1, lines.decode(errors="replace").partition("\n")[0]


def leave() -> None:
    """Destroys the process group after all processes have arrived here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        tensor_parallel.forget()


# --- sharing of work, collectives ------------------------------------------------------------------------------------

def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share of `items`: every n-th one, n being the number of processes, or with tensor parallelism of
    their groups. Of rows sorted by length all get similar lengths."""
    count = tensor_parallel.replicas()
    return items if count == 1 else items[tensor_parallel.replica()::count]


def shares() -> int:
    """Into how many shares `share` divides."""
    return tensor_parallel.replicas()


def share_passes(model: nn.Module, batches: Sequence[Item]) -> Sequence[Item]:
    """This process's batches of an evaluation that computes a ratio of sums.

    A sharded model needs all processes in every forward pass, so there each process takes all batches.
    """
    return batches if sharded(model) else share(batches)


def equal_passes(model: nn.Module, batches: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
    """This process's batches, each with whether its result counts.

    A sharded model needs all processes in every forward pass: those with fewer batches repeat their last one, whose
    result does not count again. Each process must have a batch.
    """
    most = max(all_gather(len(batches))) if sharded(model) else len(batches)
    for place in range(most):
        yield batches[min(place, len(batches) - 1)], place < len(batches)


def all_reduce(values: Mapping[str, float]) -> dict[str, float]:
    """The sum of each value over the shares of all processes, in float64."""
    if size() == 1 or not values:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    if tensor_parallel.place():
        total.zero_()  # a group's share is counted once
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def any_of(flags: Mapping[str, bool]) -> dict[str, bool]:
    """Of each flag whether it is set in any process."""
    found = torch.tensor([float(flag) for flag in flags.values()])
    if size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return dict(zip(flags, map(bool, found.tolist()), strict=True))


def broadcast(value: Item) -> Item:
    """The main process's value, in every process."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(value: Item) -> list[Item]:
    """The values of all processes, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def by_rows(function: Callable[..., Sequence[Result]], *columns: Sequence[Any]) -> list[Result]:
    """function(*columns), which gives one value per row; processes share the rows, and each gets all values."""
    parts = all_shares(list(function(*(share(column) for column in columns))))
    return [parts[row % len(parts)][row // len(parts)] for row in range(len(columns[0]))]


def all_shares(value: Item) -> list[Item]:
    """The values of all shares, in their order: of each group's processes, which have the same, once."""
    return all_gather(value)[::tensor_parallel.degree()]


def within_group(function: Callable[[list[int]], Sequence[Result]], count: int) -> list[Result]:
    """function([0, .., count-1]), which gives one value for each; of a tensor-parallel group, whose processes all need
    the values, each process computes some of them. All processes call it equally often."""
    degree = tensor_parallel.degree()
    if degree == 1:
        return list(function(list(range(count))))
    mine = list(function(list(range(tensor_parallel.place(), count, degree))))
    first = rank() - tensor_parallel.place()
    parts = all_gather(mine)[first:first + degree]
    return [parts[index % degree][index // degree] for index in range(count)]


def barrier() -> None:
    """Waits until all processes have arrived here."""
    if size() > 1:
        dist.barrier()


def check_divides(count: int, name: str) -> None:
    """Raises UserError if a batch of `count` rows cannot be divided evenly among the processes."""
    if count % shares():
        what = "processes" if tensor_parallel.degree() == 1 else "tensor-parallel groups of processes"
        raise UserError(f"{name} = {count}: must be a multiple of {shares()}, the number of {what}")


# --- gradients -------------------------------------------------------------------------------------------------------

def backward(model: nn.Module, loss: Tensor) -> None:
    """loss.backward() for this process's share of the batch.

    FSDP averages gradients over the processes; multiplied by the number of shares, the loss gives the sum.
    """
    (loss * shares() if sharded(model) else loss).backward()


def all_reduce_gradients(models: Sequence[nn.Module], values: Mapping[str, float]) -> dict[str, float]:
    """Sums a step's gradients over the processes, in place; returns the sums of `values`."""
    if size() == 1:
        return dict(values)
    bucket: list[Tensor] = []
    for parameter in (item for model in models if not sharded(model)  # FSDP reduces them in the backward pass
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


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scales the gradients to a norm of at most `max_norm`; returns the norm before."""
    if tensor_parallel.degree() == 1:
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
    by_mesh: dict[Any, list[nn.Parameter]] = {}  # torch's function wants all on one mesh
    parameters: list[Any] = [item for item in model.parameters() if item.grad is not None]
    for parameter in parameters:
        by_mesh.setdefault(parameter.device_mesh, []).append(parameter)
    norms = [full_tensor(torch.nn.utils.get_total_norm([item.grad for item in some if item.grad is not None]))
             for some in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for some in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(some, max_norm, total)
    return float(total)


# --- sharding --------------------------------------------------------------------------------------------------------

class _Root(nn.Module):
    """Calls any function with the model's own weights gathered: FSDP gathers a module's weights when it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


def shard(model: Any, precision: str = "fp32", cpu_offload: bool = False) -> None:
    """Shards a transformer over the processes, block by block, in place (FSDP2); no effect with one process.

    With tensor parallelism blocks are split over the processes of a group first; what stands outside them is sharded
    over all processes. Where passes are `in_bf16(precision)`, a block's weights are gathered in bfloat16 and its
    gradients summed in float32; the shards themselves keep their type. What runs between the blocks stays in float32,
    as with autocast. `cpu_offload`: shards, their gradients and so the optimizer's state are on the CPU.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if size() == 1:
        return
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if in_bf16(precision):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        keep_residual_in_float32(model)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    blocks = next(module for module in model.base_model.children() if isinstance(module, nn.ModuleList))
    tensor_parallel.check(model.config)
    tensor_parallel.split(blocks)
    for block in blocks:
        fully_shard(block, mesh=tensor_parallel.data_mesh(), mp_policy=policy, offload_policy=offload)
    # Resharded after each pass, as the blocks are: between passes `model.parameters()` are the shards.
    # of a view: "an in-place op on it may produce wrong gradients"; what `compute` gives is never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    root = fully_shard(_Root(model), mp_policy=policy, offload_policy=offload, reshard_after_forward=True)
    vars(model)["_root"] = root  # not registered as a submodule: it contains the model


def keep_residual_in_float32(model: Any) -> None:
    """Lets a model with weights in bfloat16 compute what stands between its matrix products in float32, as autocast
    does with weights in float32."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _, inputs, output: output.float())
        elif isinstance(module, nn.LayerNorm):
            module.__class__ = _Float32LayerNorm


class _Float32LayerNorm(nn.LayerNorm):
    """A layer norm in float32, whatever its weights are in: on a CPU torch's own wants them in its input's type."""

    def forward(self, state: Tensor) -> Tensor:
        weight, bias = (None if item is None else item.float() for item in (self.weight, self.bias))
        return F.layer_norm(state.float(), self.normalized_shape, weight, bias, self.eps)


def sharded(model: nn.Module) -> bool:
    """Whether `shard` has split this model."""
    return "_root" in vars(model)


def compute(function: Callable[..., Result], model: nn.Module, *arguments: Any) -> Result:
    """function(model, *arguments); a sharded model gathers its weights as they are needed."""
    return vars(model)["_root"](function, *arguments) if sharded(model) else function(model, *arguments)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within this context every process has all weights of a sharded model (of a tensor-parallel group: its part of
    each), to compute passes with and not to change; processes may make different numbers of passes. All enter it."""
    if not sharded(model):
        yield
        return
    compute(lambda model: None, model)  # FSDP wants a first pass to begin at the root
    units = [module for module in vars(model)["_root"].modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def local_box(tensor: Any) -> tuple[slice, ...]:
    """Which part of a DTensor this process has: a slice of each dimension, which may be empty.

    FSDP2 splits the first dimension into equal chunks, of which the last ones may be shorter or empty; where a
    tensor-parallel group has split it already, the last dimension of the mesh, it splits each process's part.
    """
    box = [slice(0, length) for length in tensor.shape]
    for dimension, placement in reversed(list(enumerate(tensor.placements))):
        if hasattr(placement, "dim"):  # Shard, and _StridedShard, which is no subclass of it
            part, place = box[placement.dim], tensor.device_mesh.get_local_rank(dimension)
            chunk = -(-(part.stop - part.start) // tensor.device_mesh.size(dimension))
            start = min(part.start + place * chunk, part.stop)
            box[placement.dim] = slice(start, min(start + chunk, part.stop))
    return tuple(box)


def reshard(model: nn.Module) -> None:
    """Leaves every process with its parts alone of a sharded model's weights: after a pass without gradients FSDP keeps
    those outside the blocks gathered."""
    modules: list[Any] = list(vars(model)["_root"].modules()) if sharded(model) else []
    for module in modules:
        if hasattr(module, "reshard"):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes if it is a DTensor."""
    dtensor: Any = tensor
    return dtensor.full_tensor() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without importing that class, which takes a second."""
    return hasattr(tensor, "full_tensor")


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The whole tensor sharded as `other` is."""
    if not is_dtensor(other) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    dtensor: Any = other
    return distribute_tensor(tensor.to(other.device), dtensor.device_mesh, dtensor.placements)
