"""Supervised fine-tuning: the loss is on the completion, or on all answers of a conversation; the rest is read."""

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import ShuffledEpochs, length_batches, pass_batches
from rlhf.data.packing import PackedBatch, Span, check_packing, pack_rows, shuffled_batches
from rlhf.data.prompts import Prompt, answers_in
from rlhf.data.rows import of_split
from rlhf.data.token_store import Column, TokenStore, chunks, lengths_of
from rlhf.errors import UserError
from rlhf.model.chat_format import PromptCodec, load_codec
from rlhf.model.device import autocast, device
from rlhf.model.forward import log_probs_at, pack
from rlhf.model.layout import Layout
from rlhf.model.load import (
    check_length,
    context_of,
    load_policy,
    load_scorer,
    prepare_training,
    save_model,
    set_dropout,
)
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.scoring import score_sequences
from rlhf.params import SftParams
from rlhf.pretrain import corpus_batch, corpus_losses, read_corpus
from rlhf.training import distributed
from rlhf.training.hardware import in_bf16
from rlhf.training.loop import Part, Validation, train_loop
from rlhf.training.micro_batches import shares
from rlhf.training.optim import adamw
from rlhf.training.seeding import generator, seed_everything

log = logging.getLogger(__name__)

SCORED_PROMPTS = 256


@dataclass(frozen=True)
class Demonstrations:
    """Tokenized prompt + completion pairs; rows over the length limit are left out and counted.

    `earlier`: of each row the start and end of each earlier answer that is trained on too, one after the other; empty:
    of no row. `left_out`: earlier answers that are not, since the template gives them another form or end.
    """

    ids: Sequence[list[int]]
    prompt_lengths: Sequence[int]
    too_long: int
    earlier: Sequence[list[int]] = ()
    left_out: int = 0

    @classmethod
    def encode(cls, codec: PromptCodec, prompts: Iterable[Prompt], completions: Iterable[str], max_tokens: int,
               folder: Path | None = None, all_answers: bool = False) -> "Demonstrations":
        """The ids lie in a file in `folder` (rlhf/data/token_store.py). `all_answers`: earlier ones are trained on too.
        """
        store, prompt_lengths, too_long, left_out = TokenStore(folder), array("i"), 0, 0
        for pairs in chunks(zip(prompts, completions, strict=True)):
            asked = [pair[0] for pair in pairs]
            for number, (prompt, completion) in enumerate(zip(codec.prompts(asked), codec.completions(
                    [pair[1] for pair in pairs]), strict=True)):
                if len(prompt) + len(completion) > max_tokens:
                    too_long += 1
                    continue
                earlier = codec.earlier_answers(asked[number], prompt) if all_answers else []
                left_out += answers_in(asked[number]) - len(earlier) if all_answers else 0
                store.append([prompt + completion, [place for span in earlier for place in span]],
                             len(prompt) + len(completion))
                prompt_lengths.append(len(prompt))
        return cls(Column(store, lambda parts: parts[0]), prompt_lengths, too_long,
                   Column(store, lambda parts: parts[1]) if all_answers else (), left_out)

    @classmethod
    def of_rows(cls, codec: PromptCodec, rows: Iterable[dict[str, Any]], max_tokens: int,
                folder: Path | None = None, all_answers: bool = False) -> "Demonstrations":
        """`encode` of the rows' prompts and completions."""
        one, other = tee(rows)
        return cls.encode(codec, (row["prompt"] for row in one), (row["completion"] for row in other), max_tokens,
                          folder, all_answers)

    def answers(self, index: int) -> list[Span]:
        """Start and end of the answers of a row that are trained on: the completion is the last."""
        places = self.earlier[index] if self.earlier else []
        return [*zip(places[::2], places[1::2], strict=True), (self.prompt_lengths[index], len(self.ids[index]))]

    def tokens(self, indices: Iterable[int]) -> int:
        """The number of tokens that the loss is on."""
        if not self.earlier:
            lengths = lengths_of(self.ids)
            return sum(lengths[index] - self.prompt_lengths[index] for index in indices)
        return sum(end - start for index in indices for start, end in self.answers(index))

    def batch(self, model: PreTrainedModel, indices: list[int], pad_id: int) -> tuple[PackedBatch, Tensor]:
        """Demonstrations as one batch for a model, and the index of the token before each token of the loss."""
        batch = pack(model, [self.ids[index] for index in indices], pad_id)
        spans = [(place, start, end) for place, index in enumerate(indices) for start, end in self.answers(index)]
        return batch, batch.token_indices([start - 1 for _, start, _ in spans],
                                          [end - start for _, start, end in spans], [place for place, *_ in spans])

    def packed(self, indices: list[int], room: int, pad_id: int) -> tuple[PackedBatch, Tensor]:
        """As batch, in rows of at most `room` tokens that several demonstrations share."""
        ids, mask, positions = pack_rows(
            [self.ids[index] for index in indices], [self.answers(index) for index in indices], room, pad_id)
        rows, columns = mask.nonzero(as_tuple=True)  # on the CPU: a GPU's count of them would have to be waited for
        token_indices = rows * ids.shape[1] + columns
        return PackedBatch(ids.to(device()), positions.to(device())), token_indices.to(device())


def sft(params: SftParams, rows: Iterable[dict[str, Any]], base_folder: Path, seed: int, folder: Path,
        corpus: Path | None = None) -> dict[str, float]:
    """Fine-tunes the base model on the train rows and saves it in `folder`/model. Returns metrics.

    `corpus`: pretraining text (JSON Lines with "text"); `params.pretrain_mix` of each step's examples come from it,
    so that what no demonstration speaks of is not unlearned [InstructGPT App. C.3].

    `rows` have prompt, completion and split; they are passed over twice. `sft/valid_loss` and `sft/valid_loss_base`
    are nats per token of the loss on the valid split, after and before. Raises UserError where no row fits.
    """
    layout = Layout.of(params, "sft", generator(seed, "sft", "lora"))
    seed_everything(seed)
    codec = load_codec(base_folder)
    tokenizer = codec.tokenizer
    train, valid = (Demonstrations.of_rows(codec, of_split(rows, split), params.max_tokens, folder,
                                           params.train_on == "all_answers")
                    for split in ("train", "valid"))
    if not train.ids or not valid.ids:
        raise UserError(f"data/sft.jsonl: no row of at most sft.max_tokens = {params.max_tokens} tokens in a split")
    if left_out := train.left_out + valid.left_out:
        log.warning("sft.train_on = all_answers: %d earlier answers are read only, since the chat template gives them "
                    "another form or end than an answer of its own", left_out)
    model = load_policy(base_folder, layout)
    check_length(model, params.max_tokens, "sft.max_tokens")
    if params.packing:
        with autocast(params.precision):
            distributed.compute(check_packing, model, 0.05 if in_bf16(params.precision) else 1e-3)
    corpus_rows = None
    if corpus and params.pretrain_mix:
        corpus_rows = read_corpus(corpus, tokenizer, context_of(model), folder, params.pretrain_row_tokens)
    mixed_rows = max(1, round(params.batch_size * params.pretrain_mix / (1 - params.pretrain_mix)))
    loss_base = valid_loss(model, valid, params, codec.pad_id)
    set_dropout(model, params.dropout)
    distributed.check_divides(params.batch_size, "sft.batch_size")
    prepare_training(model, params)
    lengths = lengths_of(train.ids)
    batches = shuffled_batches if params.packing else length_batches
    epochs = ShuffledEpochs(lambda epoch: batches(lengths, params.batch_size, generator(seed, "sft", epoch),
                                                  multiple=distributed.shares()))

    def loss_of_step(step: int) -> Iterator[Part]:
        batch = epochs[step]
        tokens = train.tokens(batch)
        share = 1.0 if corpus_rows is None else 1 - params.pretrain_mix
        for chosen, counts in shares(model, batch, lengths, params.micro_batch_size, params.micro_batch_tokens):
            packed = (train.packed(chosen, params.max_tokens, codec.pad_id) if params.packing else
                      train.batch(model, chosen, codec.pad_id))
            loss = batch_loss(model, *packed, params.precision, tokens) * counts
            yield share * loss, {"sft/completion_loss": loss.detach(), "sft/pretrain_loss": 0.0}
        if corpus_rows is not None:
            rows = corpus_batch(corpus_rows, mixed_rows, step, seed)
            for other in corpus_losses(model, rows, params.precision, params.micro_batch_size,
                                       params.micro_batch_tokens):
                yield params.pretrain_mix * other, {"sft/completion_loss": 0.0, "sft/pretrain_loss": other.detach()}

    steps = epochs.per_epoch * params.epochs
    ends = frozenset(range(epochs.per_epoch, steps + 1, epochs.per_epoch))
    last_step = train_loop("sft", folder, model, [adamw(model, params.lr)], steps=steps, loss_of_step=loss_of_step,
                           columns=["sft/completion_loss", "sft/pretrain_loss"],
                           validation=validation_after(ends, model, valid, params, codec, seed))
    set_dropout(model, 0.0)
    model.eval()
    save_model(model, tokenizer, folder / "model")
    return {"sft/valid_loss": valid_loss(model, valid, params, codec.pad_id), "sft/valid_loss_base": loss_base,
            "sft/epoch_kept": last_step // epochs.per_epoch, "sft/train_rows": len(train.ids),
            "sft/valid_rows": len(valid.ids),
            "sft/too_long": train.too_long + valid.too_long}


def validation_after(ends: frozenset[int], model: PreTrainedModel, valid: Demonstrations, params: SftParams,
                     codec: PromptCodec, seed: int) -> Validation:
    """The loss on the valid split after each epoch (its last step is in `ends`), and where the weights are chosen by it
    the reward model's score of samples [InstructGPT App. C.1]."""
    def measure() -> dict[str, float]:
        measured = {"sft/valid_loss": valid_loss(model, valid, params, codec.pad_id)}
        if params.checkpoint == "rm_score":
            measured["sft/valid_rm_score"] = rm_score(model, valid, params, codec, seed)
        return measured

    if params.checkpoint == "rm_score":
        return Validation(ends, ["sft/valid_loss", "sft/valid_rm_score"], measure,
                          lambda measured: measured["sft/valid_rm_score"])
    return Validation(ends, ["sft/valid_loss"], measure,
                      (lambda measured: -measured["sft/valid_loss"]) if params.checkpoint == "valid_loss" else None)


def batch_loss(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor, precision: str, tokens: float = 0
               ) -> Tensor:
    """Mean loss over the tokens of a batch that follow `token_indices`, nats; with `tokens`, the sum divided by that
    many."""
    return -log_probs_at(model, batch, token_indices, precision).sum() / (tokens or len(token_indices))


@torch.no_grad()
def valid_loss(model: PreTrainedModel, data: Demonstrations, params: SftParams, pad_id: int) -> float:
    """Mean loss over all tokens of a dataset that the loss is on, nats per token."""
    sums = {"loss": 0.0, "tokens": 0.0}
    for indices in distributed.share_passes(model, pass_batches(lengths_of(data.ids), 256)):
        batch, token_indices = data.batch(model, indices, pad_id)
        sums["loss"] += batch_loss(model, batch, token_indices, params.precision, tokens=1).item()
        sums["tokens"] += len(token_indices)
    sums = distributed.all_reduce(sums)
    return sums["loss"] / sums["tokens"]


def rm_score(model: PreTrainedModel, valid: Demonstrations, params: SftParams, codec: PromptCodec, seed: int) -> float:
    """Mean score that the reward model gives to a sample for each of the first valid prompts [InstructGPT App. C.1]."""
    first = islice(zip(valid.ids, valid.prompt_lengths, strict=True), SCORED_PROMPTS)
    prompts = [ids[:length] for ids, length in first]
    room = max(1, params.max_tokens - max(map(len, prompts)))
    sampling = Sampling(room, codec.stop_ids, codec.pad_id, precision=params.precision)
    responses = sample_responses(model, prompts, sampling, generator(seed, "sft", "choice"))
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    scores = score_sequences(load_scorer(params.reward_model), sequences, codec.pad_id, params.precision)
    return sum(scores) / len(scores)
