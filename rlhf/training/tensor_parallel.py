"""Tensor parallelism: neighbouring processes compute each block of a model together [Shoeybi et al. 2019, Megatron-LM].

Of n processes each `degree` neighbours form a group. All of a group take the same rows; each has a share of the heads
and of the MLP's inner width of every block. What a block adds to the residual stream is summed over the group, twice in
a pass forward and twice in one backward. The n / degree groups share a batch's rows (data parallel) as single processes
do without it: `replicas` of them, of which this process belongs to number `replica`.
"""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlhf.errors import UserError

BY_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_ROWS = ("self_attn.o_proj", "mlp.down_proj")
MODELS = ("llama", "qwen2")  # blocks of those layers, and nothing between them that mixes heads


@dataclass
class Groups:
    """How the processes of this program are arranged, and the parameter that says so."""

    degree: int = 1
    parameter: str = ""
    meshes: dict[int, Any] = field(default_factory=dict)


_groups = Groups()


def arrange(degree: int, section: str) -> None:
    """Forms groups of `degree` processes, 1: none; all processes call it. Raises UserError where they do not come out
    even, or would reach beyond a machine."""
    name, here = f"{section}.tensor_parallel = {degree}", int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    for number, what in ((processes(), "the number of processes"), (here, "the processes of one machine")):
        if number % degree:
            raise UserError(f"{name}: must divide {number}, {what}")
    _groups.degree, _groups.parameter = degree, name
    if degree > 1 and degree not in _groups.meshes:
        from torch.distributed.device_mesh import init_device_mesh

        # says of every weight that is gathered whole that it takes two collective operations
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        shape = (processes() // degree, degree)
        _groups.meshes[degree] = init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor"))


def processes() -> int:
    """The number of all processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def degree() -> int:
    """The processes of a group; 1 without tensor parallelism."""
    return _groups.degree


def replicas() -> int:
    """The number of groups, which share a batch's rows."""
    return processes() // _groups.degree


def replica() -> int:
    """The number of this process's group, from 0."""
    return (dist.get_rank() if dist.is_initialized() else 0) // _groups.degree


def place() -> int:
    """The place of this process in its group, from 0."""
    return (dist.get_rank() if dist.is_initialized() else 0) % _groups.degree


def data_mesh() -> Any:
    """The processes over which FSDP shards a block: those with the same place in their groups; None: all."""
    return _groups.meshes[_groups.degree]["data"] if _groups.degree > 1 else None


def forget() -> None:
    """No groups any more: those of a process group that ends."""
    _groups.degree, _groups.meshes = 1, {}


def problem(config: Any, degree: int) -> str:
    """Why a model with this configuration cannot be split over a group of `degree` processes; empty where it can."""
    if degree == 1:
        return ""
    if config.model_type not in MODELS:
        return (f"must be 1 for a model of type {config.model_type}; models of the types {' and '.join(MODELS)} can be "
                "split")
    uneven = [what for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
              if getattr(config, what) % degree]
    return f"must divide the model's {uneven[0]}, {getattr(config, uneven[0])}" if uneven else ""


def check(config: Any) -> None:
    """Raises UserError for a model that cannot be split over a group."""
    if found := problem(config, _groups.degree):
        raise UserError(f"{_groups.parameter}: {found}")


def split(blocks: nn.ModuleList) -> None:
    """Leaves this process its heads and its part of the MLP's inner width, in place; before FSDP shards the blocks.
    Norms, embeddings and heads stay whole in a group."""
    if _groups.degree == 1:
        return
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = _groups.meshes[_groups.degree]["tensor"]
    plan: Any = {name: ColwiseParallel() for name in BY_COLUMNS} | {name: RowwiseParallel() for name in BY_ROWS}
    for block in blocks:
        parallelize_module(block, mesh, plan, src_data_rank=None)  # every process has, or will read, the same values
