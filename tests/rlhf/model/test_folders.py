"""A model's folder is looked at before anything loads it: one line that names the file, and none of its code runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import UserError
from rlhf.model.chat_format import load_codec
from rlhf.model.load import load_policy
from rlhf.params import PretrainParams
from rlhf.pretrain import take_base_model

Copy = Callable[[Path], Path]


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_models_own_code_is_never_run_whatever_stdin_says(policy_folder: Path, copy_folder: Copy, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asked "run the custom code? [y/N]" for an unknown kind of model, and took `yes |` for the answer."""
    folder, mark = copy_folder(policy_folder), tmp_path / "ran"
    configure(folder, model_type="evil", auto_map={name: f"evil.{name}" for name in (
        "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")})
    classes = "".join(f"class {name}: pass\n" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n{classes}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(
        settings | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.AutoTokenizer", None]}}))
    asked: list[tuple[object, ...]] = []

    def say_yes(*question: object) -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", say_yes)
    with pytest.raises(UserError, match="cannot be loaded"):
        take_base_model(PretrainParams(base_model=str(folder)), tmp_path / "base")
    assert (asked, mark.exists()) == ([], False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_damaged_json_is_named(policy_folder: Path, copy_folder: Copy, name: str, text: str) -> None:
    folder = copy_folder(policy_folder)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: is damaged: no JSON"):
        load_codec(folder)


def test_a_lost_tokenizer_is_one_line(policy_folder: Path, copy_folder: Copy) -> None:
    folder = copy_folder(policy_folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded: the folder holds no tokenizer"):
        load_codec(folder)


@pytest.mark.parametrize("made", ["folder", "fifo", "dangling link"])
def test_weights_that_are_no_file_are_named(policy_folder: Path, copy_folder: Copy, made: str) -> None:
    folder = copy_folder(policy_folder)
    path = folder / "model.safetensors"
    path.unlink()
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "dangling link": lambda: path.symlink_to("nowhere")}[made]()
    with pytest.raises(UserError, match=r"model.safetensors: is no regular file"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", ".."])
def test_shards_outside_the_folder_are_not_read(policy_folder: Path, copy_folder: Copy, name: str) -> None:
    folder = copy_folder(policy_folder)
    names = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(UserError, match=r"weights must lie in the folder itself"):
        load_policy(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32])
def test_weights_that_are_whole_numbers_are_refused(policy_folder: Path, copy_folder: Copy, kind: torch.dtype) -> None:
    """Raw quantised weights were taken as they are, and training began at a loss of thousands."""
    folder = copy_folder(policy_folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: (tensor * 100).to(kind) for name, tensor in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(UserError, match=r"weights such as .* are \w+, not floating-point numbers"):
        load_policy(folder)


def test_an_adapter_is_no_model(policy_folder: Path, copy_folder: Copy) -> None:
    """peft's folder was taken as the base; the stage after it ended in a traceback."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = copy_folder(policy_folder)
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    linear = next(name.rpartition(".")[2] for name, _ in model.named_modules()
                  if name.endswith(("query_key_value", "c_attn", "q_proj")))
    (folder / "model.safetensors").unlink()
    get_peft_model(model, LoraConfig(target_modules=[linear], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    for load in (load_policy, load_codec):
        with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\), not a model"):
            load(folder)


@pytest.mark.parametrize(("values", "said"), [
    ({"num_hidden_layers": 10**8, "n_layer": 10**8}, "= 100,000,000, and the weights have 2 blocks"),
    ({"hidden_size": "64", "n_embd": "64"}, "cannot be loaded"),
])
def test_an_odd_configuration_is_one_line(policy_folder: Path, copy_folder: Copy, tmp_path: Path,
                                          values: dict[str, Any], said: str) -> None:
    folder = copy_folder(policy_folder)
    configure(folder, **values)
    with pytest.raises(UserError, match=said) as caught:
        take_base_model(PretrainParams(base_model=str(folder)), tmp_path / "base")
    assert "\n" not in str(caught.value)


def test_a_template_that_counts_to_a_thousand_million_is_one_line(policy_folder: Path, copy_folder: Copy,
                                                                  tmp_path: Path) -> None:
    folder = copy_folder(policy_folder)
    (folder / "chat_template.jinja").write_text("{% for i in range(1000000000) %}x{% endfor %}")
    with pytest.raises(UserError, match=r"Range too big"):
        take_base_model(PretrainParams(base_model=str(folder)), tmp_path / "base")


def test_another_shape_than_the_configurations_is_named(policy_folder: Path, copy_folder: Copy) -> None:
    folder = copy_folder(policy_folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "ln_f" in name or "final" in name or name.endswith("norm.weight"))
    weights[name] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensor \({name}\) of another shape than config.json says"):
        load_policy(folder)
