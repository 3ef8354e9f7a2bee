"""One checkpoint's folder, written and read by all processes together (torch.distributed.checkpoint).

    __<rank>_0.distcp    tensors, or parts of them, that this process wrote
    .metadata            which file has which part of each tensor
    values.pt            Python values

It is written with a process group that nothing else uses: the training's collective operations go on meanwhile.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf.training import distributed
from rlhf.training.state import Tensors, load_optimizer, optimizer_state

Result = TypeVar("Result")
VALUES, METADATA = "values.pt", ".metadata"


def own_group() -> Any:
    """A new process group on the CPU; None with one process. All processes call it."""
    return dist.new_group(backend="gloo", timeout=distributed.patience()) if distributed.size() > 1 else None


def together(function: Callable[[], Result], group: Any) -> list[Result]:
    """The results of all processes. If some raise, each process raises what the first of them did."""
    own: tuple[Result | None, Exception | None]
    try:
        own = function(), None
    except Exception as error:
        own = None, _to_send(error)
    every: list[Any] = [own] * distributed.size()
    if group is not None:
        dist.all_gather_object(every, own, group=group)
    for _, problem in every:
        if problem is not None:
            raise problem
    return [result for result, _ in every]


def _to_send(error: Exception) -> Exception:
    """The system's error that this one came from (torch makes "unexpected pos" of a full disk), else its text."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return RuntimeError(f"{type(error).__name__}: {error}")  # not every exception can be sent


def write(folder: Path, tensors: Tensors, values: bytes, group: Any) -> dict[str, str]:
    """Writes this process's tensors into a folder that is there and empty, and the main process's values, to the disk.

    Returns the SHA-256 of each file of all processes. Raises OSError, in all processes alike.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

    # copy_ahead 0: the tensors are in the CPU's memory, and this thread must not touch a GPU
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, is_coordinator=distributed.is_main())
    plans = together(lambda: writer.prepare_local_plan(planner.create_local_plan()), group)
    plans, metadata = planner.create_global_plan(plans)  # the same in every process
    own_plan = planner.finish_plan(writer.prepare_global_plan(plans)[distributed.rank()])
    written = together(lambda: writer.write_data(own_plan, planner).value(), group)

    def finish() -> dict[str, str]:
        own = sorted(folder.glob(f"__{distributed.rank()}_*"))
        if distributed.is_main():
            writer.finish(metadata, written)
            with (folder / VALUES).open("wb") as handle:
                handle.write(values)
                handle.flush()
                os.fsync(handle.fileno())
            own += [folder / METADATA, folder / VALUES]
        return {path.name: sha256(path) for path in own}

    return {name: digest for part in together(finish, group) for name, digest in part.items()}


def check(folder: Path, files: Mapping[str, str], names: Iterable[str]) -> None:
    """Raises ValueError where a file does not have the SHA-256 that was saved, OSError where it cannot be read."""
    for name in names:
        if sha256(folder / name) != files[name]:
            raise ValueError(f"the SHA-256 of {name} is not the one that was saved")


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class Saved:
    """A checkpoint that was found: its step and its values. Each process reads the tensors that it needs into given
    ones."""

    def __init__(self, step: int, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.step = step
        self.values: dict[str, Any] = torch.load(folder / VALUES, map_location="cpu", weights_only=True)
        self._reader = FileSystemReader(folder)
        self._metadata: Any = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, distributed.is_main())

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._metadata.state_dict_metadata)

    def read(self, name: str, tensors: Tensors) -> Tensors:
        """Fills the tensors that were saved as `name`/KEY, sharded or not, and returns them."""
        from torch.distributed.checkpoint import DefaultLoadPlanner

        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({f"{name}/{key}": value.detach() for key, value in tensors.items()}, self._metadata)
        self._reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
        return tensors

    def read_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Loads what was saved of an optimizer as `name`; parameters that were never stepped get no state."""
        sizes = {key.removeprefix(f"{name}/"): (found.size, found.properties.dtype)
                 for key, found in self._metadata.state_dict_metadata.items() if key.startswith(f"{name}/")}
        load_optimizer(optimizer, self.read(name, optimizer_state(optimizer, sizes)), self.values[name])
