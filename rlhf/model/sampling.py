"""Sampling responses from a policy. `finished` is the stop rule.

Four architectures go through rlhf/fast/decoder.py with continuous batching: a finished row leaves the batch and a
waiting prompt takes its place. Others, and all with INSTRUCTFLOW_FAST=off, go through the Hugging Face model in batches
of left-padded prompts, where finished rows only leave.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.data.batching import length_batches, pad_left, pad_right
from rlhf.fast.decoder import Decoder, KVCache, decoder_for
from rlhf.model.device import autocast, device
from rlhf.training import distributed
from rlhf.training.settings import fast_enabled

SHRINK_AT = 0.7  # the batch is cut to its unfinished rows when at most this share of it is left
REFILL_AT = 0.125  # as soon as this share of the rows is free, waiting prompts take them
PREFILL_TOKENS = 16_384  # prompt tokens of one forward pass


@dataclass(frozen=True)
class Sampling:
    """How to sample. `stop_ids`: tokens that end a response (kept as its last); temperature 0 is greedy. `compile`:
    torch.compile the step of a batch, where rlhf/fast/decoder.py knows the architecture."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    precision: str = "fp32"
    batch_size: int = 256
    compile: bool = False


@torch.no_grad()
def sample_responses(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling,
                     noise: torch.Generator, rows: Sequence[int] | None = None) -> list[list[int]]:
    """One response per prompt, as ids up to and including the stop token (or max_new_tokens without one).

    Every token has a uniform number of its own, drawn for (prompt, position) before anything runs: a response
    does not depend on which other prompts share its batch, up to rounding. `rows`: only these prompts' responses, the
    same as if all were sampled.
    """
    uniforms = torch.rand(len(prompts), sampling.max_new_tokens, generator=noise)
    if rows is not None:
        prompts, uniforms = [prompts[row] for row in rows], uniforms[list(rows)]
    decoder = decoder_for(model, sampling.precision, sampling.compile) if fast_enabled() else None
    if decoder is not None:
        def sampled_by(own: list[int]) -> list[list[int]]:
            return _ContinuousBatch(decoder, [prompts[index] for index in own], sampling,
                                    uniforms[own].to(device())).run() if own else []

        return distributed.within_group(sampled_by, len(prompts))
    responses: list[list[int]] = [[] for _ in prompts]
    with distributed.unsharded(model):
        for indices in length_batches([len(item) for item in prompts], sampling.batch_size, None):
            sampled = _sample_batch(model, [prompts[index] for index in indices], sampling, uniforms[indices])
            for index, response in zip(indices, sampled, strict=True):
                responses[index] = response
    return responses


class _ContinuousBatch:
    """The rows of a batch that all prompts pass through, longest first: a finished one makes room for the next."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling,
                 uniforms: Tensor) -> None:
        self.decoder, self.prompts, self.sampling, self.uniforms = decoder, prompts, sampling, uniforms
        count, size = len(prompts), min(sampling.batch_size, len(prompts))
        columns = max(map(len, prompts)) + sampling.max_new_tokens
        self.waiting = sorted(range(count), key=lambda index: (-len(prompts[index]), index))
        self.cache, self.rope = decoder.new_cache(size, columns), decoder.rope(columns)
        self.stops = torch.tensor(sampling.stop_ids, device=uniforms.device)
        self.tokens = self._integers(count, sampling.max_new_tokens)
        self.lengths = self._integers(count)
        self.prompt = self._integers(size) - 1  # index of the prompt in each row; -1: none
        self.drawn = self._integers(size)  # number of tokens of its response so far
        self.last = self._integers(size)  # its newest token
        self.position = self._integers(size)  # position of that token

    def _integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.uniforms.device)

    def run(self) -> list[list[int]]:
        size = len(self.prompt)
        while True:
            free = (self.prompt < 0).nonzero().squeeze(1)
            alive = (self.prompt >= 0).nonzero().squeeze(1)
            if self.waiting and len(free) >= REFILL_AT * size:
                chosen, self.waiting = self.waiting[:len(free)], self.waiting[len(free):]
                self._prefill(chosen, free[:len(chosen)])
            elif len(alive) == 0:
                return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]
            elif not self.waiting and len(alive) < len(self.prompt) and len(alive) <= SHRINK_AT * len(self.prompt):
                self.cache.keep(alive)
                self.prompt, self.drawn, self.last, self.position = (
                    item[alive] for item in (self.prompt, self.drawn, self.last, self.position))
            else:
                self._step(alive)

    def _prefill(self, chosen: list[int], rows: Tensor) -> None:
        """Computes keys and values of prompts in free rows; of equal prompts that follow each other once."""
        firsts = [place for place, index in enumerate(chosen)
                  if place == 0 or self.prompts[index] != self.prompts[chosen[place - 1]]]
        same = torch.tensor([*firsts[1:], len(chosen)]) - torch.tensor(firsts)
        longest = len(self.prompts[chosen[0]])
        at_once = max(1, PREFILL_TOKENS // longest)
        states = []
        for start in range(0, len(firsts), at_once):
            some = firsts[start:start + at_once]
            texts = [self.prompts[chosen[index]] for index in some]
            ids = pad_right(texts, self.sampling.pad_id).to(rows.device)
            positions = torch.arange(ids.shape[1], device=rows.device).expand(ids.shape)
            last = torch.tensor([len(text) - 1 for text in texts], device=rows.device)
            states.append(self._run(prefill, ids, positions, rows[some], last))
        source = torch.repeat_interleave(torch.arange(len(firsts)), same).to(rows.device)
        if len(firsts) < len(chosen):
            self.cache.copy(rows[torch.tensor(firsts, device=rows.device)][source], rows, longest)
        self.prompt[rows] = torch.tensor(chosen, device=rows.device)
        self.position[rows] = torch.tensor([len(self.prompts[index]) - 1 for index in chosen], device=rows.device)
        self.drawn[rows] = 0
        logits = self.decoder.logits(torch.cat(states)[source])
        uniforms = self.uniforms[self.prompt[rows], 0]
        self._take(rows, pick(logits, uniforms, self.sampling.temperature))

    def _step(self, alive: Tensor) -> None:
        """The next token of every row that is not finished."""
        columns = torch.arange(int(self.position[alive].max()) + 1, device=alive.device)
        uniforms = self.uniforms[self.prompt, self.drawn.clamp(max=self.sampling.max_new_tokens - 1)]
        tokens = self._run(next_tokens, self.last, self.position, uniforms, columns, self.sampling.temperature)
        self._take(alive, tokens[alive])

    def _run(self, function: Callable[..., Tensor], *rest: Any) -> Tensor:
        return (compiled(function) if self.sampling.compile else function)(self.decoder, self.cache, self.rope, *rest)

    def _take(self, rows: Tensor, tokens: Tensor) -> None:
        """The tokens that were drawn for some rows."""
        mine, place = self.prompt[rows], self.drawn[rows]
        self.tokens[mine, place] = tokens
        self.lengths[mine] = place + 1
        self.last[rows] = tokens
        self.position[rows] += 1
        self.drawn[rows] += 1
        self.prompt[rows[finished(tokens, place + 1, self.stops, self.sampling.max_new_tokens)]] = -1


def prefill(decoder: Decoder, cache: KVCache, rope: tuple[Tensor, Tensor] | None, ids: Tensor, positions: Tensor,
                 rows: Tensor, last: Tensor) -> Tensor:
    """Puts prompts [n, T] into some rows [n] of the KV cache; returns the states at their last tokens, which stand at
    `last` [n]: [n, d]."""
    return decoder.hidden(ids, positions, cache, rows, rope, None, last)[:, 0]


def next_tokens(decoder: Decoder, cache: KVCache, rope: tuple[Tensor, Tensor] | None, last: Tensor, position: Tensor,
                uniforms: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """The token after `last` at `position` in every row of the KV cache: [n] each -> [n]; meaningless in finished rows.
    `columns`: 0 up to the greatest position."""
    state = decoder.hidden(last.unsqueeze(1), position.unsqueeze(1), cache, None, rope, columns)
    return pick(decoder.logits(state[:, 0]), uniforms, temperature)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`prefill` or `next_tokens`, compiled once for all numbers of rows and columns: some two hundred small operations
    become a few."""
    made = torch.compile(function)

    def call(decoder: Decoder, cache: KVCache, rope: tuple[Tensor, Tensor] | None, *rest: Any) -> Tensor:
        for item in (*cache.keys, *cache.values):
            torch._dynamo.maybe_mark_dynamic(item, (0, 2))
        for item in rope or ():
            torch._dynamo.maybe_mark_dynamic(item, 0)
        for item in rest:
            if isinstance(item, Tensor):
                torch._dynamo.maybe_mark_dynamic(item, tuple(range(item.dim())))
        return made(decoder, cache, rope, *rest)

    return call


def _sample_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling,
                  uniforms: Tensor) -> list[list[int]]:
    ids, mask = (item.to(device()) for item in pad_left(prompts, sampling.pad_id))
    stops = torch.tensor(sampling.stop_ids, device=ids.device)
    uniforms = uniforms.to(ids.device)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=ids.device)  # which prompt each row of the batch is
    alive = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with autocast(sampling.precision):
        for step in range(sampling.max_new_tokens):
            hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                      past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            tokens = pick(model.get_output_embeddings()(hidden), uniforms[rows, step], sampling.temperature)
            for row, token, is_alive in zip(rows.tolist(), tokens.tolist(), alive.tolist(), strict=True):
                if is_alive:
                    responses[row].append(token)
            alive &= ~finished(tokens, step + 1, stops, sampling.max_new_tokens)
            left = int(alive.sum())
            if left == 0:
                break
            ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if left <= SHRINK_AT * len(rows):
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                ids, positions, mask, rows, alive = (item[keep] for item in (ids, positions, mask, rows, alive))
    return responses


def finished(tokens: Tensor, count: Tensor | int, stops: Tensor, max_new_tokens: int) -> Tensor:
    """The stop rule: a response ends with a stop token, or with its `max_new_tokens`-th token.

    tokens [n], the newest of each response; count [n] or one number, tokens so far -> [n], bool.
    """
    return torch.isin(tokens, stops) | (torch.as_tensor(count, device=tokens.device) == max_new_tokens)


def pick(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Token of each row: inverse of the cumulative distribution at `uniforms`, or the best one at temperature 0.

    logits [B, V], uniforms [B] in [0, 1) -> [B].
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / temperature
    cumulative = (scaled - scaled.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # below the total also after rounding: the token found then has a probability
    target = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)
