"""How a model lies in memory: type of its weights, split over the processes or not, on the CPU, with an adapter."""

import logging
from dataclasses import dataclass, replace

import torch

from rlhf.errors import UserError
from rlhf.model.lora import NewAdapter, base_in_bf16, check_base
from rlhf.params import PpoParams, RmParams, SftParams
from rlhf.training import distributed, tensor_parallel
from rlhf.training.hardware import in_bf16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a model lies in memory: `dtype` of its weights; with `shard` split over the processes, where its passes have
    `precision`, and with `cpu_offload` on the CPU (rlhf/training/distributed.py:shard). `adapter`: what is put on it
    before it is split. `nf4`: its linear layers but the output are held in NF4 (rlhf/model/nf4.py)."""

    dtype: torch.dtype = torch.float32
    shard: bool = False
    precision: str = "fp32"
    cpu_offload: bool = False
    adapter: NewAdapter | None = None
    nf4: bool = False

    @classmethod
    def of(cls, params: SftParams | RmParams | PpoParams, section: str, noise: torch.Generator | None = None
           ) -> "Layout":
        """Of the model that a stage trains; `noise` draws how an adapter starts. Arranges the processes as
        `tensor_parallel` says. Raises UserError for options that need another one."""
        check_base(params, section)
        check_groups(params, section)
        tensor_parallel.arrange(params.tensor_parallel, section)
        for option, needed in (("cpu_offload", "shard"), ("offload_activations", "gradient_checkpointing")):
            if getattr(params, option) and not getattr(params, needed):
                raise UserError(f"{section}.{option} needs {section}.{needed}: true")
        if params.shard and distributed.size() == 1:
            log.warning("%s.shard: nothing is split%s in one process", section,
                        ", and with cpu_offload nothing is on the CPU," if params.cpu_offload else "")
        adapter = None
        if noise is not None and params.lora_rank:
            adapter = NewAdapter.of(params, noise, train_head=isinstance(params, RmParams))
        return cls(shard=params.shard, precision=params.precision, cpu_offload=params.cpu_offload, adapter=adapter,
                   nf4=params.lora_base == "nf4")

    def frozen(self, params: PpoParams) -> "Layout":
        """Of a model that PPO does not train."""
        narrow = base_in_bf16(params) or (params.frozen_precision == "bf16" and in_bf16(params.precision))
        return replace(self, dtype=torch.bfloat16 if narrow else torch.float32, cpu_offload=params.frozen_on_cpu,
                       adapter=None, nf4=False)


def check_groups(params: SftParams | RmParams | PpoParams, section: str) -> None:
    """Raises UserError where `tensor_parallel` does not fit the section's other parameters."""
    if params.tensor_parallel == 1:
        return
    name = f"{section}.tensor_parallel = {params.tensor_parallel}"
    if not params.shard:
        raise UserError(f"{name}: needs {section}.shard: true")
    for other, value in (("lora_rank", 0), ("compile", False)):
        if getattr(params, other) != value:
            raise UserError(f"{name}: cannot be combined with {section}.{other}")


WHOLE = Layout()
