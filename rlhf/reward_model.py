"""The reward model: the policy's backbone, one linear head read at the last token, a K-way ranking loss."""

import itertools
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import ShuffledEpochs, length_batches
from rlhf.data.prompts import Prompt, prompt_key
from rlhf.data.rows import Drawn, of_split
from rlhf.data.token_store import Column, TokenStore, chunks, lengths_of, only
from rlhf.errors import UserError
from rlhf.losses import best_of_loss, ranking_accuracy, ranking_loss
from rlhf.model.adapter_folder import ADAPTER, save_adapter
from rlhf.model.chat_format import PromptCodec, load_codec
from rlhf.model.device import device
from rlhf.model.layout import Layout
from rlhf.model.load import (
    check_length,
    load_policy,
    new_scorer,
    prepare_training,
    save_model,
    scale_scores,
    shift_scores,
)
from rlhf.model.lora import adapter_of
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.scoring import score_groups, score_together
from rlhf.params import RmParams
from rlhf.training import distributed
from rlhf.training.loop import Part, Validation, evenly, train_loop
from rlhf.training.micro_batches import shares
from rlhf.training.optim import adamw
from rlhf.training.seeding import generator, seed_everything

CURVE_ROWS = 500  # valid rankings that accuracy and loss are measured on while training


@dataclass(frozen=True)
class Rankings:
    """Tokenized completions of rankings: ids[ranking][k], ranks[ranking][k]. `prompts`: a number for each ranking, the
    same for those of one prompt; None: each has a prompt of its own."""

    ids: Sequence[list[list[int]]]
    ranks: Sequence[list[int]]
    too_long: int
    prompts: Sequence[int] | None = None

    @classmethod
    def encode(cls, codec: PromptCodec, rows: Iterable[dict[str, Any]], max_tokens: int,
               folder: Path | None = None) -> "Rankings":
        """Rows with a completion over the limit are left out whole and counted. The ids lie in a file in `folder`."""
        store, too_long, prompts = TokenStore(folder), 0, array("q")
        for row, prompt, completions in encoded(codec, rows):
            longest = len(prompt) + max(map(len, completions))
            if longest <= max_tokens:
                store.append([row["ranks"], prompt, *completions], longest)
                prompts.append(prompt_hash(row))
            else:
                too_long += 1
        return cls(Column(store, lambda parts: [parts[1] + completion for completion in parts[2:]]),
                   Column(store, only), too_long, prompts)

    def lengths(self) -> Sequence[int]:
        """Length of each prompt's longest sequence."""
        if isinstance(self.ids, Column):
            return lengths_of(self.ids)
        return [max(map(len, group)) for group in self.ids]

    def batch_ranks(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ranks [B, Kmax], present [B, Kmax]) of the prompts of a batch."""
        groups = [self.ranks[index] for index in indices]
        widest = max(map(len, groups))
        ranks = torch.tensor([[*group, *[0] * (widest - len(group))] for group in groups])
        present = torch.tensor([[True] * len(group) + [False] * (widest - len(group)) for group in groups])
        return ranks.to(device()), present.to(device())


def prompt_hash(row: Mapping[str, Any]) -> int:
    """64 bits that tell prompts apart within this process."""
    return hash(prompt_key(row["prompt"]))


def encoded(codec: PromptCodec, rows: Iterable[dict[str, Any]]
            ) -> Iterator[tuple[dict[str, Any], list[int], list[list[int]]]]:
    """(row, ids of its prompt, ids of its completions) of one row after the other."""
    for some in chunks(rows):
        flat = iter(codec.completions([text for row in some for text in row["completions"]]))
        for row, prompt in zip(some, codec.prompts([row["prompt"] for row in some]), strict=True):
            yield row, prompt, [next(flat) for _ in row["completions"]]












def train_reward_model(params: RmParams, rows: Iterable[dict[str, Any]], demonstrations: Iterable[dict[str, Any]],
                       policy_folder: Path, seed: int, folder: Path) -> tuple[PreTrainedModel, dict[str, float]]:
    """Trains on the train rows and saves the model in `folder`/model. Returns (model, metrics).

    `rows` have prompt, completions, ranks, split, labeler_id, and are passed over several times. `params.loss` says
    what is learned of a ranking, and `params.normalise` where the zero of the scores is: `demonstrations` (labelers'
    ones, prompt and completion) score mean 0 [InstructGPT], or samples of the policy score mean 0 and deviation 1
    [Ziegler]. Raises UserError where no row fits or nothing can be normalised by, before anything is trained.
    """
    layout = Layout.of(params, "rm", generator(seed, "rm", "lora"))
    seed_everything(seed)
    codec = load_codec(policy_folder)
    tokenizer = codec.tokenizer
    train_rows = sample_rows(of_split(rows, "train"), params.max_prompts, seed)
    valid_rows = sample_rows(of_split(rows, "valid"), params.max_valid_prompts, seed)
    if params.loss == "best_of":
        train_rows = best_of_groups(train_rows, params.best_of_n, seed)
    data = Rankings.encode(codec, train_rows, params.max_tokens, folder)
    if not data.ids:
        raise UserError(f"data/rm.jsonl: no train row of at most rm.max_tokens = {params.max_tokens} tokens")
    anchors = demonstration_ids(codec, demonstrations, params, folder)
    model = new_scorer(policy_folder, codec.pad_id, generator(seed, "rm", "head"), layout)
    check_length(model, params.max_tokens, "rm.max_tokens")
    distributed.check_divides(params.batch_size, "rm.batch_size")
    prepare_training(model, params)
    lengths = data.lengths()
    tokens = [len(ranks) * length for ranks, length in zip(data.ranks, lengths, strict=True)
              ] if params.micro_batch_tokens else lengths
    # All comparisons of a prompt in one step: apart from each other, a pass over them overfits [InstructGPT §3.5]. The
    # choices that best_of draws from one ranking are apart, as in [Ziegler].
    together = data.prompts if params.loss == "ranking" else None
    epochs = ShuffledEpochs(lambda epoch: length_batches(lengths, params.batch_size, generator(seed, "rm", epoch),
                                                         together, distributed.shares()))
    loss_of = {"ranking": ranking_loss, "best_of": best_of_loss}[params.loss]

    def loss_of_step(step: int) -> Iterator[Part]:
        batch = epochs[step]
        pairs = sum(decided_pairs(data.ranks[index]) for index in batch)
        for indices, counts in shares(model, batch, tokens, params.micro_batch_size, params.micro_batch_tokens):
            scores = score_groups(model, [data.ids[index] for index in indices], codec.pad_id, params.precision)
            ranks, present = data.batch_ranks(indices)
            right, _ = ranking_accuracy(scores.detach(), ranks, present)
            yield (loss_of(scores, ranks, present) * (counts * len(indices) / len(batch)),
                   {"rm/train_accuracy": counts * right / max(1, pairs)})

    steps = epochs.per_epoch * params.epochs
    checks, valid = evenly(steps, params.checks), of_split(rows, "valid")
    validation = validation_at(checks, model, codec, valid, params, seed, folder)
    last_step = train_loop("rm", folder, model, [adamw(model, params.lr)], steps=steps, loss_of_step=loss_of_step,
                           columns=["rm/train_accuracy"], validation=validation)
    model.eval()
    samples = anchors
    if params.normalise == "gain_and_bias":
        prompts = [row["prompt"] for row in itertools.islice(valid_rows, params.normalise_samples)]
        samples = reference_samples(policy_folder, codec, prompts, params, seed)
    gain, bias = normalise(model, samples, codec.pad_id, params)
    save_model(model, tokenizer, folder / "model")
    if adapter := adapter_of(model):
        save_adapter(model, adapter, policy_folder, folder / "model" / ADAPTER)
    return model, {"rm/train_prompts": len(data.ids), "rm/too_long": data.too_long, "rm/gain": gain, "rm/bias": bias,
                   "rm/steps_kept": last_step}


def validation_at(steps: frozenset[int], model: PreTrainedModel, codec: PromptCodec, valid: Iterable[dict[str, Any]],
                  params: RmParams, seed: int, folder: Path) -> Validation:
    """Accuracy, and where training has it the ranking loss, on CURVE_ROWS of the valid rankings; on all of
    `params.max_valid_prompts` where the accuracy chooses the weights."""
    chooses, count = params.checkpoint == "valid_accuracy", params.max_valid_prompts
    rows = sample_rows(valid, count if chooses else min(CURVE_ROWS, count or CURVE_ROWS), seed)

    def measure() -> dict[str, float]:
        scored = score_rows(model, codec, rows, params, folder)
        measured = {"rm/valid_accuracy": accuracy(scored), "rm/valid_loss": mean_ranking_loss(scored)}
        return {name: measured[name] for name in columns}

    columns = ["rm/valid_accuracy", *(["rm/valid_loss"] if params.loss == "ranking" else [])]
    return Validation(steps, columns, measure, (lambda measured: measured["rm/valid_accuracy"]) if chooses else None)


def normalise(model: PreTrainedModel, samples: Sequence[Sequence[int]], pad_id: int, params: RmParams
              ) -> tuple[float, float]:
    """Shifts the scores so that `samples` score mean 0 [InstructGPT]; with params.normalise gain_and_bias also scales
    them to deviation 1 [Ziegler]. Returns (gain, bias): new score = gain · score + bias."""
    mean, deviation = moments(score_together(model, samples, pad_id, params.precision))
    gain, bias = 1.0, -mean
    if params.normalise == "gain_and_bias":
        gain, bias = 1 / max(deviation, 1e-6), -mean / max(deviation, 1e-6)
        scale_scores(model, gain)
    shift_scores(model, bias)
    return gain, bias


def decided_pairs(ranks: Sequence[int]) -> int:
    """How many pairs of a ranking are no ties."""
    return sum(one != other for one, other in itertools.combinations(ranks, 2))


def best_of_groups(rows: Iterable[dict[str, Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Groups of `count` completions of each row (one of all where it has fewer), the best with rank 1, others 2.

    A row's groups are drawn by the seed and share no completion: 4 of a ranking of 9, twice. Groups whose best is a tie
    are left out: nobody could have chosen one.
    """
    for number, row in enumerate(rows):
        order = torch.randperm(len(row["ranks"]), generator=generator(seed, "rm", "best of", number)).tolist()
        for start in range(0, max(1, len(order) - count + 1), count):
            group = sorted(order[start:start + count])
            ranks = [row["ranks"][index] for index in group]
            if ranks.count(min(ranks)) == 1:
                yield {**row, "completions": [row["completions"][index] for index in group],
                       "ranks": [1 if rank == min(ranks) else 2 for rank in ranks]}


def sample_rows(rows: Iterable[dict[str, Any]], count: int, seed: int) -> Iterable[dict[str, Any]]:
    """`count` rows drawn without replacement (0: all), in their order; every pass over them draws the same."""
    def numbers(total: int) -> list[int]:
        return sorted(torch.randperm(total, generator=generator(seed, "rm", "sample"))[:count].tolist())
    return Drawn(rows, numbers) if count else rows


def demonstration_ids(codec: PromptCodec, demonstrations: Iterable[dict[str, Any]], params: RmParams,
                      folder: Path | None = None) -> Sequence[list[int]]:
    """Prompt and completion of labelers' demonstrations. Raises UserError where they are needed and none fits."""
    if params.normalise != "demonstrations":
        return []
    store = TokenStore(folder)
    for _, prompt, [completion] in encoded(codec, ({"prompt": row["prompt"], "completions": [row["completion"]]}
                                                   for row in demonstrations)):
        if len(prompt) + len(completion) <= params.max_tokens:
            store.append([prompt + completion], len(prompt) + len(completion))
    if not len(store):
        raise UserError(f"data/sft.jsonl: no valid row of at most rm.max_tokens = {params.max_tokens} tokens, and the "
                        "reward model's scores are shifted by those; or set rm.normalise to gain_and_bias")
    return Column(store, only)


def reference_samples(policy_folder: Path, codec: PromptCodec, prompts: list[Prompt], params: RmParams, seed: int
                      ) -> list[list[int]]:
    """A sample of the policy for each of the first valid prompts, prompt and response."""
    encoded = [ids for ids in codec.prompts(prompts[:params.normalise_samples]) if len(ids) < params.max_tokens]
    if not encoded:
        raise UserError(f"data/rm.jsonl: no valid prompt of fewer than rm.max_tokens = {params.max_tokens} tokens")
    room = max(1, params.max_tokens - max(map(len, encoded)))
    sampling = Sampling(room, codec.stop_ids, codec.pad_id, precision=params.precision)
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


@dataclass(frozen=True)
class ScoredRows(Iterable[Scored]):
    """The rows that fit with their scores; the rows themselves are passed over again each time, not held."""

    rows: Iterable[dict[str, Any]]
    fits: Sequence[int]
    scores: Sequence[float]

    def __iter__(self) -> Iterator[Scored]:
        scores = iter(self.scores)
        for row, fits in zip(self.rows, self.fits, strict=True):
            if fits:
                yield Scored(row, [next(scores) for _ in row["completions"]])


def score_rows(model: PreTrainedModel, codec: PromptCodec, rows: Iterable[dict[str, Any]], params: RmParams,
               folder: Path | None = None) -> ScoredRows:
    """Scores every completion of the rows that fit. The ids lie in a file in `folder` meanwhile."""
    store, fits = TokenStore(folder), bytearray()
    for _, prompt, completions in encoded(codec, rows):
        fits.append(len(prompt) + max(map(len, completions)) <= params.max_tokens)
        if fits[-1]:
            for completion in completions:
                store.append([prompt + completion], len(prompt) + len(completion))
    return ScoredRows(rows, fits, score_together(model, Column(store, only), codec.pad_id, params.precision))


def accuracy(scored: Iterable[Scored]) -> float:
    """Share of the pairs with a preference that the model orders like the ranking; 0 where there is none."""
    agreed = pairs = 0
    for item in scored:
        for _, agrees in item.pairs():
            agreed, pairs = agreed + agrees, pairs + 1
    return agreed / max(1, pairs)


def mean_ranking_loss(scored: Iterable[Scored]) -> float:
    """The ranking loss of prompts as in training [InstructGPT eq. 1], nats; 0 without prompts."""
    losses = [ranking_loss(torch.tensor([item.scores], dtype=torch.float64), torch.tensor([item.row["ranks"]]),
                           torch.ones(1, len(item.scores), dtype=torch.bool)).item() for item in scored]
    return sum(losses) / max(1, len(losses))


def contradicted_pairs(scored: Iterable[Scored]) -> float:
    """Share of the decided pairs, over all rows, that no model can order as their rankings do: of two completions of a
    prompt it scores one higher, so of the rankings that contradict each other on them the fewer are wrong.

    A lower bound: preferences that go in a circle cost further pairs. `scored` is passed over twice.
    """
    several = Counter(prompt_hash(item.row) for item in scored)
    pairs = lost = 0
    votes: dict[tuple[int, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in (item.row for item in scored):
        pairs += decided_pairs(row["ranks"])
        ranked = list(zip(row["completions"], row["ranks"], strict=True))
        if several[prompt_hash(row)] == 1 and len(set(row["completions"])) == len(ranked):
            continue
        for (one, rank), (other, other_rank) in itertools.combinations(sorted(ranked), 2):
            if rank != other_rank and one == other:
                lost += 1
            elif rank != other_rank:
                votes[prompt_hash(row), one, other][rank < other_rank] += 1
    return (lost + sum(map(min, votes.values()))) / max(1, pairs)


def calibration(scored: Iterable[Scored], bins: int = 10) -> list[dict[str, float]]:
    """Predicted probability of the preferred completion of a pair, sigmoid(|margin|), against how often the labeler
    agrees: a row a bin of [0.5, 1] that holds pairs; low, predicted, observed, pairs."""
    predicted, observed, pairs = [0.0] * bins, [0] * bins, [0] * bins
    for item in scored:
        for margin, agrees in item.pairs():
            probability = 1 / (1 + math.exp(-margin))
            number = min(bins - 1, int((probability - 0.5) * 2 * bins))
            predicted[number] += probability
            observed[number] += agrees
            pairs[number] += 1
    return [{"low": 0.5 + number / (2 * bins), "predicted": predicted[number] / pairs[number],
             "observed": observed[number] / pairs[number], "pairs": pairs[number]}
            for number in range(bins) if pairs[number]]


def calibration_error(curve: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: mean distance of predicted and observed, weighted by pairs."""
    total = sum(row["pairs"] for row in curve)
    return sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in curve) / max(1.0, total)
