"""Writes a sharded model as a Hugging Face folder, one tensor after the other: no process ever holds the whole model.

The files are those of transformers' `save_pretrained`, byte by byte (tests/rlhf/model/test_load_sharded.py).
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.files import is_writer
from rlhf.model.lora import merges, plain_name
from rlhf.training import distributed

TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as the format says
LARGEST_FILE = "50GB"  # as save_pretrained


def published(model: PreTrainedModel, left_out: Collection[str], typed: Callable[[str, Tensor], Tensor]
              ) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """(plain name -> shape and type, on the meta device; a function that gives the tensor of a name whole) of what a
    model's folder has. Of a sharded model every process must ask for the same names in the same order.

    Active adapters are merged, one layer after the other. `left_out`: plain names of weights that are not in it;
    `typed(name, value)`: in which type a weight is.
    """
    state = model.state_dict()
    merge = merges(model, state)
    own = {plain_name(name): value for name, value in state.items() if ".lora_" not in name}
    weights = {name: typed(name, torch.empty(value.shape, dtype=torch.float32 if name in merge else value.dtype,
                                             device="meta")) for name, value in own.items() if name not in left_out}

    def whole(name: str) -> Tensor:
        return typed(name, merge[name]() if name in merge else distributed.full_tensor(own[name]).detach())

    return weights, whole


def save_in_shards(model: PreTrainedModel, folder: Path, left_out: Collection[str],
                   typed: Callable[[str, Tensor], Tensor]) -> None:
    """A folder of safetensors files and configuration; only the first process writes, all give their parts.

    `left_out`, `typed`: as of `published`. Raises OSError where the disk does not take it.
    """
    weights, whole = published(model, left_out, typed)
    plan = split_state_dict_into_shards_factory(
        dict(weights), get_storage_size=lambda item: item.numel() * item.element_size(),
        get_storage_id=lambda item: None, filename_pattern="model{suffix}.safetensors", max_shard_size=LARGEST_FILE)
    if is_writer():
        folder.mkdir(parents=True, exist_ok=True)
        config = model.config
        config.architectures = [type(model).__name__]
        config.dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if plan.is_sharded:
            index = {"metadata": {"total_parameters": model.num_parameters(), **plan.metadata},
                     "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
            (folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file, names in sorted(plan.filename_to_tensors.items()):
        write_tensors({name: weights[name] for name in names}, whole, folder / file)


def write_tensors(weights: Mapping[str, Tensor], whole: Callable[[str], Tensor], path: Path) -> None:
    """A safetensors file: the length of its header (8 bytes), the header (JSON), the tensors' bytes.

    `weights`: shapes and types; `whole(name)`: the values. Every process calls it; the first one writes.
    """
    # as safetensors orders them: wide types first, so that each tensor stands at a multiple of its own width
    names = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + weights[name].numel() * weights[name].element_size()
        entries[name] = {"dtype": TYPES[weights[name].dtype], "shape": list(weights[name].shape),
                         "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file: BinaryIO | None = path.open("wb") if is_writer() else None
    try:
        if file:
            file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            value = whole(name)
            if file:
                file.write(value.cpu().contiguous().view(torch.uint8).numpy().data)
        if file:
            file.flush()
            os.fsync(file.fileno())
    finally:
        if file:
            file.close()
