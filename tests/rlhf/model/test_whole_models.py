"""A model from elsewhere is loaded whole or refused in one line: no random numbers, no NaN, no code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import UserError
from rlhf.model.load import load_policy, load_scorer, new_scorer
from rlhf.params import PretrainParams
from rlhf.pretrain import take_base_model

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_whole_models_load(policy_folder: Path, model_folders: dict[str, tuple[Path, Path]], architecture: str) -> None:
    load_policy(policy_folder)
    load_scorer(model_folders[architecture][1])
    new_scorer(policy_folder, 0, torch.Generator().manual_seed(1))  # a new head is what it is for


def test_a_missing_tensor_is_refused(policy_folder: Path, copy_folder: Callable[[Path], Path]) -> None:
    folder = copy_folder(policy_folder)
    rewrite(folder, lambda tensors: tensors.pop(next(name for name in tensors if "mlp" in name)))
    with pytest.raises(UserError, match=r"1 tensor \(.*mlp.*\) missing: they would be random numbers$"):
        load_policy(folder)


def test_a_policy_is_no_reward_model(policy_folder: Path) -> None:
    with pytest.raises(UserError, match=r"1 tensor \(score\.weight\) missing: .*; it is no reward model"):
        load_scorer(policy_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused(policy_folder: Path, copy_folder: Callable[[Path], Path], value: float
                                                ) -> None:
    folder = copy_folder(policy_folder)

    def spoil(tensors: Tensors) -> None:
        next(tensor for name, tensor in tensors.items() if "norm" in name or "ln_" in name).flatten()[0] = value

    rewrite(folder, spoil)
    with pytest.raises(UserError, match="not finite"):
        load_policy(folder)


def test_blocks_that_the_configuration_does_not_count_are_refused(policy_folder: Path,
                                                                  copy_folder: Callable[[Path], Path]) -> None:
    folder = copy_folder(policy_folder)
    config = json.loads((folder / "config.json").read_text())
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": None}))
    with pytest.raises(UserError, match=r"of blocks that config\.json does not count: they would be dropped"):
        load_policy(folder)


def test_another_shape_is_refused(policy_folder: Path, copy_folder: Callable[[Path], Path]) -> None:
    folder = copy_folder(policy_folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(UserError, match=r"of another shape than config\.json says") as refused:
        load_policy(folder)
    assert "\n" not in str(refused.value)


def test_a_damaged_file_is_one_line(policy_folder: Path, copy_folder: Callable[[Path], Path]) -> None:
    folder = copy_folder(policy_folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(folder)


def test_pickle_files_are_not_read(policy_folder: Path, copy_folder: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = copy_folder(policy_folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(folder)
    with pytest.raises(UserError, match=r"pretrain\.base_model: .*cannot be loaded"):
        take_base_model(PretrainParams(base_model=str(folder)), tmp_path / "scratch")


def test_a_models_own_code_is_not_run(policy_folder: Path, copy_folder: Callable[[Path], Path]) -> None:
    folder = copy_folder(policy_folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(folder)
    assert not (folder / "ran").exists()


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "README.md").write_text("nothing")
    with pytest.raises(UserError, match=r"pretrain\.base_model = .*: cannot be loaded: ") as refused:
        take_base_model(PretrainParams(base_model=str(folder)), tmp_path / "scratch")
    assert "\n" not in str(refused.value)


def test_a_buffer_may_hold_minus_infinity(policy_folder: Path, copy_folder: Callable[[Path], Path],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal masks do in some architectures: only weights must be finite."""
    folder = copy_folder(policy_folder)
    mask = torch.full((2,), float("-inf"))
    kind = type(load_policy(folder))
    build = kind.__init__

    def with_mask(self: Any, *arguments: Any, **more: Any) -> None:
        build(self, *arguments, **more)
        self.register_buffer("mask", mask)

    monkeypatch.setattr(kind, "__init__", with_mask)
    rewrite(folder, lambda tensors: tensors.update(mask=mask.clone()))
    assert "mask" in load_policy(folder).state_dict()
