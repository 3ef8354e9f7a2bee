"""A reward model's adapter as a folder, and PPO whose models share one base: equal to a base for each."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf.model.adapter_folder import adapter_on, weights_sha256
from rlhf.model.chat_format import load_codec
from rlhf.model.scoring import score_sequences
from rlhf.params import PpoParams
from rlhf.ppo.trainer import Trainer
from rlhf.reward_model import train_reward_model
from rlhf.training.checkpoint import Checkpoints
from tests.rlhf.model.test_lora import rm_params
from tests.rlhf.test_reward_model import DEMONSTRATIONS, rankings


@pytest.fixture
def trained(policy_folder: Path, tmp_path: Path) -> tuple[Any, Path]:
    """(reward model as it was trained with LoRA, its folder)."""
    model, _ = train_reward_model(rm_params(normalise="gain_and_bias"), rankings(60), DEMONSTRATIONS, policy_folder, 3,
                                  tmp_path / "rm")
    return model, tmp_path / "rm" / "model"


def test_peft_loads_the_adapter_with_our_scores(policy_folder: Path, trained: tuple[Any, Path]) -> None:
    model, folder = trained
    codec = load_codec(policy_folder)
    answer = codec.completions(["red rice red"])[0]
    texts = [prompt + answer for prompt in codec.prompts(["what?", "home fish?", "red"])]
    base = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    base.config.pad_token_id = codec.pad_id
    theirs = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    ours = score_sequences(model, texts, codec.pad_id, "fp32")
    shift = getattr(model.config, "score_shift", 0.0)  # RMSNorm has no bias to carry it
    with torch.no_grad():
        found = [theirs(input_ids=torch.tensor([text])).logits.item() + shift for text in texts]
    assert found == pytest.approx(ours, abs=1e-4)
    assert max(found) - min(found) > 0.01
    assert theirs.peft_config["default"].base_model_name_or_path == str(policy_folder)


def test_the_adapter_s_files_are_the_same_bytes_each_time(policy_folder: Path, trained: tuple[Any, Path], tmp_path: Path
                                                          ) -> None:
    train_reward_model(rm_params(normalise="gain_and_bias"), rankings(60), DEMONSTRATIONS, policy_folder, 3,
                       tmp_path / "again")
    files = sorted(path.name for path in (trained[1] / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "base.json"]
    for name in files:
        assert (trained[1] / "adapter" / name).read_bytes() == (
            tmp_path / "again" / "model" / "adapter" / name).read_bytes()


def run(trainer: Trainer, texts: list[str], count: int) -> list[dict[str, float]]:
    prompts = trainer.models.codec.prompts(texts)
    return [trainer.step(prompts, iteration)[1] for iteration in range(count)]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "value from the policy": {"value_init": "policy", "ema_decay": 0.5},
    "recomputed and reused": {"gradient_checkpointing": True, "reuse_forward_passes": 1}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_on_one_base_learn_as_models_with_a_base_each(
        policy_folder: Path, trained: tuple[Any, Path], ppo_params: Callable[..., PpoParams], prompt_texts: list[str],
        tmp_path: Path, variant: str) -> None:
    params = ppo_params(lora_rank=4, lr=3e-3, value_lr=3e-3, **VARIANTS[variant])
    separate_rm = shutil.copytree(trained[1], tmp_path / "merged alone", ignore=shutil.ignore_patterns("adapter"))
    shared, separate = (Trainer(params, policy_folder, folder, seed=5) for folder in (trained[1], separate_rm))
    models = shared.models
    base = {name: value.data_ptr() for name, value in models.policy.base_model.named_parameters()
            if ".lora_" not in name and value.dim() == 2}
    for model in (models.reward_model, models.value):
        assert {name: value.data_ptr() for name, value in model.base_model.named_parameters()
                if name in base} == base
    trained_ones = [value.data_ptr() for model in (models.policy, models.value) for value in model.parameters()
                    if value.requires_grad]
    assert len(set(trained_ones)) == len(trained_ones)
    assert not set(trained_ones) & {value.data_ptr() for value in models.reward_model.parameters()}
    apart = {value.data_ptr() for value in separate.models.policy.parameters()}
    assert not apart & {value.data_ptr() for value in separate.models.reward_model.parameters()}
    one, other = run(shared, prompt_texts, 3), run(separate, prompt_texts, 3)
    assert abs(one[2]["ppo/kl"]) > 1e-4
    for row, second in zip(one, other, strict=True):
        assert row == pytest.approx(second, rel=2e-3, abs=2e-4)
    shared.save(tmp_path / "one")
    separate.save(tmp_path / "two")
    before = load_file(policy_folder / "model.safetensors")
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in saved[0].items():
        assert (value - saved[1][name]).norm() <= 0.01 * (value - before[name]).norm(), name
    resumed = Trainer(params, policy_folder, trained[1], seed=5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, shared.state())
        checkpoint = checkpoints.latest()
    assert checkpoint is not None
    held = [name.partition("/")[2] for name in checkpoint.names() if name.startswith(("policy/", "value/"))]
    assert held
    assert all(".default." in name or name == "score.weight" for name in held)
    resumed.restore(checkpoint)
    prompts = shared.models.codec.prompts(prompt_texts)
    assert shared.step(prompts, 3)[1] == resumed.step(prompts, 3)[1]


def test_models_on_one_base_in_bfloat16_keep_adapters_norms_and_heads_in_float32(
        policy_folder: Path, trained: tuple[Any, Path], ppo_params: Callable[..., PpoParams], prompt_texts: list[str]
        ) -> None:
    trainers = [Trainer(ppo_params(lora_rank=4, lora_base=base, precision="bf16"), policy_folder, trained[1], seed=5)
                for base in ("fp32", "bf16")]
    for model in (trainers[1].models.policy, trainers[1].models.value, trainers[1].models.reward_model):
        for name, value in model.named_parameters():
            held = value.dim() == 2 and ".lora_" not in name and name != "score.weight"
            assert value.dtype == (torch.bfloat16 if held else torch.float32), name
    scores = []
    for trainer in trainers:
        prompts = trainer.models.codec.prompts(prompt_texts)
        scores.append(torch.tensor(score_sequences(trainer.models.reward_model, prompts, trainer.models.codec.pad_id,
                                                   "bf16")))
        run(trainer, prompt_texts, 1)
    assert (scores[1] - scores[0]).abs().max() < 0.2 * (scores[0].max() - scores[0].min())


def test_an_adapter_of_other_weights_is_not_used_and_the_log_says_so(
        model_folders: dict[str, tuple[Path, Path]], ppo_params: Callable[..., PpoParams], tmp_path: Path,
        caplog: pytest.LogCaptureFixture) -> None:
    policy, plain_rm = model_folders["llama"]
    train_reward_model(rm_params(), rankings(40), DEMONSTRATIONS, policy, 3, tmp_path / "rm")
    rm = tmp_path / "rm" / "model"
    assert not isinstance(adapter_on(policy, rm), str)
    other = Path(shutil.copytree(policy, tmp_path / "other"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(content))
    assert weights_sha256(other) != weights_sha256(policy)
    with caplog.at_level(logging.INFO):
        for base, folder, line in ((policy, rm, "share the weights of"), (other, rm, "was trained on other weights"),
                                   (policy, plain_rm, "was not trained with LoRA")):
            caplog.clear()
            Trainer(ppo_params(lora_rank=2), base, folder, seed=5)
            assert line in caplog.text
