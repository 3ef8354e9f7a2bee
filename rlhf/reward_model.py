"""The reward model: the policy's backbone, one linear head read at the last token, a K-way ranking loss."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.data.batching import length_batches, pad_right, pass_batches
from rlhf.errors import UserError
from rlhf.losses import best_of_loss, ranking_accuracy, ranking_loss
from rlhf.models import (
    adamw,
    autocast,
    check_length,
    compile_passes,
    device,
    load_policy,
    new_scorer,
    save_memory,
    save_model,
    scale_scores,
    scores_at,
    shift_scores,
)
from rlhf.params import RmParams
from rlhf.rollout import Sampling, sample_responses
from rlhf.seeding import generator, seed_everything
from rlhf.tokenizer import PromptCodec, load_tokenizer
from rlhf.training import Choice, train_loop

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
    """Scores of K sequences per prompt: [prompts, Kmax], 0 where absent.

    What the sequences of a group begin with, their prompt, is read once for all of them, where the model keeps keys and
    values; a completion is read once in any case.
    """
    if min(map(len, groups)) > 1 and keeps_keys(model):
        scores = _scores_after_prefixes(model, groups, pad_id, precision)
    else:
        flat = [sequence for group in groups for sequence in group]
        ids, last = round_shape(pad_right(flat, pad_id), pad_id), torch.tensor([len(sequence) - 1 for sequence in flat])
        last = F.pad(last, (0, len(ids) - len(last)))
        with autocast(precision):
            scores = scores_at(model, ids.to(device()), last.to(device()))[: len(flat)]
    widest = max(map(len, groups))
    rows = torch.tensor([row for row, group in enumerate(groups) for _ in group]).to(device())
    columns = torch.tensor([column for group in groups for column in range(len(group))]).to(device())
    grid = torch.zeros(len(groups), widest, device=scores.device)
    return grid.index_put((rows, columns), scores)


def keeps_keys(model: PreTrainedModel) -> bool:
    """Whether a pass can hand its keys and values to the next one: not where activations are recomputed or compiled."""
    recomputes = model.training and getattr(model, "is_activation_checkpointing", model.is_gradient_checkpointing)
    return not recomputes and getattr(model.base_model, "_compiled_call_impl", None) is None


def _scores_after_prefixes(model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], pad_id: int,
                           precision: str) -> Tensor:
    """Scores of all sequences, group after group: a pass over what each group shares, one over what is left."""
    shared = [min(shared_length(group), min(map(len, group)) - 1) for group in groups]
    before = pad_right([group[0][:length] for group, length in zip(groups, shared, strict=True)], pad_id)
    before = F.pad(before, (0, -before.shape[1] % 8 if before.shape[1] else 8), value=pad_id).to(device())
    rest = [sequence[length:] for group, length in zip(groups, shared, strict=True) for sequence in group]
    ids = round_shape(pad_right(rest, pad_id), pad_id).to(device())
    owner = torch.tensor([row for row, group in enumerate(groups) for _ in group])
    owner = F.pad(owner, (0, len(ids) - len(owner))).to(device())
    last = torch.tensor([len(item) - 1 for item in rest], device=device())
    lengths = torch.tensor(shared, device=device())[owner].unsqueeze(1)
    seen = torch.arange(before.shape[1], device=device()) < lengths
    cache = DynamicCache(config=model.config)
    with autocast(precision):
        model.base_model(input_ids=before, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
        hidden = model.base_model(input_ids=ids, attention_mask=torch.cat([seen.long(), torch.ones_like(ids)], dim=1),
                                  position_ids=lengths + torch.arange(ids.shape[1], device=device()),
                                  past_key_values=cache, use_cache=True).last_hidden_state
        return model.score(hidden[torch.arange(len(rest), device=device()), last]).squeeze(-1).float()


def shared_length(group: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(group, key=tuple), max(group, key=tuple)  # what these two share, those between share too
    return next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other),
                min(len(first), len(last)))


@torch.no_grad()
def score_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                    precision: str) -> list[float]:
    """Score of each sequence at its last token, in the order given."""
    scores = [0.0] * len(sequences)
    for indices in pass_batches([len(item) for item in sequences], SCORE_BATCH):
        found = score_groups(model, [[sequences[index]] for index in indices], pad_id, precision)
        for index, value in zip(indices, found[:, 0].tolist(), strict=True):
            scores[index] = value
    return scores


def train_reward_model(params: RmParams, rows: list[dict[str, Any]], demonstrations: list[dict[str, str]],
                       policy_folder: Path, seed: int, folder: Path) -> tuple[PreTrainedModel, dict[str, float]]:
    """Trains on the train rows and saves the model in `folder`/model. Returns (model, metrics).

    `rows` have prompt, completions, ranks, split, labeler_id. `params.loss` says what is learned of a ranking, and
    `params.normalise` where the zero of the scores is: `demonstrations` (labelers' ones, prompt and completion) score
    mean 0 [InstructGPT], or samples of the policy score mean 0 and deviation 1 [Ziegler]. Raises UserError where no row
    fits or nothing can be normalised by, before anything is trained.
    """
    seed_everything(seed)
    tokenizer = load_tokenizer(policy_folder)
    codec = PromptCodec(tokenizer)
    train_rows = sample_rows([row for row in rows if row["split"] == "train"], params.max_prompts, seed)
    valid_rows = sample_rows([row for row in rows if row["split"] == "valid"], params.max_valid_prompts, seed)
    if params.loss == "best_of":
        train_rows = best_of_rows(train_rows, params.best_of_n, seed)
    data = Rankings.encode(codec, train_rows, params.max_tokens)
    if not data.ids:
        raise UserError(f"data/rm.jsonl: no train row of at most rm.max_tokens = {params.max_tokens} tokens")
    anchors = demonstration_ids(codec, demonstrations, params)
    model = new_scorer(policy_folder, codec.pad_id, generator(seed, "rm", "head"))
    check_length(model, params.max_tokens, "rm.max_tokens")
    save_memory(model, params.gradient_checkpointing)
    compile_passes(model, params.compile)
    model.train()
    lengths = data.lengths()
    per_epoch = len(length_batches(lengths, params.batch_size, generator(seed, "rm", 0)))
    epochs: dict[int, list[list[int]]] = {}
    loss_of = {"ranking": ranking_loss, "best_of": best_of_loss}[params.loss]

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = length_batches(lengths, params.batch_size, generator(seed, "rm", epoch))
        indices = epochs[epoch][place]
        scores = score_groups(model, [data.ids[index] for index in indices], codec.pad_id, params.precision)
        ranks, present = data.batch_ranks(indices)
        right, pairs = ranking_accuracy(scores.detach(), ranks, present)
        return loss_of(scores, ranks, present), {"rm/accuracy": right / max(1, pairs)}

    steps = per_epoch * params.epochs
    choice = None
    if params.checkpoint == "valid_accuracy":
        choice = Choice(frozenset(max(1, steps * (number + 1) // params.checks) for number in range(params.checks)),
                        lambda: accuracy(score_rows(model, codec, valid_rows, params)))
    kept = train_loop("rm", folder, model, [adamw(model, params.lr)], steps=steps, loss_of_step=loss_of_step,
                      columns=["rm/accuracy"], choice=choice)
    model.eval()
    gain, bias = 1.0, 0.0
    if params.normalise == "gain_and_bias":
        samples = reference_samples(policy_folder, codec, [row["prompt"] for row in valid_rows], params, seed)
        mean, deviation = moments(score_sequences(model, samples, codec.pad_id, params.precision))
        gain, bias = 1 / max(deviation, 1e-6), -mean / max(deviation, 1e-6)
        scale_scores(model, gain)
    else:
        bias = -moments(score_sequences(model, anchors, codec.pad_id, params.precision))[0]
    shift_scores(model, bias)
    save_model(model, tokenizer, folder / "model")
    return model, {"rm/train_prompts": len(data.ids), "rm/too_long": data.too_long, "rm/gain": gain, "rm/bias": bias,
                   "rm/steps_kept": kept}


def best_of_rows(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Groups of `count` completions of each row (one of all where it has fewer), the best with rank 1, others 2.

    A row's groups are drawn by the seed and share no completion: 4 of a ranking of 9, twice. Groups whose best is a tie
    are left out: nobody could have chosen one.
    """
    found = []
    for number, row in enumerate(rows):
        order = torch.randperm(len(row["ranks"]), generator=generator(seed, "rm", "best of", number)).tolist()
        for start in range(0, max(1, len(order) - count + 1), count):
            group = sorted(order[start:start + count])
            ranks = [row["ranks"][index] for index in group]
            if ranks.count(min(ranks)) == 1:
                found.append({**row, "completions": [row["completions"][index] for index in group],
                              "ranks": [1 if rank == min(ranks) else 2 for rank in ranks]})
    return found


def sample_rows(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows drawn without replacement (0: all), in their order."""
    if count == 0 or count >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=generator(seed, "rm", "sample"))[:count].tolist()
    return [rows[index] for index in sorted(chosen)]


def demonstration_ids(codec: PromptCodec, demonstrations: list[dict[str, str]], params: RmParams) -> list[list[int]]:
    """Prompt and completion of labelers' demonstrations. Raises UserError where they are needed and none fits."""
    if params.normalise != "demonstrations":
        return []
    prompts = codec.prompts([row["prompt"] for row in demonstrations])
    completions = codec.completions([row["completion"] for row in demonstrations])
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)
                 if len(prompt) + len(completion) <= params.max_tokens]
    if not sequences:
        raise UserError(f"data/sft.jsonl: no valid row of at most rm.max_tokens = {params.max_tokens} tokens, and the "
                        "reward model's scores are shifted by those; or set rm.normalise to gain_and_bias")
    return sequences


def reference_samples(policy_folder: Path, codec: PromptCodec, prompts: list[str], params: RmParams, seed: int
                      ) -> list[list[int]]:
    """A sample of the policy for each of the first valid prompts, prompt and response."""
    encoded = [ids for ids in codec.prompts(prompts[:params.normalise_samples]) if len(ids) < params.max_tokens]
    if not encoded:
        raise UserError(f"data/rm.jsonl: no valid prompt of fewer than rm.max_tokens = {params.max_tokens} tokens")
    room = max(1, params.max_tokens - max(map(len, encoded)))
    sampling = Sampling(room, (codec.eos_id,), codec.pad_id, precision=params.precision)
    responses = sample_responses(load_policy(policy_folder), encoded, sampling, generator(seed, "rm", "samples"))
    return [prompt + response for prompt, response in zip(encoded, responses, strict=True)]


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and (biased) standard deviation."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


# --- how good it is -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Scored:
    """A ranked prompt and the model's score of each of its completions."""

    row: dict[str, Any]
    scores: list[float]

    def pairs(self) -> list[tuple[float, bool]]:
        """(margin >= 0, whether the ranking agrees) of each pair that the ranking decides; margin 0 disagrees."""
        ranks = self.row["ranks"]
        found = []
        for one, other in itertools.combinations(range(len(ranks)), 2):
            if ranks[one] != ranks[other]:
                margin = self.scores[one] - self.scores[other]
                found.append((abs(margin), margin * (ranks[other] - ranks[one]) > 0))
        return found


def score_rows(model: PreTrainedModel, codec: PromptCodec, rows: list[dict[str, Any]], params: RmParams
               ) -> list[Scored]:
    """Scores every completion of the rows that fit."""
    prompts = codec.prompts([row["prompt"] for row in rows])
    flat = iter(codec.completions([text for row in rows for text in row["completions"]]))
    kept, sequences = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        mine = [prompt + next(flat) for _ in row["completions"]]
        if max(map(len, mine)) <= params.max_tokens:
            kept.append(row)
            sequences += mine
    scores = iter(score_sequences(model, sequences, codec.pad_id, params.precision))
    return [Scored(row, [next(scores) for _ in row["completions"]]) for row in kept]


def accuracy(scored: Sequence[Scored]) -> float:
    """Share of the pairs with a preference that the model orders like the ranking; 0 where there is none."""
    agreed = [agrees for item in scored for _, agrees in item.pairs()]
    return sum(agreed) / max(1, len(agreed))


def calibration(scored: Sequence[Scored], bins: int = 10) -> list[dict[str, float]]:
    """Predicted probability of the preferred completion of a pair, sigmoid(|margin|), against how often the labeler
    agrees: a row a bin of [0.5, 1] that holds pairs; low, predicted, observed, pairs."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for item in scored:
        for margin, agrees in item.pairs():
            predicted = 1 / (1 + math.exp(-margin))
            groups.setdefault(min(bins - 1, int((predicted - 0.5) * 2 * bins)), []).append((predicted, agrees))
    return [{"low": 0.5 + number / (2 * bins), "predicted": sum(p for p, _ in pairs) / len(pairs),
             "observed": sum(agrees for _, agrees in pairs) / len(pairs), "pairs": len(pairs)}
            for number, pairs in sorted(groups.items())]


def calibration_error(curve: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: mean distance of predicted and observed, weighted by pairs."""
    total = sum(row["pairs"] for row in curve)
    return sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in curve) / max(1.0, total)
