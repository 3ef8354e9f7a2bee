"""instructflow's side of the comparison, like bench/versus/theirs.py; also makes the folder with the work.

    python bench/versus/ours.py [PROCESSES]        answers the jobs of bench/versus/__main__.py
"""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from work import (
    EOS_SHARE,
    PPO_SIZES,
    RM_BATCH,
    SFT_BATCH,
    SHAPES,
    Shape,
    load_work,
    make_work,
    memory,
    save_work,
    serve,
)

from rlhf.data.batching import length_batches
from rlhf.losses import ranking_loss
from rlhf.model.load import load_policy, load_scorer, new_scorer, save_model
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.scoring import score_groups
from rlhf.model.tokenizer import train_tokenizer
from rlhf.params import PpoParams
from rlhf.ppo import rollouts as ppo_rollouts
from rlhf.ppo.trainer import Trainer
from rlhf.reward_model import Rankings
from rlhf.sft import Demonstrations, batch_loss
from rlhf.training import distributed
from rlhf.training.loop import train_loop
from rlhf.training.optim import adamw
from rlhf.training.seeding import generator, seed_everything


def new_policy(shape: Shape, eos: int, pad: int) -> Any:
    common = {"vocab_size": shape.vocabulary, "max_position_embeddings": 512, "hidden_size": shape.width,
              "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "tie_word_embeddings": True,
              "intermediate_size": shape.inner or 4 * shape.width, "eos_token_id": eos, "bos_token_id": eos,
              "pad_token_id": pad}
    if shape.kv_heads:
        return LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=shape.kv_heads))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**common, rotary_pct=0.5))


def make(folder: str, shape: str) -> dict[str, Any]:
    """Makes models with random weights and the work. Where the final norm has a bias, EOS gets the chance EOS_SHARE."""
    root, form = Path(folder), SHAPES[shape]
    seed_everything(1)
    words = [f"{one}{other}" for one in "bdfgklmnprst" for other in "aeiou"]
    draw = torch.Generator().manual_seed(1)
    texts = [" ".join(words[i] for i in torch.randint(len(words), (30,), generator=draw)) for _ in range(300)]
    tokenizer = train_tokenizer(texts, min(form.vocabulary, 1024))
    policy = new_policy(form, tokenizer.eos_token_id, tokenizer.pad_token_id)
    final = getattr(policy.base_model, "final_layer_norm", None)
    if final is not None:
        row = policy.get_output_embeddings().weight[tokenizer.eos_token_id].detach()
        with torch.no_grad():
            final.bias += row / row.square().sum() * torch.tensor(form.vocabulary * EOS_SHARE).log()
    save_model(policy, tokenizer, root / "policy")
    for name in ("rm", "value"):
        model = new_scorer(root / "policy", tokenizer.pad_token_id, generator(1, name))
        save_model(model, tokenizer, root / name)
    known = min(form.vocabulary, len(tokenizer))
    if distributed.is_main():
        save_work(make_work(shape, known, tokenizer.eos_token_id, tokenizer.pad_token_id), root)
    distributed.barrier()
    return {"parameters": policy.num_parameters()}


def ppo(folder: str, precision: str, mixed: bool, iterations: int, responses: list[list[int]] | None = None,
        order: list[list[int]] | None = None, compiled: bool = False, micro: int = 0) -> dict[str, Any]:
    """Like theirs.ppo. `order`: the prompts in the other side's order. `compiled`: torch.compile for sampling."""
    root = Path(folder)
    work = load_work(root)
    batch, usual = PPO_SIZES[work.shape]
    micro = micro or usual
    params = PpoParams(batch_size=batch, minibatch_size=batch, micro_batch_size=micro, inner_epochs=4,
                       reuse_forward_passes=batch // micro,
                       max_prompt_tokens=64, max_new_tokens=32, lr=1e-4, value_lr=1e-4, warmup_iterations=0,
                       adam_eps=1e-5, beta_rule="fixed", beta=0.05, no_eos_score=1e9, precision=precision,
                       max_grad_norm=1e9, compile_rollouts=compiled)
    seed_everything(1)
    trainer = Trainer(params, root / "policy", root / "rm", 1)
    trainer.models.value.load_state_dict(load_scorer(root / "value").state_dict())
    if not mixed:
        trainer.sampler.sampling = replace(trainer.sampler.sampling, stop_ids=(-1,))
    prompts = (work.mixed if mixed else work.prompts)[:batch * iterations]
    prompts = order or prompts
    sample_responses = ppo_rollouts.sample_responses
    if responses is not None:
        by_prompt = {tuple(prompt): response for prompt, response in zip(work.prompts, responses, strict=False)}
        ppo_rollouts.sample_responses = lambda model, batch, sampling, noise, rows: [
            by_prompt[tuple(batch[row])] for row in rows]
    journal, lengths = [], []
    try:
        start = time.perf_counter()
        for iteration in range(iterations):
            rollouts, values = trainer.step(prompts[iteration * batch:(iteration + 1) * batch], iteration)
            journal.append(values)
            lengths += list(map(len, rollouts.responses))
        seconds = time.perf_counter() - start
    finally:
        ppo_rollouts.sample_responses = sample_responses
    return {"seconds": seconds, "episodes": batch * iterations, "response_tokens": sum(lengths) / len(lengths),
            "loss/policy": journal[0]["ppo/policy_loss"], "loss/value": journal[0]["ppo/value_loss"],
            "kl": journal[-1]["ppo/kl"], "score": journal[0]["ppo/rm_score"], "memory": memory(),
            "weight": sum(float(item.detach().double().abs().sum()) for item in trainer.models.policy.parameters())}


def sampled(folder: str, mixed: bool, iterations: int) -> dict[str, Any]:
    """Random responses of 32 tokens to the prompts, for both sides."""
    work = load_work(Path(folder))
    draw = torch.Generator().manual_seed(2)
    count = PPO_SIZES[work.shape][0] * iterations
    return {"responses": torch.randint(max(work.eos, work.pad) + 1, 300, (count, 32), generator=draw).tolist()}


def rollout(folder: str, precision: str, mixed: bool, batch: int, prompts: int, compiled: bool = False
            ) -> dict[str, Any]:
    """Like theirs.rollout."""
    root = Path(folder)
    work = load_work(root)
    model = load_policy(root / "policy")
    rows = (work.mixed if mixed else work.prompts)[:prompts]
    sampling = Sampling(32, (work.eos,) if mixed else (-1,), work.pad, precision=precision, batch_size=batch,
                        compile=compiled)
    start = time.perf_counter()
    sampling = replace(sampling, batch_size=batch // distributed.size())
    mine = list(distributed.share(range(len(rows))))
    responses = sample_responses(model, rows, sampling, generator(1, "rollout"), mine)
    tokens = distributed.all_reduce({"tokens": sum(map(len, responses))})["tokens"]
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "memory": memory()}


def rm(folder: str, precision: str, prompts: int) -> dict[str, Any]:
    """Like theirs.rm: the K-way ranking loss, in the order of the work."""
    root = Path(folder)
    work = load_work(root)
    seed_everything(1)
    rows = work.rankings[:prompts]
    ranks = [row["ranks"] for row in rows]
    data = Rankings([[row["prompt"] + completion for completion in row["completions"]] for row in rows], ranks, 0)
    model = load_scorer(root / "rm")
    losses = []

    def loss_of_step(step: int) -> Any:
        indices = distributed.share(range(step * RM_BATCH, (step + 1) * RM_BATCH))
        scores = score_groups(model, [data.ids[index] for index in indices], work.pad, precision)
        loss = ranking_loss(scores, *data.batch_ranks(indices)) * (len(indices) / RM_BATCH)
        losses.append(loss.item())
        return [(loss, {})]

    return timed(root, model, loss_of_step, prompts // RM_BATCH, losses) | {"prompts": prompts}


def sft(folder: str, precision: str, rows: int) -> dict[str, Any]:
    """Like theirs.sft, in batches of demonstrations of similar length."""
    root = Path(folder)
    work = load_work(root)
    seed_everything(1)
    used = work.demonstrations[:rows]
    data = Demonstrations([row["prompt"] + row["completion"] for row in used], [len(row["prompt"]) for row in used], 0)
    model = load_policy(root / "policy")
    batches = length_batches([len(ids) for ids in data.ids], SFT_BATCH, generator(1, "sft"))
    losses = []

    def loss_of_step(step: int) -> Any:
        tokens = sum(len(data.ids[row]) - data.prompt_lengths[row] for row in batches[step])
        own = list(distributed.share(batches[step]))
        loss = batch_loss(model, *data.batch(model, own, work.pad), precision, tokens)
        losses.append(loss.item())
        return [(loss, {})]

    return timed(root, model, loss_of_step, len(batches), losses) | {"tokens": sum(len(ids) for ids in data.ids)}


def timed(root: Path, model: Any, loss_of_step: Any, steps: int, losses: list[float]) -> dict[str, Any]:
    model.train()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        start = time.perf_counter()
        train_loop("bench", Path(folder), model, [adamw(model, 1e-4, eps=1e-5)], steps=steps, loss_of_step=loss_of_step,
                   columns=[])
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss/first": losses[0], "loss/mean": sum(losses) / len(losses), "steps": len(losses),
            "memory": memory()}


if __name__ == "__main__":
    os.environ["INSTRUCTFLOW_CHECKPOINT_SECONDS"] = "1000000"  # theirs saves no checkpoints either
    if len(sys.argv) > 1 and int(sys.argv[1]) > 1:
        distributed.fork(int(sys.argv[1]))
    serve({"make": make, "ppo": ppo, "sampled": sampled, "rollout": rollout, "rm": rm, "sft": sft},
          distributed.is_main(), distributed.broadcast)
