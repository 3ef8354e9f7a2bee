"""The reward model: the policy's backbone, one linear head read at the last token, a K-way ranking loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import length_batches, pad_right
from rlhf.errors import UserError
from rlhf.losses import ranking_accuracy, ranking_loss
from rlhf.models import adamw, autocast, device, new_scorer, save_model, scores_at, shift_scores
from rlhf.params import RmParams
from rlhf.seeding import generator, seed_everything
from rlhf.tokenizer import PromptCodec, load_tokenizer
from rlhf.training import train_loop

SCORE_BATCH = 512


@dataclass(frozen=True)
class Rankings:
    """Tokenized completions of ranked prompts: ids[prompt][k], ranks[prompt][k]."""

    ids: list[list[list[int]]]
    ranks: list[list[int]]
    too_long: int

    @classmethod
    def encode(cls, codec: PromptCodec, rows: Sequence[dict[str, Any]], max_tokens: int) -> "Rankings":
        """Rows with a completion over the limit are left out whole and counted."""
        prompts = codec.prompts([row["prompt"] for row in rows])
        flat = codec.completions([text for row in rows for text in row["completions"]])
        ids, ranks, place = [], [], 0
        for row, prompt in zip(rows, prompts, strict=True):
            count = len(row["completions"])
            sequences = [prompt + completion for completion in flat[place:place + count]]
            place += count
            if max(map(len, sequences)) <= max_tokens:
                ids.append(sequences)
                ranks.append(list(row["ranks"]))
        return cls(ids, ranks, len(rows) - len(ids))

    def lengths(self) -> list[int]:
        return [max(map(len, group)) for group in self.ids]

    def batch_ranks(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ranks [B, Kmax], present [B, Kmax]) of the prompts of a batch."""
        groups = [self.ranks[index] for index in indices]
        widest = max(map(len, groups))
        ranks = torch.tensor([[*group, *[0] * (widest - len(group))] for group in groups])
        present = torch.tensor([[True] * len(group) + [False] * (widest - len(group)) for group in groups])
        return ranks.to(device()), present.to(device())


def round_shape(ids: Tensor, pad_id: int) -> Tensor:
    """Fills up with PADs to multiples of 16 rows and 8 columns.

    Prompts differ in K and length, so nearly every batch would have a shape of its own, and the CPU backend keeps
    buffers for each: memory grew to 5.4 GB.
    """
    return F.pad(ids, (0, -ids.shape[1] % 8, 0, -ids.shape[0] % 16), value=pad_id)


def score_groups(model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], pad_id: int,
                 precision: str) -> Tensor:
    """Scores of K sequences per prompt, one forward pass per completion: [prompts, Kmax], 0 where absent."""
    flat = [sequence for group in groups for sequence in group]
    ids, last = round_shape(pad_right(flat, pad_id), pad_id), torch.tensor([len(sequence) - 1 for sequence in flat])
    with autocast(precision):
        scores = scores_at(model, ids.to(device()), F.pad(last, (0, len(ids) - len(last))).to(device()))[: len(flat)]
    widest = max(map(len, groups))
    rows = torch.tensor([row for row, group in enumerate(groups) for _ in group]).to(device())
    columns = torch.tensor([column for group in groups for column in range(len(group))]).to(device())
    grid = torch.zeros(len(groups), widest, device=scores.device)
    return grid.index_put((rows, columns), scores)


@torch.no_grad()
def score_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                    precision: str) -> list[float]:
    """Score of each sequence at its last token, in the order given."""
    scores = [0.0] * len(sequences)
    for indices in length_batches([len(item) for item in sequences], SCORE_BATCH, None):
        found = score_groups(model, [[sequences[index]] for index in indices], pad_id, precision)
        for index, value in zip(indices, found[:, 0].tolist(), strict=True):
            scores[index] = value
    return scores


def train_reward_model(params: RmParams, rows: list[dict[str, Any]], demonstrations: list[dict[str, str]],
                       policy_folder: Path, seed: int, folder: Path) -> tuple[PreTrainedModel, dict[str, float]]:
    """Trains on the train rows and saves the model in `folder`/model. Returns (model, metrics).

    `rows` have prompt, completions, ranks, split, labeler_id. After training the scores are shifted so that
    labeler demonstrations score mean 0 [InstructGPT]. `rm/accuracy`: share of the valid pairs with a preference
    that are ordered like the labeler's ranking; `rm/accuracy_heldout_labelers`: those whose labeler ranked no
    training row.
    """
    seed_everything(seed)
    tokenizer = load_tokenizer(policy_folder)
    codec = PromptCodec(tokenizer)
    train_rows = sample_rows([row for row in rows if row["split"] == "train"], params.max_prompts, seed)
    data = Rankings.encode(codec, train_rows, params.max_tokens)
    if not data.ids:
        raise UserError(f"data/rm.jsonl: no train row of at most rm.max_tokens = {params.max_tokens} tokens")
    model = new_scorer(policy_folder, codec.pad_id, generator(seed, "rm", "head"))
    model.train()
    lengths = data.lengths()
    per_epoch = len(length_batches(lengths, params.batch_size, generator(seed, "rm", 0)))
    epochs: dict[int, list[list[int]]] = {}

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = length_batches(lengths, params.batch_size, generator(seed, "rm", epoch))
        indices = epochs[epoch][place]
        scores = score_groups(model, [data.ids[index] for index in indices], codec.pad_id, params.precision)
        ranks, present = data.batch_ranks(indices)
        right, pairs = ranking_accuracy(scores.detach(), ranks, present)
        return ranking_loss(scores, ranks, present), {"rm/accuracy": right / max(1, pairs)}

    train_loop("rm", folder, model, [adamw(model, params.lr)], steps=per_epoch * params.epochs,
               loss_of_step=loss_of_step, columns=["rm/accuracy"])
    model.eval()
    mean = demonstration_mean(model, codec, demonstrations, params)
    shift_scores(model, -mean)
    save_model(model, tokenizer, folder / "model")
    return model, {"rm/train_prompts": len(data.ids), "rm/too_long": data.too_long, "rm/demonstration_shift": -mean}


def sample_rows(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows drawn without replacement (0: all), in their order."""
    if count == 0 or count >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=generator(seed, "rm", "sample"))[:count].tolist()
    return [rows[index] for index in sorted(chosen)]


def demonstration_mean(model: PreTrainedModel, codec: PromptCodec, demonstrations: list[dict[str, str]],
                       params: RmParams) -> float:
    """Mean score of labelers' demonstrations."""
    prompts = codec.prompts([row["prompt"] for row in demonstrations])
    completions = codec.completions([row["completion"] for row in demonstrations])
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)
                 if len(prompt) + len(completion) <= params.max_tokens]
    if not sequences:
        raise UserError(f"data/sft.jsonl: no valid labeler row of at most rm.max_tokens = {params.max_tokens} tokens, "
                        "and the reward model's scores are shifted by those")
    scores = score_sequences(model, sequences, codec.pad_id, params.precision)
    return sum(scores) / len(scores)


@torch.no_grad()
def pairwise_accuracy(model: PreTrainedModel, data: Rankings, pad_id: int, precision: str) -> tuple[int, int]:
    """(pairs ordered as ranked, pairs with a preference) over a set of rankings."""
    right = pairs = 0
    for indices in length_batches(data.lengths(), SCORE_BATCH // 8, None):
        scores = score_groups(model, [data.ids[index] for index in indices], pad_id, precision)
        ranks, present = data.batch_ranks(indices)
        good, all_pairs = ranking_accuracy(scores, ranks, present)
        right, pairs = right + good, pairs + all_pairs
    return right, pairs


def measure_accuracy(model: PreTrainedModel, codec: PromptCodec, rows: list[dict[str, Any]],
                     params: RmParams) -> float:
    """Share of pairs with a preference that the model orders like the ranks; NaN-free: 0 where there is none."""
    data = Rankings.encode(codec, rows, params.max_tokens)
    if not data.ids:
        return 0.0
    right, pairs = pairwise_accuracy(model, data, codec.pad_id, params.precision)
    return right / max(1, pairs)
