"""Packed demonstrations: rows are filled, nothing is lost, and no demonstration sees another one."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from rlhf.data.packing import PackedBatch, check_packing, document_positions, fill_rows, pack_rows, shuffled_batches
from rlhf.errors import UserError
from rlhf.fast.packed_attention import NAME
from rlhf.model.forward import log_probs_at
from rlhf.model.load import load_policy, no_dropout, save_memory
from rlhf.params import PretrainParams, SftParams
from rlhf.pretrain import lm_loss, pretrain
from rlhf.sft import Demonstrations, batch_loss, sft
from rlhf.training.journal import read_journal

LENGTHS = [(3, 9), (7, 4), (1, 12), (5, 5), (2, 2), (11, 8), (4, 1), (6, 17)]  # prompt, completion
ROOM = 40


def demonstrations(seed: int = 0) -> Demonstrations:
    draw = torch.Generator().manual_seed(seed)
    return Demonstrations([torch.randint(5, 200, (prompt + end,), generator=draw).tolist() for prompt, end in LENGTHS],
                          [prompt for prompt, _ in LENGTHS], 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 200))
def test_rows_hold_every_text_once_and_are_filled(lengths: list[int], room: int) -> None:
    rows = fill_rows(lengths, room)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) <= room
    # no two rows could be one
    assert all(one + two > room for place, one in enumerate(sums) for two in sums[place + 1:])


def test_a_text_that_fits_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="61 tokens do not fit into a row of 60"):
        fill_rows([3, 61], 60)


def test_batches_have_so_many_demonstrations_in_the_seeds_order() -> None:
    def batches(count: int, seed: int) -> list[list[int]]:
        return shuffled_batches([1] * count, 8, torch.Generator().manual_seed(seed))

    assert [len(batch) for batch in batches(30, 1)] == [8, 8, 8, 6]  # as without packing
    assert [len(batch) for batch in batches(5, 1)] == [5]
    assert len({index for batch in batches(32, 1) for index in batch}) == 32
    assert batches(30, 1) == batches(30, 1) != batches(30, 2)


def test_positions_start_anew_and_the_mask_is_on_completions() -> None:
    ids, mask, positions = pack_rows([[11, 12, 13], [21, 22, 23, 24], [31, 32]],
                                     [[(1, 3)], [(1, 2), (3, 4)], [(1, 2)]], 8, 0)
    assert ids.tolist() == [[21, 22, 23, 24, 11, 12, 13], [31, 32, 0, 0, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert mask.tolist() == [[1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [item.grad.clone() for item in model.parameters() if item.grad is not None]


@pytest.mark.parametrize("attention", ["eager", "sdpa", NAME])
@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients_are_those_of_the_unpacked_batch(make_policy: Callable[..., Any], architecture: str,
                                                            attention: str, recomputed: bool) -> None:
    data, model = demonstrations(), make_policy(architecture)
    model.set_attn_implementation(attention)
    no_dropout(model)
    save_memory(model, recomputed)
    model.train()
    indices = list(range(len(LENGTHS)))
    plain = batch_loss(model, *data.batch(model, indices, 0), "fp32")
    expected = gradients(model, plain)
    texts, places = data.packed(indices, ROOM, 0)
    assert len(texts.ids) == 3
    packed = batch_loss(model, texts, places, "fp32")
    assert packed.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(gradients(model, packed), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    leaking = batch_loss(model, PackedBatch(texts.ids), places, "fp32")  # the leak that is guarded against
    assert abs(leaking.item() - plain.item()) > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa", NAME])
def test_a_demonstration_changes_no_others_log_probs(make_policy: Callable[..., Any], architecture: str,
                                                     attention: str) -> None:
    model = make_policy(architecture)
    model.set_attn_implementation(attention)
    data, changed = demonstrations(), demonstrations()
    changed = replace(changed, ids=[[token + 1 for token in ids] if number == 3 else ids
                                    for number, ids in enumerate(changed.ids)])
    found = []
    for some in (data, changed):
        texts, places = some.packed(list(range(len(LENGTHS))), ROOM, 0)
        everywhere = torch.arange(texts.ids.numel()).view(texts.ids.shape)[:, :-1].flatten()
        with torch.no_grad():
            log_probs = log_probs_at(model, texts, everywhere, "fp32")
        found.append((texts.ids[:, 1:].flatten(), torch.isin(everywhere, places), log_probs))
    (ids, mask, before), (ids_changed, _, after) = found
    own = torch.zeros_like(mask)
    start = int((ids != ids_changed).nonzero()[0])
    own[max(0, start - 1):start + sum(LENGTHS[3])] = True
    assert (before[mask & own] != after[mask & own]).any()
    assert torch.equal(before[mask & ~own], after[mask & ~own])


def test_a_model_that_mixes_what_is_glued_is_refused(make_policy: Callable[..., Any], architecture: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_policy(architecture)
    check_packing(model)
    own = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward",
                        lambda *args, **kwargs: own(*args, **{**kwargs, "attention_mask": torch.ones(1, 9)}
                                                    if kwargs["input_ids"].shape[1] == 9 else kwargs))
    with pytest.raises(UserError, match=r"sft\.packing: .* mixes texts"):
        check_packing(model)
    alibi = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2))
    with pytest.raises(UserError, match=r"sft\.packing: Bloom"):
        check_packing(alibi.eval())


def test_packed_training_is_repeatable_and_reads_every_demonstration(policy_folder: Path, texts: list[str],
                                                                     tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": completion, "split": "train"}
            for prompt, completion in zip(texts[:24], texts[30:54], strict=True)]
    rows += [{**row, "split": "valid"} for row in rows[:4]]
    params = SftParams(epochs=2, batch_size=8, precision="fp32", pretrain_mix=0.0, packing=True)
    for name in ("one", "two"):
        metrics = sft(params, rows, policy_folder, 9, tmp_path / name)
    assert metrics["sft/valid_loss"] < metrics["sft/valid_loss_base"]
    assert len(read_journal(tmp_path / "one" / "journal.csv")) == 6
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert load_policy(tmp_path / "one" / "model").num_parameters() > 0


def test_a_document_of_pretraining_text_sees_only_itself(make_policy: Callable[..., Any], architecture: str) -> None:
    eos, model = 1, make_policy(architecture)
    ids = torch.tensor([[9, 8, eos, 30, 31, 32, eos, 40], [eos, 50, eos, eos, 60, 61, 62, 63]])
    positions = document_positions(ids, eos)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 1, 2, 3, 4]]
    found = []
    for row, starts in zip(ids, ([0, 2, 6, 8], [0, 2, 3, 8]), strict=True):
        with torch.no_grad():
            logits = torch.cat([model(row[None, start:end]).logits[0]
                                for start, end in pairwise(starts)])
        table = torch.log_softmax(logits, dim=-1)[:-1]
        found += [-table[place, token].item() for place, token in enumerate(row[1:].tolist())]
    with torch.no_grad():
        masked, seen = (lm_loss(model, ids, "fp32", chosen).item() for chosen in (positions, None))
    assert masked == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert abs(masked - seen) > 1e-3


def test_pretraining_with_documents_kept_apart(texts: list[str], tmp_path: Path) -> None:
    found = []
    for mask in (False, True):
        params = PretrainParams(vocab_size=320, n_layer=1, n_head=2, n_embd=16, context=64, steps=8, warmup_steps=1,
                                batch_size=8, precision="fp32", document_mask=mask)
        found.append(pretrain(params, texts * 4, 1, tmp_path / str(mask)))
    assert found[0]["pretrain/valid_loss"] != found[1]["pretrain/valid_loss"]
    assert abs(found[0]["pretrain/valid_loss"] - found[1]["pretrain/valid_loss"]) < 0.5
