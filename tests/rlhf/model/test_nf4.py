"""A base in NF4: its numbers against NF4 written out here, passes and stages against the dequantised weights."""

import copy
import json
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf.fast.decoder import decoder_for
from rlhf.memory import Job, Shape, moments, trained
from rlhf.model.adapter_folder import weights_sha256
from rlhf.model.chat_format import load_codec
from rlhf.model.layout import Layout
from rlhf.model.load import load_policy, load_scorer, save_model
from rlhf.model.lora import adapted_layers, add_adapter
from rlhf.model.nf4 import Nf4Conv1D, Nf4Layer, Nf4Linear, nf4_layers, quantise
from rlhf.model.scoring import score_sequences
from rlhf.params import PpoParams, SftParams
from rlhf.ppo.trainer import Trainer
from rlhf.pretrain import lm_loss
from rlhf.reward_model import train_reward_model
from rlhf.sft import Demonstrations, sft, valid_loss
from rlhf.training.checkpoint import Checkpoints
from tests.rlhf.fast.test_decoder import decoded, ids_of
from tests.rlhf.model.test_adapter_folder import run
from tests.rlhf.model.test_lora import (
    ALPHA,
    OPTIONS,
    RANK,
    adapters_of,
    assert_low_rank,
    by_hand,
    linear_layers,
    moved,
    noise,
    rm_params,
    sft_params,
)
from tests.rlhf.test_reward_model import DEMONSTRATIONS, rankings
from tests.rlhf.test_sft import demonstration_rows

pytest.importorskip("bitsandbytes")

NF4: dict[str, Any] = {"lora_base": "nf4"}


def levels() -> np.ndarray:
    """The sixteen levels of QLoRA's appendix E: quantiles of N(0, 1), eight above zero, seven below, scaled to 1."""
    offset = 0.9677083  # of the outermost quantile: (1 - 1/30 + 1 - 1/32) / 2
    above, below = norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    found = np.sort(np.concatenate([above, [0.0], below]))
    return found / found.max()


def codes_of(layer: Nf4Layer) -> np.ndarray:
    """The number of each weight's level, row by row: two in a byte, the first in its upper half."""
    packed = layer.codes.numpy().ravel()
    return np.stack([packed >> 4, packed & 15], axis=1).ravel()[:layer.inputs * layer.outputs]


def scales_of(layer: Nf4Layer) -> np.ndarray:
    """The scale of each block of 64 in float64: an 8-bit number times the scale of its 256, plus their mean."""
    second = np.repeat(layer.scales_of_scales.double().numpy(), 256)[:len(layer.scales)]
    return np.asarray(layer.levels.double().numpy()[layer.scales.numpy()] * second + layer.mean_scale.item())


def weight_by_hand(layer: Nf4Layer) -> Tensor:
    """Level times scale in float64, as the layer's model stores it."""
    codes = codes_of(layer)
    flat = levels()[codes] * np.repeat(scales_of(layer), 64)[:len(codes)]
    weight = torch.from_numpy(flat.reshape(layer.outputs, layer.inputs))
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def in_nf4(folder: Path) -> Any:
    return load_policy(folder, Layout(nf4=True))


def by_name(model: Any) -> dict[str, Nf4Layer]:
    return {name.replace(".base_layer", ""): module for name, module in model.named_modules()
            if isinstance(module, Nf4Layer)}


@pytest.fixture
def plain(policy_folder: Path, tmp_path: Path) -> Path:
    """The policy's folder with the float32 weights that its base in NF4 stands for, written without our own saving."""
    return plain_copy(policy_folder, tmp_path / "plain")


def plain_copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    for name, layer in by_name(in_nf4(folder)).items():
        assert torch.allclose(layer.weight.double(), weight_by_hand(layer), rtol=1e-6, atol=1e-9)
        weights[f"{name}.weight"] = layer.weight.contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


# --- a layer ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(256, 128), (48, 32), (5, 7)])  # 512 blocks; over rows; one, not full
@pytest.mark.parametrize("kind", ["linear", "gpt2"])
def test_a_weight_is_the_nearest_of_sixteen_levels_times_its_block_s_largest_magnitude(shape: tuple[int, int], kind: str
                                                                                       ) -> None:
    source: Any = Conv1D(shape[0], shape[1]) if kind == "gpt2" else torch.nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        source.weight.copy_(torch.randn(source.weight.shape, generator=noise()) * 0.1)
    layer = (Nf4Conv1D if kind == "gpt2" else Nf4Linear)(source)
    weight = (source.weight.T if kind == "gpt2" else source.weight).detach().double().numpy()  # [out, in]
    blocks = np.split(weight.ravel(), range(64, weight.size, 64))
    largest = np.array([np.abs(block).max() for block in blocks])
    distance = np.abs(np.concatenate([block / top for block, top in zip(blocks, largest, strict=True)])[:, None]
                      - levels()[None])
    codes = codes_of(layer)
    chosen = distance[np.arange(len(codes)), codes]
    assert (chosen <= distance.min(1) + 1e-6).all()
    assert len(set(codes)) == (16 if weight.size > 100 else len(set(codes)))
    spread = np.abs(largest - largest.mean())
    for place, scale in enumerate(scales_of(layer)):  # 8 bits: of the largest in 256, half the widest step
        group = spread[place // 256 * 256:][:256].max()
        assert abs(scale - largest[place]) <= 0.0075 * group + 1e-7
    assert torch.allclose(layer.weight.double(), weight_by_hand(layer), rtol=1e-6, atol=1e-9)
    assert torch.equal(layer.dequantised(torch.bfloat16), layer.dequantised(torch.float32).to(torch.bfloat16))
    assert layer.weight.shape == source.weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "gpt2", "no bias"])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_weight(kind: str, dtype: torch.dtype) -> None:
    source: Any = Conv1D(48, 40) if kind == "gpt2" else torch.nn.Linear(40, 48, bias=kind == "linear")
    if source.bias is not None:
        torch.nn.init.normal_(source.bias, generator=noise())
    layer = (Nf4Conv1D if kind == "gpt2" else Nf4Linear)(source).requires_grad_(False)
    states = torch.randn(3, 5, 40, generator=noise(), requires_grad=True)
    upstream = torch.randn(3, 5, 48, generator=noise(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = layer(states)
    assert found.dtype == dtype
    found.backward(upstream.to(dtype))
    weight = weight_by_hand(layer).T if kind == "gpt2" else weight_by_hand(layer)
    expected = states.detach().double() @ weight.T + (0 if source.bias is None else source.bias.detach().double())
    assert states.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (found.detach().double() - expected).norm() < tolerance * expected.norm()
    gradient = upstream.double() @ weight
    assert (states.grad.double() - gradient).norm() < tolerance * gradient.norm()


# --- a model ---------------------------------------------------------------------------------------------------------

def test_the_layers_that_have_adapters_are_in_nf4_and_nothing_else(policy_folder: Path) -> None:
    before = load_policy(policy_folder)
    originals = {name: weakref.ref(before.get_parameter(f"{name}.weight")) for name in linear_layers(policy_folder)}
    rest = {name: value.detach().clone() for name, value in before.named_parameters()
            if name.removesuffix(".weight") not in originals}
    quantise(before)
    assert by_name(before).keys() == originals.keys()
    assert all(one() is None for one in originals.values())  # the weights that were quantised are gone
    assert {name: value.dtype for name, value in before.named_parameters()} == dict.fromkeys(rest, torch.float32)
    assert all(torch.equal(value, rest[name]) for name, value in before.named_parameters())
    layers = [id(layer) for layer in nf4_layers(before)]
    add_adapter(before, SftParams(lora_rank=RANK, lora_base="nf4"), noise())
    assert {name: id(layer.base_layer) for name, layer in adapted_layers(before).items()} == dict(
        zip(by_name(before), layers, strict=True))
    scorer = load_scorer(policy_folder, new_head=True, layout=Layout(nf4=True))
    assert len(nf4_layers(scorer)) == len(layers)
    assert type(scorer.score) is torch.nn.Linear


@pytest.fixture
def both(policy_folder: Path, plain: Path) -> Callable[..., Iterator[Any]]:
    """Models with the same adapters: on the base in NF4, and on the weights that it stands for, as they are."""
    def make(precision: str = "fp32") -> Iterator[Any]:
        for base in ("nf4", "bf16" if precision == "bf16" else "fp32"):
            model = load_policy(policy_folder if base == "nf4" else plain)
            params: Any = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_base": base, "precision": precision}
            add_adapter(model, SftParams(**params), noise())
            yield moved(model).train()
    return make


def test_loss_and_gradients_are_those_of_the_dequantised_weights_in_float64(
        both: Callable[..., Iterator[Any]], plain: Path) -> None:
    ids = torch.randint(5, 300, (4, 16), generator=noise())
    model = next(both())
    exact = {name: value.detach().double().requires_grad_() for name, value in adapters_of(model).items()}
    expected = by_hand(plain, exact, ids)
    expected.backward()
    loss = lm_loss(model, ids, "fp32")
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert gradients.keys() == exact.keys()
    for name, value in exact.items():
        assert value.grad is not None
        assert value.grad.norm() > 0, name
        assert (gradients[name] - value.grad).norm() < 1e-4 * value.grad.norm(), name


def test_in_bfloat16_they_are_those_of_the_dequantised_weights_to_the_bit(both: Callable[..., Iterator[Any]]) -> None:
    ids = torch.randint(5, 40, (8, 24), generator=noise())
    found: list[tuple[float, dict[str, Any]]] = []
    for model in both("bf16"):
        loss = lm_loss(model, ids, "bf16")
        loss.backward()
        found.append((loss.item(), {name: value.grad for name, value in adapters_of(model).items()}))
    (one, gradients), (other, theirs) = found
    assert one == other
    assert all(torch.equal(theirs[name], gradient) for name, gradient in gradients.items())


@torch.no_grad()
def test_sampling_merging_and_the_model_without_adapters_are_of_the_dequantised_weights(
        both: Callable[..., Iterator[Any]], plain: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, same = (one.eval() for one in both())
    exact: Any = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager")
    ids = ids_of(model, 2, 9)
    usual = same(ids).logits
    assert torch.allclose(model(ids).logits, usual, atol=1e-4)
    decoder = decoder_for(model, "fp32")
    assert decoder is not None
    assert torch.allclose(decoded(decoder, ids, 4), usual, atol=1e-4)
    for name, adapter in (("merged", None), ("base", vars(model)["_peft_wrapper"])):
        folder = tmp_path / name
        if adapter is None:
            save_model(model, tokenizer, folder)
        else:
            with adapter.disable_adapter():
                assert torch.allclose(model(ids).logits, exact(ids).logits, atol=1e-4)
                save_model(model, tokenizer, folder)
        saved: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert type(saved) is type(exact)
        assert saved.dtype == torch.float32
        assert load_file(folder / "model.safetensors").keys() == load_file(plain / "model.safetensors").keys()
        assert torch.allclose(saved(ids).logits, exact(ids).logits if adapter else usual, atol=1e-4)
    assert not torch.allclose(usual, exact(ids).logits, atol=0.1)


def test_what_a_pass_keeps_for_its_backward_pass_has_no_dequantised_weight(both: Callable[..., Iterator[Any]]) -> None:
    ids, found = torch.randint(5, 300, (2, 7), generator=noise()), []
    for model in both():
        shapes = {tuple(layer.base_layer.weight.shape) for layer in adapted_layers(model).values()}
        shapes |= {shape[::-1] for shape in shapes}
        kept: list[tuple[int, ...]] = []

        def keep(item: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
            kept.append(tuple(item.shape) if item.is_floating_point() else ())
            return item

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda item: item):
            lm_loss(model, ids, "fp32")
        found.append(sum(shape in shapes for shape in kept))
    assert found[0] == 0
    assert found[1] > len(shapes)  # what is seen of the same passes over plain weights


def held_bytes(model: Any) -> int:
    """Of frozen weights, whatever they are held as, once each."""
    tensors = [value for value in model.parameters() if not value.requires_grad]
    tensors += [value for layer in nf4_layers(model) for value in layer.held()]
    return sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bytes_of_a_base_in_nf4_are_those_that_the_arithmetic_says(precision: str) -> None:
    shape = Shape("x", 3, 256, 4, 512, 688, 64, "llama", 2, False)
    found = {}
    for base in ("fp32", "nf4"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False))
        params: Any = {"lora_rank": RANK, "lora_base": base, "precision": precision}
        add_adapter(model, SftParams(**params), noise())
        job = Job(stage="sft", policy=shape, scorer=shape, rows=8, lora_rank=RANK, lora_nf4=base == "nf4",
                  bf16=precision == "bf16")
        found[base] = held_bytes(model)
        count, frozen = trained(job, shape, True)
        assert frozen == pytest.approx(found[base], rel=0.01)
        assert count == sum(value.numel() for value in model.parameters() if value.requires_grad)
    layers = 4 * 3 * (2 * 256 * (256 + 128) + 3 * 256 * 688)
    assert found["fp32"] - found["nf4"] > 0.86 * layers  # 32 bits → 4.2


def test_the_arithmetic_counts_a_dequantised_layer() -> None:
    shape = Shape("x", 3, 256, 4, 512, 688, 64, "llama", 2, False)
    job = Job(stage="ppo", policy=shape, scorer=shape, rows=8, lora_rank=RANK, lora_nf4=True)
    for moment in ("log-probs", "scores", "update"):
        assert moments(job)[moment]["dequantised layer"] == 256 * 688 * (2 + 4 / 64)


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_a_narrow_base_leaves_nothing_of_its_file_in_memory(model_folders: dict[str, tuple[Path, Path]],
                                                            copy_folder: Callable[[Path], Path], base: str) -> None:
    """The whole file stays mapped while one tensor of it is in use."""
    def mapped(folder: Path) -> bool:
        return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()

    folder = copy_folder(model_folders["llama"][0])
    model = load_policy(folder)
    before = mapped(folder)
    params: Any = {"lora_rank": RANK, "lora_base": base, "precision": "bf16"}
    add_adapter(model, SftParams(**params), noise())
    assert (before, mapped(folder)) == (True, False)


# --- the stages ------------------------------------------------------------------------------------------------------

def held(weights: dict[str, Tensor], precision: str, layers: set[str]) -> dict[str, Tensor]:
    """What a base is before it is trained: in bfloat16 passes the matrices that are not in NF4 are in bfloat16."""
    return {name: value.to(torch.bfloat16).float() if precision == "bf16" and value.dim() == 2
            and name.removesuffix(".weight") not in layers else value.float() for name, value in weights.items()}


@pytest.mark.parametrize(("precision", "option"), [("fp32", "plain"), ("bf16", "plain"), ("fp32", "recomputed")])
def test_sft_adds_a_low_rank_to_the_dequantised_weights_and_saves_the_sum(
        policy_folder: Path, plain: Path, texts: list[str], tmp_path: Path, precision: str, option: str) -> None:
    params = sft_params(**NF4 | OPTIONS[option] | {"precision": precision})
    metrics = sft(params, demonstration_rows(texts), policy_folder, 9, tmp_path / "sft")
    layers = linear_layers(policy_folder)
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "sft" / "model"))
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert_low_rank(held(before, precision, layers), after, layers)
    assert metrics["sft/valid_loss"] < metrics["sft/valid_loss_base"] - 0.1
    codec = load_codec(policy_folder)
    rows = [row for row in demonstration_rows(texts) if row["split"] == "valid"]
    data = Demonstrations.of_rows(codec, rows, params.max_tokens)
    for folder, value in ((plain, "sft/valid_loss_base"), (tmp_path / "sft" / "model", "sft/valid_loss")):
        found = valid_loss(load_policy(folder), data, params, codec.pad_id)
        assert found == pytest.approx(metrics[value], rel=1e-4 if precision == "fp32" else 2e-2)


def test_a_base_that_was_published_in_bfloat16_is_saved_in_bfloat16(
        model_folders: dict[str, tuple[Path, Path]], texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    folder = model_folders["llama"][0]
    save_model(load_policy(folder).to(torch.bfloat16), tokenizer, tmp_path / "published")
    for base, dtype in ((tmp_path / "published", torch.bfloat16), (folder, torch.float32)):
        sft(sft_params(**NF4, precision="bf16"), demonstration_rows(texts), base, 9, tmp_path / base.name)
        saved = load_file(tmp_path / base.name / "model" / "model.safetensors")
        assert {value.dtype for value in saved.values() if value.dim() == 2} == {dtype}


@pytest.fixture
def reward_model(policy_folder: Path, tmp_path: Path) -> tuple[Any, Path]:
    """(reward model as it was trained on the policy in NF4, its folder)."""
    model, _ = train_reward_model(rm_params(**NF4, normalise="gain_and_bias"), rankings(60), DEMONSTRATIONS,
                                  policy_folder, 3, tmp_path / "rm")
    return model, tmp_path / "rm" / "model"


def test_the_reward_model_is_saved_merged_and_as_an_adapter_of_the_dequantised_weights(
        policy_folder: Path, plain: Path, reward_model: tuple[Any, Path]) -> None:
    model, folder = reward_model
    codec = load_codec(policy_folder)
    answer = codec.completions(["red rice red"])[0]
    texts = [prompt + answer for prompt in codec.prompts(["what?", "home fish?", "red"])]
    scores = score_sequences(model, texts, codec.pad_id, "fp32")
    assert max(scores) - min(scores) > 0.01
    assert score_sequences(load_scorer(folder), texts, codec.pad_id, "fp32") == pytest.approx(scores, abs=1e-4)
    base = AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1)
    base.config.pad_token_id = codec.pad_id
    theirs = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    shift = getattr(model.config, "score_shift", 0.0)
    with torch.no_grad():
        found = [theirs(input_ids=torch.tensor([text])).logits.item() + shift for text in texts]
    assert found == pytest.approx(scores, abs=1e-4)
    described = json.loads((folder / "adapter" / "base.json").read_text())
    assert described["nf4"] is True
    assert described["weights_sha256"] == weights_sha256(policy_folder)
    before, after = (load_file(one / "model.safetensors") for one in (plain, folder))
    after = {name: value for name, value in after.items() if name in before
             and not name.endswith(("final_layer_norm.bias", "ln_f.bias"))}
    assert_low_rank(before, after, linear_layers(policy_folder))


@pytest.mark.parametrize("value_init", ["reward_model", "policy"])
def test_ppo_on_one_base_in_nf4_learns_as_on_the_dequantised_weights(
        policy_folder: Path, plain: Path, reward_model: tuple[Any, Path], ppo_params: Callable[..., PpoParams],
        prompt_texts: list[str], tmp_path: Path, value_init: str) -> None:
    other = Path(shutil.copytree(reward_model[1], tmp_path / "rm of plain"))
    described = json.loads((other / "adapter" / "base.json").read_text())
    (other / "adapter" / "base.json").write_text(json.dumps(
        described | {"nf4": False, "weights_sha256": weights_sha256(plain)}))
    sizes: dict[str, Any] = {"lora_rank": 4, "lr": 1e-2, "value_lr": 1e-2, "value_init": value_init, "ema_decay": 0.5}
    params = ppo_params(**sizes, **NF4)
    ours, theirs = Trainer(params, policy_folder, reward_model[1], 5), Trainer(ppo_params(**sizes), plain, other, 5)
    models = ours.models
    held_by = [[item.data_ptr() for layer in nf4_layers(model) for item in layer.held()]
               for model in (models.policy, models.value, models.reward_model)]
    assert len(held_by[0]) == 5 * len(linear_layers(policy_folder))
    assert held_by[0] == held_by[1] == held_by[2]
    prompts = models.codec.prompts(prompt_texts)
    with models.as_reference() as reference, torch.no_grad():
        ids = torch.tensor([prompts[0]])
        assert torch.allclose(reference(ids).logits, load_policy(plain)(ids).logits, atol=1e-4)
    one, second = run(ours, prompt_texts, 2), run(theirs, prompt_texts, 2)
    assert abs(one[1]["ppo/kl"]) > 1e-4
    for row, expected in zip(one, second, strict=True):
        assert row == pytest.approx(expected, rel=5e-3, abs=1e-3)
    ours.save(tmp_path / "policy")
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "policy"))
    for name, value in after.items():
        change = value - before[name]
        if name.removesuffix(".weight") in linear_layers(policy_folder) and value.dim() == 2:
            assert torch.linalg.svdvals(change)[4] < 1e-3 * change.norm() + 1e-5, name
            assert change.norm() > 0
        else:
            assert not change.any(), name


@pytest.mark.parametrize("alone", [False, True])
def test_ppo_goes_on_from_a_checkpoint_that_holds_nothing_of_the_base(
        model_folders: dict[str, tuple[Path, Path]], ppo_params: Callable[..., PpoParams], prompt_texts: list[str],
        tmp_path: Path, alone: bool) -> None:
    """On one base, and with a base for each model, where the reward model is as it was saved."""
    policy, scorer = model_folders["gpt_neox"]
    if not alone:
        train_reward_model(rm_params(**NF4), rankings(40), DEMONSTRATIONS, policy, 3, tmp_path / "rm")
        scorer = tmp_path / "rm" / "model"
    params = ppo_params(lora_rank=4, lr=1e-2, **NF4)
    trainer, resumed = (Trainer(params, policy, scorer, seed=5) for _ in range(2))
    assert bool(nf4_layers(trainer.models.reward_model)) != alone
    assert nf4_layers(trainer.models.value)
    run(trainer, prompt_texts, 1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, trainer.state())
        checkpoint = checkpoints.latest()
    assert checkpoint is not None
    names = [name.partition("/")[2] for name in checkpoint.names() if name.startswith(("policy/", "value/"))]
    assert names
    assert all(".default." in name or name == "score.weight" for name in names)
    resumed.restore(checkpoint)
    prompts = trainer.models.codec.prompts(prompt_texts)
    assert trainer.step(prompts, 1)[1] == resumed.step(prompts, 1)[1]
    for number, one in enumerate((trainer, resumed)):
        one.save(tmp_path / str(number))
    saved = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(2)]
    assert saved[0] == saved[1]


def test_an_adapter_fits_only_the_kind_of_base_that_it_was_trained_on(
        model_folders: dict[str, tuple[Path, Path]], ppo_params: Callable[..., PpoParams], tmp_path: Path,
        caplog: pytest.LogCaptureFixture) -> None:
    policy = model_folders["llama"][0]
    for name, changes in (("nf4", NF4), ("fp32", {})):
        train_reward_model(rm_params(**changes), rankings(40), DEMONSTRATIONS, policy, 3, tmp_path / name)
    old = copy.deepcopy(json.loads((tmp_path / "fp32" / "model" / "adapter" / "base.json").read_text()))
    del old["nf4"]  # as before there was NF4
    shutil.copytree(tmp_path / "fp32", tmp_path / "old")
    (tmp_path / "old" / "model" / "adapter" / "base.json").write_text(json.dumps(old))
    with caplog.at_level(logging.INFO):
        for folder, changes, line in (
                ("nf4", NF4, "share the weights of"), ("nf4", {}, "was trained on a base that was in NF4"),
                ("fp32", NF4, "was trained on a base that was not in NF4"), ("fp32", {}, "share the weights of"),
                ("old", {}, "share the weights of"), ("old", NF4, "was trained on a base that was not in NF4")):
            caplog.clear()
            Trainer(ppo_params(lora_rank=2, **changes), policy, tmp_path / folder / "model", seed=5)
            assert line in caplog.text, (folder, changes)
