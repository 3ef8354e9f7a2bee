"""Responses of the compared models to held-out prompts, their reward-model scores, KL to a reference.

Processes share the prompts, and each gets all results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf.data.batching import length_batches
from rlhf.model.load import load_policy, load_scorer
from rlhf.model.responses import response_kl, response_log_probs, response_mask
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.scoring import score_together
from rlhf.model.tokenizer import PromptCodec, load_tokenizer, newline_ids, text_ids
from rlhf.params import EvaluateParams
from rlhf.training import distributed
from rlhf.training.seeding import generator


@dataclass(frozen=True)
class Answers:
    """One model's responses to the held-out prompts: token ids, texts, scores of the reward model."""

    ids: list[list[int]]
    texts: list[str]
    rm_scores: list[float]


def answer(folder: Path, rm_folder: Path, prompts: Sequence[str], params: EvaluateParams, seed: int, *,
           ends_at_newline: bool = False, shots: Sequence[dict[str, str]] = (), form: str = "") -> Answers:
    """Samples one response per prompt and scores it with the reward model.

    Every model gets the same random numbers for the same prompt. `ends_at_newline`: the response ends at a line break,
    for a base model, which has not learned to stop. `shots`: demonstrations (prompt, completion) before each prompt,
    for InstructGPT's prompted base model; as many as leave room for prompt and response. `form`: template with {prompt}
    that replaces the chat format, for a base model pretrained on questions in another one.
    """
    tokenizer = load_tokenizer(folder)
    codec, model = PromptCodec(tokenizer), load_policy(folder)
    stops = (codec.eos_id, *(newline_ids(tokenizer) if ends_at_newline else ()))
    sampling = Sampling(params.max_new_tokens, stops, codec.pad_id, params.temperature, params.precision,
                        params.batch_size)
    prompt_ids = format_prompts(codec, prompts, form)
    room = getattr(model.config, "max_position_embeddings", 2**31) - params.max_new_tokens
    before = few_shot_ids(codec, shots, form, room - max(map(len, prompt_ids)))
    ids = sample_shared(model, [before + one for one in prompt_ids], sampling, generator(seed, "evaluate"))
    texts = [codec.decode(item) for item in ids]
    return Answers(ids, texts, rm_scores(rm_folder, prompts, texts, params.precision))


def sample_shared(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: torch.Generator
                  ) -> list[list[int]]:
    """`sample_responses` with the prompts shared among the processes."""
    return distributed.by_rows(lambda rows: sample_responses(model, prompts, sampling, noise, rows),
                               range(len(prompts)))


def format_prompts(codec: PromptCodec, prompts: Sequence[str], form: str) -> list[list[int]]:
    """Token ids of prompts in the template `form`, or in the chat format if it is empty."""
    if not form:
        return codec.prompts(list(prompts))
    return text_ids(codec.tokenizer, [form.replace("{prompt}", prompt) for prompt in prompts])


def few_shot_ids(codec: PromptCodec, shots: Sequence[dict[str, str]], form: str, room: int) -> list[int]:
    """Token ids of the first demonstrations (prompt, completion, line break), as many as fit into `room` tokens."""
    prompts = format_prompts(codec, [shot["prompt"] for shot in shots], form)
    ends = text_ids(codec.tokenizer, [(" " if form else "") + shot["completion"] + "\n" for shot in shots])
    ids: list[int] = []
    for prompt, completion in zip(prompts, ends, strict=True):
        if len(ids) + len(prompt) + len(completion) > room:
            break
        ids += prompt + completion
    return ids


def rm_scores(folder: Path, prompts: Sequence[str], texts: Sequence[str], precision: str) -> list[float]:
    """The reward model's score of each response."""
    codec = PromptCodec(load_tokenizer(folder))
    pairs = zip(codec.prompts(list(prompts)), codec.completions(list(texts)), strict=True)
    sequences = [prompt + text for prompt, text in pairs]
    return score_together(load_scorer(folder), sequences, codec.pad_id, precision).tolist()


def sample_several(folder: Path, prompts: Sequence[str], count: int, params: EvaluateParams, seed: int
                   ) -> list[list[str]]:
    """`count` samples for each prompt, e.g. for best-of-n."""
    codec = PromptCodec(load_tokenizer(folder))
    sampling = Sampling(params.max_new_tokens, (codec.eos_id,), codec.pad_id, params.temperature, params.precision,
                        params.batch_size)
    ids = [one for one in codec.prompts(list(prompts)) for _ in range(count)]
    responses = sample_shared(load_policy(folder), ids, sampling, generator(seed, "best of n"))
    texts = [codec.decode(response) for response in responses]
    return [texts[start:start + count] for start in range(0, len(texts), count)]


@torch.no_grad()
def mean_kl(folder: Path, reference: Path, prompts: Sequence[str], answers: Answers, precision: str,
            temperature: float) -> float:
    """Mean over responses of the k1 estimate of KL(policy || reference), nats."""
    codec = PromptCodec(load_tokenizer(folder))
    prompt_ids = codec.prompts(list(prompts))
    models = (load_policy(folder), load_policy(reference))
    total = 0.0
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, answers.ids, strict=True)]
    for rows in distributed.share(length_batches(lengths, 256, None)):
        some, responses = [prompt_ids[row] for row in rows], [answers.ids[row] for row in rows]
        width = max(map(len, responses))
        ours, theirs = (response_log_probs(model, some, responses, width, pad_id=codec.pad_id, temperature=temperature,
                                           precision=precision)[0] for model in models)
        total += response_kl(ours, theirs, response_mask(responses, width)).sum().item()
    return distributed.all_reduce({"kl": total})["kl"] / len(prompt_ids)
