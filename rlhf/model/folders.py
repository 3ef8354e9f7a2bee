"""What a model's folder must be, looked at before anything loads it: its JSON files, its shards, its tensors' types.

Hub names pass: their files are not on this disk yet.
"""

import json
import re
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "model.safetensors.index.json")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # what config.json calls the number of blocks
ABSURD = 100  # times as many blocks as the weights have: some architectures share blocks
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
LONGEST_HEADER = 2**27  # bytes
_BLOCK = re.compile(r"\.(\d+)\.")


def check_folder(folder: str | Path) -> None:
    """Raises UserError, one line that names the file: an adapter, damaged JSON, shards elsewhere, weights that are no
    floating-point numbers, blocks by the million. A hub name passes."""
    path = Path(folder)
    if not path.is_dir():
        return
    if (path / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter (adapter_config.json), not a model alone: merge it into its base "
                        "(peft's merge_and_unload) and name the merged model's folder")
    contents = {name: _json(path / name) for name in JSON_FILES if (path / name).exists() or (path / name).is_symlink()}
    shards = contents.get("model.safetensors.index.json", {}).get("weight_map", {})
    if not isinstance(shards, dict):
        raise UserError(f"{path / 'model.safetensors.index.json'}: its weight_map is no list of names and files")
    for name in sorted({str(name) for name in shards.values()}):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{path / 'model.safetensors.index.json'}: names the file {name!r}; weights must lie in "
                            "the folder itself")
    tensors = {name: entry for file in sorted(path.glob("*.safetensors")) for name, entry in _header(file).items()}
    config = contents.get("config.json", {})
    blocks = 1 + max((int(number) for name in tensors for number in _BLOCK.findall(name)), default=0)
    for key in LAYERS:
        if tensors and isinstance(count := config.get(key), int) and count > ABSURD * blocks:
            raise UserError(f"{path / 'config.json'}: {key} = {count:,}, and the weights have {blocks} blocks")
    whole = [name for name, entry in tensors.items() if name.endswith(".weight") and entry.get("dtype") not in FLOATS]
    if whole and "quantization_config" not in config:
        raise UserError(f"{folder}: {len(whole)} weights such as {whole[0]} are {tensors[whole[0]].get('dtype')}, not "
                        "floating-point numbers: raw quantised weights cannot be trained")


def vocabulary_size(folder: str | Path) -> int:
    """The rows of the vocabulary that a folder's config.json says; 0 where it says nothing, or for a hub name."""
    path = Path(folder) / "config.json"
    size = _json(path).get("vocab_size") if path.is_file() else None
    return size if isinstance(size, int) else 0


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: is no regular file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: no JSON ({str(error)[:100] or 'nested too deeply'})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged: no JSON object, but {type(found).__name__}")
    return found


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → type, shape and place of a file's tensors; empty for what is no safetensors: loading it says so."""
    if not path.is_file():
        raise UserError(f"{path}: is no regular file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LONGEST_HEADER:
            return {}
        text = file.read(size)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict) and name != "__metadata__"
            } if isinstance(found, dict) else {}
