"""A reward model's LoRA adapter as a folder of its own, and models that share one base's weights.

The folder is peft's: `PeftModel.from_pretrained(base, folder)` gives the same scores as the merged model. Beside peft's
files, base.json says which base the adapter was trained on: the SHA-256 of its weights, and whether they were in NF4,
whose rounding the adapter has learned with.
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.errors import UserError
from rlhf.files import is_writer, write_json
from rlhf.model.load import add_bias, final_norm
from rlhf.model.lora import add_frozen_adapter
from rlhf.model.nf4 import nf4_layers
from rlhf.training import distributed

ADAPTER = "adapter"  # in a reward model's folder
PREFIX = "base_model.model."  # of peft's names


def weights_sha256(folder: str | Path) -> str:
    """The SHA-256 over a folder's safetensors files, by name."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as handle:
            digest.update(path.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def save_adapter(model: PreTrainedModel, adapter: Any, base_folder: Path, folder: Path) -> None:
    """A scorer's adapter, head, and the norm before the head, which carries the shift of the scores. Only the first
    process writes; all must call. `adapter`: peft's wrapper."""
    norm = final_norm(model)
    kept = ["score", *([norm.rpartition(".")[2]] if norm else [])]
    names = [name for name in model.state_dict()
             if ".lora_" in name or name == "score.weight" or (norm and name.startswith(f"{norm}."))]
    state = model.state_dict()
    tensors = {PREFIX + name.replace(".default.", "."): distributed.full_tensor(state[name]).cpu().contiguous()
               for name in names}
    if not is_writer():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(adapter.peft_config["default"])
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", kept, True
    config.base_model_name_or_path = str(base_folder)
    written = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    write_json(folder / "adapter_config.json", written)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "base.json", {"weights_sha256": weights_sha256(base_folder), "nf4": bool(nf4_layers(model)),
                                      "score_shift": getattr(model.config, "score_shift", 0.0)})


@dataclass(frozen=True)
class Adapter:
    """A reward model's adapter as it was saved: tensors by the scorer's own names, rank, alpha, the shift of the scores
    where no norm carries it."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: int
    score_shift: float


def adapter_on(base_folder: str | Path, rm_folder: Path, nf4: bool = False) -> Adapter | str:
    """The adapter of a reward model that was trained on exactly these weights, in NF4 or not; else a line that says why
    there is none.

    Raises UserError for a damaged folder.
    """
    folder = rm_folder / ADAPTER
    if not (folder / "base.json").is_file():
        return f"{rm_folder} was not trained with LoRA"
    try:
        base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        if base["weights_sha256"] != weights_sha256(base_folder):
            return f"{folder} was trained on other weights than {base_folder} has"
        if base.get("nf4", False) != nf4:
            return f"{folder} was trained on a base that was {'not ' if nf4 else ''}in NF4"
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        return Adapter({name.removeprefix(PREFIX): value for name, value in tensors.items()}, int(config["r"]),
                       int(config["lora_alpha"]), float(base["score_shift"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: cannot be read: {error!r}") from None


def scorer_on(policy: PreTrainedModel, pad_id: int) -> PreTrainedModel:
    """A scorer whose backbone has the very weights of a policy that has no adapters yet, and a head of zeros.

    The modules are its own: each model has its adapters, its mode and its gradient checkpointing for itself.
    """
    codes = [value for layer in nf4_layers(policy.base_model) for value in layer.held()]
    shared = {id(value): value for value in [*policy.base_model.parameters(), *codes]}
    backbone = copy.deepcopy(policy.base_model, shared)
    config = backbone.config
    config.num_labels, config.pad_token_id = 1, pad_id
    with torch.device("meta"):
        scorer: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    setattr(scorer, scorer.base_model_prefix, backbone)
    scorer.config = config
    width = scorer.score.weight.shape[1]
    scorer.score.weight = torch.nn.Parameter(torch.zeros(1, width, device=policy.device))
    return scorer.eval()


def put_on(scorer: PreTrainedModel, adapter: Adapter) -> None:
    """Makes a scorer on the base the reward model that the adapter is of, with the adapter frozen; its final norm and
    head become its own. Raises UserError where the adapter is of another architecture."""
    add_frozen_adapter(scorer, adapter.rank, adapter.alpha)
    own = dict(scorer.named_parameters())
    given = {name.replace(".lora_A.", ".lora_A.frozen.").replace(".lora_B.", ".lora_B.frozen."): value
             for name, value in adapter.tensors.items()}
    wanted = {name for name in own if ".lora_" in name} | {"score.weight"}
    if wanted - given.keys() or any(name not in own or own[name].shape != value.shape for name, value in given.items()):
        raise UserError("the reward model's adapter is of another architecture than its base")
    for name, value in given.items():
        module, _, leaf = name.rpartition(".")
        setattr(scorer.get_submodule(module), leaf,
                torch.nn.Parameter(value.to(own[name].device, copy=True), requires_grad=False))
    if adapter.score_shift:
        scorer.config.score_shift = adapter.score_shift
        add_bias(scorer, adapter.score_shift)
