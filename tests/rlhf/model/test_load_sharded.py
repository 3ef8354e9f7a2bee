"""A model loaded and saved in shards is the one that transformers loads and saves whole, in a part of the memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def in_processes(tmp_path: Path) -> Callable[..., Any]:
    """in_processes(count, **task): what each process found; all of its checks passed."""
    def run(processes: int, **task: Any) -> Any:
        out = tmp_path / f"out-{processes}"
        out.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                       "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process at once
        task |= {"processes": processes, "out": str(out)}
        done = subprocess.run([sys.executable, "-m", "tests.rlhf.model.shards_in_processes", json.dumps(task)],
                              cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads((out / "result.json").read_text())
    return run


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_are_the_parts_of_the_whole_model(in_processes: Callable[..., Any], processes: int,
                                                 model_folders: dict[str, tuple[Path, Path]]) -> None:
    """Weights, ties, buffers, sampled states, log-probs in bfloat16, and the bytes that are saved, for each
    architecture; with 3 processes the last one has no part of some tensors."""
    in_processes(processes, pairs=[tuple(map(str, pair)) for pair in model_folders.values()])


def test_what_is_wrong_with_a_folder_is_said_by_every_process(in_processes: Callable[..., Any], tmp_path: Path,
                                                              model_folders: dict[str, tuple[Path, Path]]) -> None:
    """The same lines as for a model that is loaded whole. A NaN lies in the last process's part alone."""
    def damaged(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
        folder = shutil.copytree(model_folders["llama"][0], tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    norm, mlp = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    folders = {
        "missing": damaged("missing", lambda weights: weights.pop(norm)),
        "shape": damaged("shape", lambda weights: weights.update({norm: torch.ones(7)})),
        "beyond": damaged("beyond", lambda weights: weights.update({mlp.replace("1", "7"): weights[mlp].clone()})),
        "not finite": damaged("nan", lambda weights: weights[mlp][-1].fill_(float("nan"))),
        "renamed": damaged("renamed", lambda weights: [weights.update({name.removeprefix("model."): weights.pop(name)})
                                                       for name in list(weights) if name != "lm_head.weight"]),
    }
    for found in in_processes(2, damaged=folders):
        for label, (whole, split) in found.items():
            assert whole == split, label
            assert bool(whole) == (label != "renamed"), label


def test_no_process_holds_the_whole_model(in_processes: Callable[..., Any], tmp_path: Path,
                                          model_folders: dict[str, tuple[Path, Path]],
                                          tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 40 MB each of two processes holds half and slices of a tensor of 1 MB while it loads, and whole tensors one
    after the other while it saves."""
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for found in in_processes(2, memory=str(folder), tiny=str(model_folders["llama"][0])):
        assert found["model"] / 2 < found["load"] < found["model"] / 2 + 4 * found["largest"]
        assert found["save"] < 4 * found["largest"] + 1e6
