"""LoRA in SFT and the reward model: gradients and steps against float64, what is trained, merged folders, resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.model.chat_format import load_codec
from rlhf.model.load import load_policy, load_scorer, new_scorer, save_model
from rlhf.model.lora import add_adapter
from rlhf.model.scoring import score_sequences
from rlhf.params import LoraBase, PpoParams, RmParams, SftParams
from rlhf.ppo.trainer import Trainer
from rlhf.pretrain import lm_loss
from rlhf.reward_model import train_reward_model
from rlhf.sft import Demonstrations, sft, valid_loss
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.optim import adamw
from rlhf.training.seeding import generator
from rlhf.training.state import State
from tests.rlhf.test_reward_model import DEMONSTRATIONS, rankings
from tests.rlhf.test_sft import demonstration_rows
from tests.rlhf.training.test_resume import Killed, kill, once

RANK, ALPHA = 3, 12


def noise(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(model: Any) -> Any:
    """Every B away from 0, where it starts."""
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1, generator=noise(len(name)))
    return model


def adapters_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def by_hand(folder: Path, adapters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss of W + alpha/r·B·A in float64 by transformers' own pass over the folder's weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    weights = dict(model.named_parameters())
    for name, down in adapters.items():
        if "lora_A" in name:
            delta = ALPHA / RANK * adapters[name.replace("lora_A", "lora_B")] @ down
            layer = name.replace(".lora_A.default", "")
            weights[layer] = weights[layer] + (delta.T if model.config.model_type == "gpt2" else delta)
    loss: torch.Tensor = functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss
    return loss


def test_a_step_is_that_of_w_plus_scaled_ba_in_float64(policy_folder: Path) -> None:
    ids = torch.randint(5, 300, (4, 16), generator=noise())
    model = load_policy(policy_folder)
    add_adapter(model, SftParams(lora_rank=RANK, lora_alpha=ALPHA), noise())
    moved(model)
    exact = {name: value.detach().double().requires_grad_() for name, value in adapters_of(model).items()}
    expected = by_hand(policy_folder, exact, ids)
    expected.backward()
    optimizer = adamw(model, 1e-2)
    loss = lm_loss(model, ids, "fp32")
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert gradients.keys() == exact.keys()
    optimizer.step()
    for name, value in adapters_of(model).items():
        gradient = exact[name].grad
        assert gradient is not None
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name
        sure = gradient.abs() > 1e-3 * gradient.abs().max()  # the sign of the others is rounding
        stepped = exact[name] - 1e-2 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
        assert torch.allclose(value.double()[sure], stepped[sure], rtol=0, atol=1e-5), name


@torch.no_grad()
def test_the_merged_folder_gives_the_unmerged_logits_as_peft_s_own_merge_does(policy_folder: Path, tokenizer: Any,
                                                                               tmp_path: Path) -> None:
    ids = torch.randint(5, 300, (4, 16), generator=noise())
    model = load_policy(policy_folder)
    before = model(ids).logits
    adapter = add_adapter(model, SftParams(lora_rank=RANK, lora_alpha=ALPHA), noise())
    assert torch.equal(model(ids).logits, before)  # B starts at 0
    unmerged = moved(model)(ids).logits
    save_model(model, tokenizer, tmp_path)
    assert torch.equal(model(ids).logits, unmerged)  # the model still has its adapters
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32
    assert type(plain) is type(model)
    assert not (unmerged - before).abs().max() < 0.1
    assert torch.allclose(plain(ids).logits, unmerged, rtol=0, atol=1e-4)
    assert torch.allclose(adapter.merge_and_unload()(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.glob("adapter*")] == []


def test_adapters_start_from_their_own_generator_alone(policy_folder: Path) -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_policy(policy_folder)
        add_adapter(model, SftParams(lora_rank=RANK), noise())
        starts.append(adapters_of(model))
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    for name, value in starts[0].items():
        bound = value.shape[1] ** -0.5  # A: uniform, variance 1/(3·inputs) [He et al. 2015, a = √5]
        assert bool((value == 0).all()) == ("lora_B" in name)
        assert "lora_B" in name or 0.9 * bound < value.abs().max() <= bound


# --- the stages ------------------------------------------------------------------------------------------------------

def assert_low_rank(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], layers: set[str]) -> None:
    """The folders' weights differ in `layers` alone, by matrices of rank RANK."""
    for name, value in after.items():
        change = (value - before[name]).double()
        if name.removesuffix(".weight") in layers and name.endswith(".weight"):
            sizes = torch.linalg.svdvals(change)
            assert sizes[RANK - 1] > 1e-5, name
            assert sizes[RANK] < 1e-3 * sizes[0] + 1e-5, name  # float32's rounding of W + delta
        else:
            assert not change.any(), name


def linear_layers(folder: Path) -> set[str]:
    """The names that LoRA should find: every linear layer of the blocks."""
    model = load_policy(folder)
    return {name for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name and "embed_out" not in name}


def sft_params(**changes: Any) -> SftParams:
    sizes: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 2e-2, "precision": "fp32", "pretrain_mix": 0.0,
                             "lora_rank": RANK, "lora_alpha": ALPHA}
    return SftParams(**(sizes | changes))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "mix": {"pretrain_mix": 0.25}, "recomputed": {"gradient_checkpointing": True, "micro_batch_size": 3},
    "packed": {"packing": True, "max_tokens": 60}, "best epoch": {"checkpoint": "valid_loss", "epochs": 3}}


@pytest.mark.parametrize("option", OPTIONS)
def test_sft_changes_the_linear_layers_by_low_rank_and_saves_them_merged(
        policy_folder: Path, texts: list[str], corpus: Path, tmp_path: Path, option: str) -> None:
    params = sft_params(**OPTIONS[option])
    metrics = sft(params, demonstration_rows(texts), policy_folder, 9, tmp_path, corpus)
    before, after = (load_file(folder / "model.safetensors") for folder in (policy_folder, tmp_path / "model"))
    assert_low_rank(before, after, linear_layers(policy_folder))
    assert metrics["sft/valid_loss"] < metrics["sft/valid_loss_base"] - 0.1
    saved = load_policy(tmp_path / "model")
    codec = load_codec(policy_folder)
    rows = [row for row in demonstration_rows(texts) if row["split"] == "valid"]
    data = Demonstrations.of_rows(codec, rows, params.max_tokens)
    assert valid_loss(saved, data, params, codec.pad_id) == pytest.approx(metrics["sft/valid_loss"], rel=1e-4)


def test_options_that_only_save_memory_do_not_change_what_lora_learns(policy_folder: Path, texts: list[str],
                                                                      tmp_path: Path) -> None:
    found = [sft(sft_params(**changes), demonstration_rows(texts), policy_folder, 9, tmp_path / str(number))
             for number, changes in enumerate(({}, OPTIONS["recomputed"]))]
    assert found[1]["sft/valid_loss"] == pytest.approx(found[0]["sft/valid_loss"], rel=1e-3)


def rm_params(**changes: Any) -> RmParams:
    sizes: dict[str, Any] = {"batch_size": 8, "lr": 2e-2, "precision": "fp32", "max_tokens": 60, "epochs": 2,
                             "normalise_samples": 40, "lora_rank": RANK, "lora_alpha": ALPHA}
    return RmParams(**(sizes | changes))


@pytest.mark.parametrize("normalise", ["demonstrations", "gain_and_bias"])
def test_the_reward_model_trains_adapters_and_head_and_saves_normalised_merged_scores(
        policy_folder: Path, tmp_path: Path, normalise: Any) -> None:
    model, metrics = train_reward_model(rm_params(normalise=normalise), rankings(120), DEMONSTRATIONS, policy_folder, 3,
                                        tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (policy_folder, tmp_path / "model"))
    head = after.pop("score.weight")
    assert (head - new_scorer(policy_folder, 0, generator(3, "rm", "head")).score.weight).norm() > 0.01 * head.norm()
    shifted = {name: value for name, value in after.items() if name.endswith(("final_layer_norm.bias", "ln_f.bias"))}
    assert_low_rank(before, {name: value for name, value in after.items() if name not in shifted},
                    linear_layers(policy_folder))
    codec = load_codec(policy_folder)
    texts = [prompt + completion for prompt, completion in zip(
        codec.prompts([row["prompt"] for row in DEMONSTRATIONS]),
        codec.completions([row["completion"] for row in DEMONSTRATIONS]), strict=True)]
    saved = score_sequences(load_scorer(tmp_path / "model"), texts, codec.pad_id, "fp32")
    assert saved == pytest.approx(score_sequences(model, texts, codec.pad_id, "fp32"), abs=1e-4)
    if normalise == "demonstrations":
        assert sum(saved) / len(saved) == pytest.approx(0, abs=1e-4)
    else:
        assert metrics["rm/gain"] != 1
    if shifted:  # a plain transformers model gives the same scores
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            first = plain(input_ids=torch.tensor([texts[0]])).logits.item()
        assert first == pytest.approx(saved[0], abs=1e-4)


def stages(stage: str, policy: Path, texts: list[str], folder: Path, base: LoraBase) -> None:
    """A run of one stage with LoRA, whose weights are chosen."""
    if stage == "sft":
        dropout = 0.2 if "gpt_neox" in str(policy) else 0.0
        sft(sft_params(checkpoint="valid_loss", dropout=dropout, lora_base=base), demonstration_rows(texts), policy, 9,
            folder)
    else:
        train_reward_model(rm_params(checkpoint="valid_accuracy", checks=3, lora_base=base), rankings(60),
                           DEMONSTRATIONS, policy, 3, folder)


@pytest.mark.usefixtures("save_every_step")
@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_killed_run_resumes_with_the_same_bytes_from_checkpoints_of_what_is_trained(
        model_folders: dict[str, tuple[Path, Path]], texts: list[str], tmp_path: Path, stage: str, base: LoraBase,
        monkeypatch: pytest.MonkeyPatch) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    policy = model_folders["gpt_neox"][0]
    stages(stage, policy, texts, tmp_path / "whole", base)
    after_step = Checkpoints.after_step
    hook = once(4, kill)

    def killed(self: Checkpoints, step: int, state_of: Callable[[], State]) -> None:
        after_step(self, step, state_of)
        hook(step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "after_step", killed)
        with pytest.raises(Killed):
            stages(stage, policy, texts, tmp_path / "stopped", base)
    checkpoint = Checkpoints(tmp_path / "stopped" / "checkpoints").latest()
    assert checkpoint is not None
    assert checkpoint.step == 4
    names = list(checkpoint.names())
    for part in ("model/", "best/"):
        held = {name.removeprefix(part) for name in names if name.startswith(part)}
        assert held
        assert all("lora_" in name for name in held if name != "score.weight")
        assert ("score.weight" in held) == (stage == "rm")
    moments = [name for name in names if name.startswith("optimizer") and not name.endswith("/step")]
    assert len(moments) == 2 * sum(name.startswith("model/") for name in names)
    stages(stage, policy, texts, tmp_path / "stopped", base)
    for name in ("model/model.safetensors", "journal.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# --- a base in bfloat16 ----------------------------------------------------------------------------------------------

def rounded(folder: Path, tokenizer: Any, target: Path) -> Path:
    """The same model as if it had been published in bfloat16."""
    save_model(load_policy(folder).to(torch.bfloat16), tokenizer, target)
    return target


def test_a_base_in_bfloat16_that_lost_nothing_gives_the_same_bits_and_gradients(
        policy_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = rounded(policy_folder, tokenizer, tmp_path / "published")
    ids = torch.randint(5, 40, (8, 24), generator=noise())  # few distinct tokens: GPT-NeoX's first block is by token
    found: list[tuple[float, dict[str, Any]]] = []
    bases: tuple[LoraBase, ...] = ("fp32", "bf16")
    for base in bases:
        model = load_policy(folder)
        wide = sum(value.nbytes for value in model.parameters())
        add_adapter(model, SftParams(lora_rank=RANK, lora_alpha=ALPHA, lora_base=base, precision="bf16"), noise())
        moved(model)
        loss = lm_loss(model.train(), ids, "bf16")
        loss.backward()
        found.append((loss.item(), {name: value.grad for name, value in adapters_of(model).items()}))
    assert {value.dtype for value in adapters_of(model).values()} == {torch.float32}
    assert sum(value.nbytes for name, value in model.named_parameters() if "lora_" not in name) < 0.6 * wide
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items())


@pytest.mark.parametrize("published", [False, True])
def test_stages_on_a_base_in_bfloat16_save_bfloat16_only_where_the_base_was(
        policy_folder: Path, tokenizer: Any, texts: list[str], tmp_path: Path, published: bool) -> None:
    base = rounded(policy_folder, tokenizer, tmp_path / "published") if published else policy_folder
    changes: dict[str, Any] = {"lora_base": "bf16", "precision": "bf16"}
    metrics = sft(sft_params(**changes), demonstration_rows(texts), base, 9, tmp_path / "sft")
    assert metrics["sft/valid_loss"] < metrics["sft/valid_loss_base"] - 0.1
    policy = tmp_path / "sft" / "model"
    plain: Any = AutoModelForCausalLM.from_pretrained(policy)
    assert plain.dtype == (torch.bfloat16 if published else torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, policy))
    assert before.keys() == after.keys()
    layers = linear_layers(base)
    for name, value in after.items():
        held = before[name].to(torch.bfloat16).float() if value.dim() == 2 else before[name].float()
        if published and value.dim() == 2:
            assert value.dtype == torch.bfloat16
            assert torch.equal(value.float(), held) == (name.removesuffix(".weight") not in layers)
        else:
            assert value.dtype == torch.float32
            assert_low_rank({name: held}, {name: value}, layers)
    model, _ = train_reward_model(rm_params(**changes), rankings(60), DEMONSTRATIONS, policy, 3, tmp_path / "rm")
    saved = load_scorer(tmp_path / "rm" / "model")
    codec = load_codec(policy)
    answers = codec.completions([" ".join(["red"] * count + ["rice"] * (5 - count)) for count in range(6)])
    ours, theirs = (torch.tensor(score_sequences(one, [codec.prompts(["what?"])[0] + answer for answer in answers],
                                                 codec.pad_id, "bf16")) for one in (model, saved))
    assert (ours - theirs).abs().max() < 0.2 * (ours.max() - ours.min())


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_rank": 0, "precision": "bf16"}, r"sft\.lora_base = bf16: must be fp32 where sft\.lora_rank = 0"),
    ({"precision": "fp32"}, r"sft\.lora_base = bf16: must be fp32 where sft\.precision = fp32")])
def test_a_base_in_bfloat16_that_does_not_fit_the_other_parameters_is_refused_at_the_start(
        policy_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sft(sft_params(lora_base="bf16", **changes), [], policy_folder, 9, tmp_path)


@pytest.mark.parametrize(("changes", "there", "line"), [
    ({"lora_rank": 0}, True, "lora_base = nf4: must be fp32 where {}.lora_rank = 0, which trains all weights"),
    ({"shard": True}, True, "lora_base = nf4: cannot be combined with {}.shard = true"),
    ({"compile": True}, True, "lora_base = nf4: cannot be combined with {}.compile = true"),
    ({}, False, "lora_base = nf4: needs bitsandbytes: pip install 'instructflow[nf4]'")])
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_base_in_nf4_that_cannot_be_is_refused_at_the_start(
        model_folders: dict[str, tuple[Path, Path]], ppo_params: Callable[..., PpoParams], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, stage: str, changes: dict[str, Any], there: bool, line: str) -> None:
    monkeypatch.setattr("rlhf.model.lora.installed", lambda: there)
    policy, scorer = model_folders["llama"]
    params: dict[str, Any] = {"lora_base": "nf4", "lora_rank": RANK} | changes
    run: dict[str, Callable[[], Any]] = {
        "sft": lambda: sft(sft_params(**params), [], policy, 9, tmp_path),
        "rm": lambda: train_reward_model(rm_params(**params), [], [], policy, 3, tmp_path),
        "ppo": lambda: Trainer(ppo_params(**params), policy, scorer, seed=5)}
    with pytest.raises(UserError) as raised:
        run[stage]()
    assert str(raised.value) == f"{stage}.{line.format(stage)}"
