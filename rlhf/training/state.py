"""What a checkpoint holds, by name: tensors, of which a sharded one is this process's part only, and Python values."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.training import distributed

Tensors = dict[str, Tensor]


class State:
    """A trainer's state at one step. `values`: numbers, strings, lists, dicts, tensors, the same in every process.

    Tensors have the same names in every process; one that is no DTensor has the same content in every process too.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.tensors: Tensors = {}

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors, as `name`/KEY; not copied."""
        self.tensors |= {f"{name}/{key}": value.detach() for key, value in tensors.items()}

    def add_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Adds an optimizer: the tensors of the parameter with number n as `name`/n/KEY, the rest as a value.

        Parameters that were never stepped have no tensors.
        """
        state = optimizer.state_dict()
        entries = [(number, key, value) for number, entry in state["state"].items() for key, value in entry.items()]
        self.add(name, {f"{number}/{key}": value for number, key, value in entries if isinstance(value, Tensor)})
        self.values[name] = {"param_groups": state["param_groups"],
                             "entries": [entry for entry in entries if not isinstance(entry[2], Tensor)]}

    def copied(self) -> tuple[Tensors, bytes]:
        """(what this process writes, copied into the CPU's memory; the values as torch.save writes them).

        That is its part of each sharded tensor, and some of the others, which are divided among the processes by size.
        """
        parts = {name: value for name, value in self.tensors.items() if distributed.is_dtensor(value)}
        whole = {name: value for name, value in self.tensors.items() if name not in parts}
        loads = [0] * distributed.size()
        mine: Tensors = copied_parts(parts) if parts else {}
        for name, value in sorted(whole.items(), key=lambda item: (-item[1].nbytes, item[0])):
            owner = loads.index(min(loads))
            loads[owner] += value.nbytes
            if owner == distributed.rank():
                mine[name] = value.to("cpu", copy=True)
        values = io.BytesIO()
        torch.save(self.values, values)
        return mine, values.getvalue()


def copied_parts(tensors: Tensors) -> Tensors:
    """DTensors with copies of this process's parts in the CPU's memory, wherever their mesh is."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager: Any = DefaultStager(StagingOptions(False, False, False, False))
    copy: Tensors = stager.stage(tensors)
    return copy


def weights(model: nn.Module) -> Tensors:
    """What training changes of a model, and its buffers; tied weights once, a sharded model's parts.

    The tensors are the model's own: to fill them is to load the model.
    """
    distributed.reshard(model)
    found: Tensors = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen and (value.requires_grad or not isinstance(value, nn.Parameter)):
            found[name] = value.detach()
        seen.add(id(value))
    return found


def optimizer_state(optimizer: torch.optim.Optimizer, sizes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Tensors:
    """Zeros for the tensors of an optimizer whose names (n/KEY) and sizes are given: sharded like parameter n where
    they have its shape."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    found: Tensors = {}
    for name, (size, dtype) in sizes.items():
        parameter = parameters[int(name.partition("/")[0])]
        found[name] = (torch.zeros_like(parameter.detach(), dtype=dtype) if parameter.shape == size else
                       torch.zeros(size, dtype=dtype))
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Gives an optimizer what `State.add_optimizer` took of another one with the same parameters, in their order."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        number, key = name.split("/")
        state.setdefault(int(number), {})[key] = value
    for number, key, value in values["entries"]:
        state.setdefault(number, {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
