"""Responses of the compared models to held-out prompts, their reward-model scores, KL to a reference.

Processes share the prompts, and each gets all results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.data.batching import pass_batches
from rlhf.data.prompts import Prompt, prompt_text
from rlhf.model.chat_format import PromptCodec, load_codec
from rlhf.model.forward import LOGITS_AT_ONCE
from rlhf.model.load import check_length, load_policy, load_scorer
from rlhf.model.responses import (
    categorical_kl,
    on_grid,
    response_kl,
    response_kl_k3,
    response_logits,
    response_mask,
)
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.scoring import score_together
from rlhf.model.tokenizer import newline_ids, text_ids
from rlhf.params import EvaluateParams
from rlhf.training import distributed
from rlhf.training.seeding import generator


@dataclass(frozen=True)
class Answers:
    """One model's responses to the held-out prompts: token ids, texts, scores of the reward model."""

    ids: list[list[int]]
    texts: list[str]
    rm_scores: list[float]


def answer(folder: Path, rm_folder: Path, prompts: Sequence[Prompt], params: EvaluateParams, seed: int, *,
           ends_at_newline: bool = False, shots: Sequence[Mapping[str, Any]] = (), form: str = "") -> Answers:
    """Samples one response per prompt and scores it with the reward model.

    Every model gets the same random numbers for the same prompt. `ends_at_newline`: the response ends at a line break,
    for a base model, which has not learned to stop. `shots`: demonstrations (prompt, completion) before each prompt,
    for InstructGPT's prompted base model; as many as leave room for prompt and response. `form`: template with {prompt}
    that replaces the chat format, for a base model pretrained on questions in another one.
    """
    codec, model = load_codec(folder), load_policy(folder)
    stops = (*codec.stop_ids, *(newline_ids(codec.tokenizer) if ends_at_newline else ()))
    sampling = Sampling(params.max_new_tokens, stops, codec.pad_id, params.temperature, params.precision,
                        params.batch_size)
    prompt_ids = format_prompts(codec, prompts, form)
    longest = max(map(len, prompt_ids))
    check_length(model, longest + params.max_new_tokens, "evaluate.max_new_tokens and the longest held-out prompt")
    room = getattr(model.config, "max_position_embeddings", 2**31) - params.max_new_tokens
    before = few_shot_ids(codec, shots, form, room - longest)
    ids = sample_shared(model, [before + one for one in prompt_ids], sampling, generator(seed, "evaluate"))
    texts = [codec.decode(item) for item in ids]
    return Answers(ids, texts, rm_scores(rm_folder, prompts, texts, params.precision))


def sample_shared(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: torch.Generator
                  ) -> list[list[int]]:
    """`sample_responses` with the prompts shared among the processes."""
    return distributed.by_rows(lambda rows: sample_responses(model, prompts, sampling, noise, rows),
                               range(len(prompts)))


def format_prompts(codec: PromptCodec, prompts: Sequence[Prompt], form: str) -> list[list[int]]:
    """Token ids of prompts in the template `form` (conversations as transcripts), without one in the chat format."""
    if not form:
        return codec.prompts(list(prompts))
    return text_ids(codec.tokenizer, [form.replace("{prompt}", prompt_text(prompt)) for prompt in prompts])


def few_shot_ids(codec: PromptCodec, shots: Sequence[Mapping[str, Any]], form: str, room: int) -> list[int]:
    """Token ids of the first demonstrations (prompt, completion, line break), as many as fit into `room` tokens."""
    prompts = format_prompts(codec, [shot["prompt"] for shot in shots], form)
    ends = text_ids(codec.tokenizer, [(" " if form else "") + shot["completion"] + "\n" for shot in shots])
    ids: list[int] = []
    for prompt, completion in zip(prompts, ends, strict=True):
        if len(ids) + len(prompt) + len(completion) > room:
            break
        ids += prompt + completion
    return ids


def rm_scores(folder: Path, prompts: Sequence[Prompt], texts: Sequence[str], precision: str) -> list[float]:
    """The reward model's score of each response."""
    codec = load_codec(folder)
    pairs = zip(codec.prompts(list(prompts)), codec.completions(list(texts)), strict=True)
    sequences = [prompt + text for prompt, text in pairs]
    return score_together(load_scorer(folder), sequences, codec.pad_id, precision).tolist()


def sample_several(folder: Path, prompts: Sequence[Prompt], count: int, params: EvaluateParams, seed: int
                   ) -> list[list[str]]:
    """`count` samples for each prompt, e.g. for best-of-n."""
    codec = load_codec(folder)
    sampling = Sampling(params.max_new_tokens, codec.stop_ids, codec.pad_id, params.temperature, params.precision,
                        params.batch_size)
    ids = [one for one in codec.prompts(list(prompts)) for _ in range(count)]
    responses = sample_shared(load_policy(folder), ids, sampling, generator(seed, "best of n"))
    texts = [codec.decode(response) for response in responses]
    return [texts[start:start + count] for start in range(0, len(texts), count)]


@dataclass(frozen=True)
class Kl:
    """Three unbiased estimates of KL(policy || reference) of each response, nats.

    `exact`: the sum over its tokens of the KL between the two distributions over the vocabulary; never negative, and of
    the three the one that varies least. `k1`, `k3`: from the sampled tokens alone (rlhf/model/responses.py).
    """

    exact: list[float]
    k1: list[float]
    k3: list[float]


@torch.no_grad()
def kl_to_reference(folder: Path, reference: Path, prompts: Sequence[Prompt], answers: Answers, precision: str,
                    temperature: float) -> Kl:
    """KL of the policy in `folder` to the reference, on the policy's own answers. Processes share the prompts."""
    codec = load_codec(folder)
    models = (load_policy(folder), load_policy(reference))
    at_once = max(1, LOGITS_AT_ONCE // models[0].config.vocab_size)

    def estimates(some: Sequence[list[int]], ids: Sequence[list[int]]) -> list[tuple[float, float, float]]:
        found = [(0.0, 0.0, 0.0)] * len(some)
        for rows in pass_batches([len(prompt) + len(response) for prompt, response in zip(some, ids, strict=True)],
                                 256, at_once):
            own, responses = [some[row] for row in rows], [ids[row] for row in rows]
            width = max(map(len, responses))
            mask = response_mask(responses, width)
            (ours, logits), (theirs, ref_logits) = (
                response_logits(model, own, responses, width, pad_id=codec.pad_id, temperature=temperature,
                                precision=precision) for model in models)
            exact = on_grid(categorical_kl(logits, ref_logits, temperature), mask).sum(dim=1)
            for row, *values in zip(rows, exact.tolist(), response_kl(ours, theirs, mask).tolist(),
                                    response_kl_k3(ours, theirs, mask).tolist(), strict=True):
                found[row] = (values[0], values[1], values[2])
        return found

    exact, k1, k3 = zip(*distributed.by_rows(estimates, codec.prompts(list(prompts)), answers.ids), strict=True)
    return Kl(list(exact), list(k1), list(k3))
