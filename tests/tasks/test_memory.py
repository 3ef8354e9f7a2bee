"""`--memory` says what each moment takes before anything is loaded, and which parameter to change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlops.config.loader import load_params, load_profile
from rlhf.memory import Job, Shape, moments, peak
from tasks import launch
from tasks.memory import advice, job_of, print_memory, shape_in

ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "intermediate_size": 14_336,
            "max_position_embeddings": 131_072, "tie_word_embeddings": False}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the profiles, whose base is of 8 billion parameters."""
    for name in ("params.yaml", "profiles", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models" / "pretrain").mkdir(parents=True)
    (tmp_path / "models" / "pretrain" / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_that_is_too_large_is_said_with_what_to_change(checkout: Path, capsys: pytest.CaptureFixture[str],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.memory.device", lambda processes: ("a card, 80 GB", 80e9, 1))
    print_memory("sft", load_params(checkout))
    text = capsys.readouterr().out
    for moment in ("load", "valid loss", "update", "save"):
        assert f"\n  {moment}" in text
    assert "sft, profile cpu: models/pretrain" in text
    assert "does not fit: update takes" in text
    assert "sft.shard with more processes, lora_rank" in text


def test_what_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert advice("rm", "update", {"weights": 10e9}, 80e9) == (
        "fits: the largest moment, update, takes 10.00 GB of 72.00 GB that can be used")
    line = advice("rm", "update", {"activations": 70e9, "weights": 9e9, "logits": 1.0}, 80e9)
    assert line.endswith("change rm.micro_batch_tokens or micro_batch_size, gradient_checkpointing, "
                         "offload_activations, tensor_parallel; rm.shard with more processes, "
                         "lora_rank with lora_base: bf16 or nf4")


def test_the_options_of_a_profile_reach_the_arithmetic(checkout: Path) -> None:
    """Each option that saves memory makes the moment that it is for smaller, as it is read from the parameters."""
    ppo = next(iter(load_params(checkout).stages.arms.values()))
    ppo = dataclasses.replace(ppo, precision="bf16", processes=8, shard=True, ema_decay=0.9, micro_batch_size=8,
                              max_prompt_tokens=1000, max_new_tokens=1000, gradient_checkpointing=True)
    shape = Shape.of(LLAMA_8B)

    def bytes_of(moment: str, **changes: Any) -> float:
        return sum(moments(job_of("ppo", dataclasses.replace(ppo, **changes), shape, shape))[moment].values())

    for moment, changes in (
            ("update", {"micro_batch_tokens": 2000}), ("update", {"offload_activations": True}),
            ("update", {"cpu_offload": True}), ("update", {"processes": 16}), ("update", {"tensor_parallel": 4}),
            ("update", {"ema_decay": 0.0}),
            ("update", {"lora_rank": 16}), ("scores", {"frozen_precision": "bf16"}),
            ("sample", {"rollout_batch_size": 8}), ("sample", {"frozen_on_cpu": True})):
        assert bytes_of(moment, **changes) < bytes_of(moment), changes
    assert bytes_of("update", gradient_checkpointing=False) > bytes_of("update")
    assert bytes_of("update", lora_rank=16, lora_base="bf16") < bytes_of("update", lora_rank=16)


def test_a_base_in_nf4_of_8b_takes_6_gb_of_weights_and_memory_shows_it(
        checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.memory.device", lambda processes: ("a card, 24 GB", 24e9, 1))
    monkeypatch.setattr("rlhf.model.device.device", lambda: torch.device("cuda"))
    params = load_params(checkout)
    sft = dataclasses.replace(params.stages.sft, lora_rank=16, precision="bf16", gradient_checkpointing=True,
                              micro_batch_size=1, max_tokens=2000, processes=1)
    printed = {}
    for base in ("bf16", "nf4"):
        section: Any = dataclasses.replace(sft, lora_base=base)
        print_memory("sft", dataclasses.replace(params, stages=dataclasses.replace(params.stages, sft=section)))
        printed[base] = capsys.readouterr().out
    # 6.98e9 numbers of the blocks at 4.127 bits, 1.05e9 of embeddings and output in bfloat16, 42e6 of adapters
    assert "weights 5.87" in printed["nf4"]
    assert "does not fit" in printed["bf16"]
    assert "\nfits: " in printed["nf4"]


def test_8b_fits_eight_cards_in_full_and_one_with_lora() -> None:
    shape = Shape.of(LLAMA_8B)
    common: dict[str, Any] = {"stage": "ppo", "policy": shape, "scorer": shape, "rows": 64, "batch": 512, "micro": 1,
                              "sampled": 32, "frozen_bf16": True}
    full = Job(**common, processes=8, shard=True)
    assert 40e9 < peak(full)[1] < 72e9
    assert peak(dataclasses.replace(full, processes=1, shard=False))[1] > 200e9
    lora = Job(**common, lora_rank=64, lora_bf16=True, one_base=True)
    assert 30e9 < peak(lora)[1] < 72e9
    assert peak(dataclasses.replace(lora, one_base=False))[1] > peak(lora)[1] + 25e9


def test_a_config_that_is_no_decoder_s_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(Exception, match=r"config\.json: no shape of a decoder"):
        shape_in(str(tmp_path))


@pytest.mark.parametrize(("asked", "gpus", "meant"), [(3, 8, 3), (0, 8, 8), (0, 0, 1)])
def test_0_processes_are_as_many_as_there_are_gpus(asked: int, gpus: int, meant: int, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launch.count(asked) == meant


QWEN: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 152_064, "max_position_embeddings": 32_768}
BASES = {  # config.json of the profiles' bases, as published
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN | {
        "num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "tie_word_embeddings": True, "vocab_size": 151_936},
    "Qwen/Qwen2.5-7B-Instruct": QWEN | {
        "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18_944, "tie_word_embeddings": False},
    "Qwen/Qwen2.5-14B-Instruct": QWEN | {
        "num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 13_824, "tie_word_embeddings": False}}


@pytest.mark.parametrize("name", ["gpu-1x80", "gpu-1x80-lora", "gpu-8x80", "gpu-32x80"])
@pytest.mark.parametrize("base", [None, LLAMA_8B], ids=["its base", "8B"])
def test_a_profile_fits_the_cards_that_it_is_named_after(name: str, base: dict[str, Any] | None,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.model.device.device", lambda: torch.device("cuda"))
    if base and name == "gpu-1x80":
        pytest.skip("1.5B are meant")
    stages = load_profile(ROOT / "profiles" / f"{name}.yaml")
    shape = Shape.of(base or BASES[stages.pretrain.base_model])
    machines = 4 if "32" in name else 1
    for stage, section in [("sft", stages.sft), ("rm", stages.rm), *(("ppo", arm) for arm in stages.arms.values())]:
        job = job_of(stage, section, shape, shape, one_base=stages.rm.lora_rank > 0)
        moment, size = peak(dataclasses.replace(job, processes=job.processes * machines))
        assert size < 72e9, (stage, moment, size / 1e9)
