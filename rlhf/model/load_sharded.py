"""Builds a model in shards: on the meta device, split over the processes, then each process reads its own slices.

No process ever holds the whole model, nor more of the file than one slice at a time. The numbers are those that
`from_pretrained` gives (tests/rlhf/model/test_load_sharded.py).
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from rlhf.model.device import device
from rlhf.model.layout import Layout
from rlhf.model.lora import PUBLISHED, exact_in_bfloat16, plain_name
from rlhf.training import distributed, tensor_parallel

log = logging.getLogger(__name__)


def load_in_shards(kind: Any, folder: str | Path, new: frozenset[str], layout: Layout, attention: dict[str, Any],
                   **more: Any) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """(the model, in shards, what `from_pretrained` reports as its loading_info, and `not_finite`: names); the tensors
    in `new` are 0 where the folder lacks them.

    None for a folder that cannot be read by slices: a hub name, quantised weights, tensors under other names than the
    class has (transformers renames them while it loads).
    """
    path = Path(folder)
    where = tensor_files(path)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **more)
    tensor_parallel.check(config)
    if not where or getattr(config, "quantization_config", None):
        return None
    with init_empty_weights(include_buffers=False):  # buffers such as RoPE's frequencies are in no file
        model = kind.from_config(config, dtype=layout.dtype, trust_remote_code=False, **attention)
    model.tie_weights()  # the context above has given each name a tensor of its own
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    report = compared(model, where, new)
    if set(report["missing_keys"]) - new and report["unexpected_keys"]:
        return None
    if not (report["mismatched_keys"] or set(report["missing_keys"]) - new):
        if layout.adapter:
            layout.adapter.put(model)
        distributed.shard(model, layout.precision, layout.cpu_offload)
        report["not_finite"] = fill(model, where, "cpu" if layout.cpu_offload else device().type)
    return model, report


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor of a folder → its safetensors file; empty where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    whole = folder / "model.safetensors"
    if not whole.is_file():
        return {}
    with safe_open(whole, framework="pt") as file:
        return dict.fromkeys(file.keys(), whole)


def compared(model: PreTrainedModel, where: dict[str, Path], new: frozenset[str]) -> dict[str, Any]:
    """What differs between a model's tensors and a folder's, in the terms of transformers' loading_info. Tied weights
    may have one name or several in the file."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    own = dict(model.named_parameters(remove_duplicate=False))
    missing = [together[0] for together in names.values() if not any(name in where for name in together)]
    missing += [name for name in model.state_dict() if name not in own and name not in where]  # buffers that are saved
    mismatched = [(name, shape, tuple(own[name].shape)) for name, shape in shapes(where, own) if shape
                  != tuple(own[name].shape)]
    unexpected = [name for name in where if name not in model.state_dict()]
    return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}


def shapes(where: dict[str, Path], names: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape in the file) of those tensors of the folder that are among `names`."""
    found = []
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as file:
            found += [(name, tuple(file.get_slice(name).get_shape())) for name in sorted(file.keys())
                      if name in names and where[name] == path]
    return found


def fill(model: PreTrainedModel, where: dict[str, Path], place: str) -> list[str]:
    """Gives a sharded model on the meta device its values, 0 where the folder has none, on the device `place`. Returns
    the names of tensors that are not finite, the same in every process.
    """
    made: dict[int, nn.Parameter] = {}
    state: dict[str, Any] = {}
    broken: list[str] = []
    loses = False  # a number of the file that bfloat16 does not hold
    named = list(model.named_parameters(remove_duplicate=False))
    in_file = {id(parameter): plain_name(name) for name, parameter in reversed(named)  # the first name counts
               if plain_name(name) in where}
    for name, parameter in named:
        if id(parameter) not in made:
            source = in_file.get(id(parameter))
            local = read_local(parameter, where[source], source) if source else None
            if local is not None and not bool(local.isfinite().all()):
                broken.append(name)
            if local is not None and parameter.dtype == torch.bfloat16 and not exact_in_bfloat16(local):
                loses = True
            made[id(parameter)] = placed_as(parameter, local, place)
        state[name] = made[id(parameter)]
    buffers = [name for name, _ in model.named_buffers() if name in where]
    for name in buffers:
        with safe_open(where[name], framework="pt") as file:
            state[name] = file.get_tensor(name)
    model.load_state_dict(state, strict=False, assign=True)
    found = distributed.all_gather((broken, loses))
    if PUBLISHED in vars(model):
        vars(model)[PUBLISHED] = not any(lost for _, lost in found)
    return sorted({name for names, _ in found for name in names})


def read_local(parameter: Tensor, path: Path, name: str) -> Tensor | None:
    """This process's part of a tensor, in the file's type; None where it has none of it."""
    box = distributed.local_box(parameter)
    if any(part.start >= part.stop for part in box):
        return None
    with safe_open(path, framework="pt") as file:
        part: Tensor = file.get_slice(name)[box] if box else file.get_tensor(name)
    return part


def placed_as(parameter: Any, local: Tensor | None, place: str) -> nn.Parameter:
    """A parameter with these values in this process (0 where there are none), split as another is, on a device."""
    mesh = parameter.device_mesh
    values = torch.zeros(parameter.to_local().shape, dtype=parameter.dtype, device=place)
    if local is not None:
        values.copy_(local)
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(values, mesh, parameter.placements, run_check=False, shape=parameter.shape,
                               stride=parameter.stride())
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
