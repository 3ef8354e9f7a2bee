"""Models as plain Hugging Face folders: heads, shifted scores, saving and loading, schedules, parameter groups."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf.data.batching import pad_right
from rlhf.data.packing import PackedBatch
from rlhf.errors import UserError
from rlhf.model.forward import next_token_logits, scores_at
from rlhf.model.load import (
    load_policy,
    load_scorer,
    new_scorer,
    no_dropout,
    save_memory,
    save_model,
    scale_scores,
    set_dropout,
    shift_scores,
    small_gpt,
)
from rlhf.model.scoring import score_groups, score_sequences
from rlhf.params import PretrainParams
from rlhf.training.optim import adamw, cosine_factor, muon_and_adamw, scale_lr

WITH_DROPOUT = ("gpt_neox", "gpt2")  # residual dropout, a bias in the final norm
SEQUENCES = [[7, 9, 30, 41, 8], [12, 5], [99, 100, 101, 102, 103, 104, 105, 106], [7, 9, 30]]


def padded(pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, last) of the sequences above: [4, 8], and where each one's last token is in the flattened ids."""
    ids = pad_right(SEQUENCES, pad_id)
    return ids, torch.tensor([row * ids.shape[1] + len(sequence) - 1 for row, sequence in enumerate(SEQUENCES)])


def head_seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_new_head_has_deviation_one_over_root_d_plus_one(policy_folder: Path) -> None:
    weights = torch.cat([new_scorer(policy_folder, 0, head_seed(seed)).score.weight.detach() for seed in range(12)])
    assert weights.shape == (12, 32)
    assert weights.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.1)
    assert weights.mean().abs().item() < 0.03
    again = new_scorer(policy_folder, 0, head_seed(3))
    assert torch.equal(again.score.weight[0], weights[3])
    assert again.score.bias is None


def test_the_scorer_has_the_policys_backbone(policy_folder: Path) -> None:
    policy, scorer = load_policy(policy_folder).base_model, new_scorer(policy_folder, 0, head_seed(0)).base_model
    for (name, one), (_, other) in zip(policy.named_parameters(), scorer.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_scores_are_what_transformers_says(policy_folder: Path, tokenizer: PreTrainedTokenizerFast,
                                           tmp_path: Path) -> None:
    """A saved scorer gives, in plain transformers with an attention mask, the scores that training saw."""
    scorer = new_scorer(policy_folder, tokenizer.pad_token_id, head_seed(1))
    ids, last = padded(tokenizer.pad_token_id)
    with torch.no_grad():
        ours = scores_at(scorer, PackedBatch(ids), last)
        everywhere = scores_at(scorer, PackedBatch(ids), torch.arange(ids.numel()))
    save_model(scorer, tokenizer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    mask = torch.arange(ids.numel()).view(ids.shape) <= last.unsqueeze(1)
    with torch.no_grad():
        batch = plain(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        alone = [plain(input_ids=torch.tensor([sequence])).logits.item() for sequence in SEQUENCES]
    assert ours.tolist() == pytest.approx(alone, abs=1e-5)
    assert batch.tolist() == pytest.approx(alone, abs=1e-5)
    assert everywhere[last].tolist() == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.05
    pad_id = tokenizer.pad_token_id
    assert score_sequences(load_scorer(tmp_path), SEQUENCES, pad_id, "fp32") == pytest.approx(alone, abs=1e-5)
    with torch.no_grad():
        groups = score_groups(scorer, [SEQUENCES[:1], SEQUENCES[1:]], pad_id, "fp32")
    assert groups.tolist() == [pytest.approx([alone[0], 0, 0], abs=1e-5), pytest.approx(alone[1:], abs=1e-5)]


@pytest.mark.parametrize("shift", [2.5, -0.75])
def test_a_shift_is_added_exactly_and_survives_saving(policy_folder: Path, tokenizer: PreTrainedTokenizerFast,
                                                      tmp_path: Path, shift: float, architecture: str) -> None:
    scorer = new_scorer(policy_folder, tokenizer.pad_token_id, head_seed(2))
    ids, last = padded(tokenizer.pad_token_id)
    with torch.no_grad():
        before = scores_at(scorer, PackedBatch(ids), last)
        names = [name for name, _ in scorer.named_parameters()]
        shift_scores(scorer, shift)
        after = scores_at(scorer, PackedBatch(ids), last)
    assert (after - before).tolist() == pytest.approx([shift] * 4, abs=1e-5)
    save_model(scorer, tokenizer, tmp_path)
    plain, problems = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        loaded = [plain.eval()(input_ids=torch.tensor([sequence])).logits.item() for sequence in SEQUENCES]
    if hasattr(scorer.config, "score_shift"):  # RMSNorm: plain transformers leaves the constant out, and only that
        assert architecture not in WITH_DROPOUT
        loaded = [score + plain.config.score_shift for score in loaded]
    else:
        assert [name for name, _ in scorer.named_parameters()] == names
    assert loaded == pytest.approx((before + shift).tolist(), abs=1e-5)
    ours = load_scorer(tmp_path)
    assert score_sequences(ours, SEQUENCES, tokenizer.pad_token_id, "fp32") == pytest.approx(loaded, abs=1e-5)
    with torch.no_grad():
        shift_scores(ours, -shift)  # once more, as after a second training
        assert scores_at(ours, PackedBatch(ids), last).tolist() == pytest.approx(before.tolist(), abs=1e-5)


def test_a_gain_multiplies_every_score(policy_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = new_scorer(policy_folder, tokenizer.pad_token_id, head_seed(2))
    before = score_sequences(scorer, SEQUENCES, tokenizer.pad_token_id, "fp32")
    scale_scores(scorer, 2.5)
    shift_scores(scorer, 1.0)
    after = score_sequences(scorer, SEQUENCES, tokenizer.pad_token_id, "fp32")
    assert after == pytest.approx([2.5 * score + 1 for score in before], abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient(make_policy: Callable[..., Any], architecture: str
                                                                    ) -> None:
    found = []
    for memory in (False, True):
        model = make_policy(architecture)
        no_dropout(model)
        save_memory(model, memory)
        model.train()
        ids, _ = padded(0)
        loss = next_token_logits(model, ids).float().logsumexp(dim=-1).sum()
        loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_saved_policy_loads_in_plain_transformers(policy_folder: Path, tokenizer: PreTrainedTokenizerFast,
                                                    tmp_path: Path) -> None:
    policy = load_policy(policy_folder)
    save_model(policy, tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    plain, words = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert (words.pad_token, words.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)
    ids, _ = padded(tokenizer.pad_token_id)
    with torch.no_grad():
        ours = next_token_logits(policy, ids)
        cut = next_token_logits(policy, ids, 2)
        for row, sequence in enumerate(SEQUENCES):
            logits = plain(input_ids=torch.tensor([sequence])).logits[0, :-1]
            torch.testing.assert_close(ours[row, : len(sequence) - 1], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut, ours[:, 2:], rtol=0, atol=1e-5)


def test_small_gpt_has_the_shape_it_was_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = small_gpt(PretrainParams(n_layer=3, n_head=2, n_embd=16, context=40), tokenizer)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (3, 2, 16)
    assert (config.max_position_embeddings, config.vocab_size) == (40, len(tokenizer))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_architecture_without_residual_dropout_says_so(make_policy: Callable[..., Any], name: str) -> None:
    set_dropout(make_policy(name), 0.0)
    with pytest.raises(UserError, match="has no residual dropout; set it to 0"):
        set_dropout(make_policy(name), 0.2)


@pytest.mark.parametrize("architecture", WITH_DROPOUT)
def test_dropout_is_set_on_residual_branches_only(make_policy: Callable[..., Any], architecture: str) -> None:
    model = make_policy(architecture).train()
    ids, _ = padded(0)

    def differs() -> bool:
        with torch.no_grad():
            return not torch.equal(next_token_logits(model, ids), next_token_logits(model, ids))

    assert not differs()
    set_dropout(model, 0.2)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    on = [name for name, rate in rates.items() if rate == 0.2]
    assert len(on) == 2 * 2  # behind attention and MLP of two blocks
    assert all("layers" in name or ".h." in name for name in on)
    assert all(rate == 0 for name, rate in rates.items() if name not in on)
    assert differs()
    set_dropout(model, 0.0)
    assert not differs()


@pytest.mark.parametrize(("total", "warmup"), [(50, 0), (50, 10), (2, 0)])
def test_cosine_schedule(total: int, warmup: int) -> None:
    factors = [cosine_factor(step, total, warmup) for step in range(total)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup - 1, eta_min=0.1)
    for step, factor in enumerate(factors):
        if step < warmup:
            assert factor == pytest.approx((step + 1) / warmup)
            continue
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors[warmup] == 1
    assert factors[-1] == pytest.approx(0.1)


def test_cosine_schedule_at_its_ends() -> None:
    assert cosine_factor(0, 1) == 1  # a single step has the peak
    assert cosine_factor(0, 5, warmup=5) == pytest.approx(0.2)
    assert cosine_factor(4, 5, warmup=5) == 1
    assert cosine_factor(99, 100, floor=0.0) == pytest.approx(0)


def test_scale_lr_is_relative_to_the_first_rate(make_policy: Callable[..., Any]) -> None:
    optimizer = adamw(make_policy("gpt2"), 2e-3)
    for factor in (0.5, 0.25, 1.0):
        scale_lr(optimizer, factor)
        assert {group["lr"] for group in optimizer.param_groups} == {2e-3 * factor}


def test_every_parameter_is_in_one_group(make_policy: Callable[..., Any], architecture: str) -> None:
    model = make_policy(architecture)
    everything = {id(item) for item in model.parameters()}
    optimizer = adamw(model, 1e-3, weight_decay=0.1)
    ids = [id(item) for group in optimizer.param_groups for item in group["params"]]
    assert len(ids) == len(everything)
    assert set(ids) == everything
    decayed = {item.dim() for group in optimizer.param_groups if group["weight_decay"] for item in group["params"]}
    assert decayed == {2}
    muon, rest = muon_and_adamw(model, 1e-3, 0.02, 0.01)
    split = [[id(item) for group in one.param_groups for item in group["params"]] for one in (muon, rest)]
    assert len(split[0]) + len(split[1]) == len(everything)
    assert {*split[0], *split[1]} == everything
    names = {id(item): name for name, item in model.named_parameters()}
    blocks = ("layers", ".h.")
    assert all(any(part in names[index] for part in blocks) for index in split[0])
    matrices = 4 if architecture in WITH_DROPOUT else 7  # q k v and the gate apart
    assert len(split[0]) == matrices * 2  # attention in and out, MLP in and out, of two blocks
