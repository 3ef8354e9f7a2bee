"""The other side of the comparison: TRL's trainers and transformers' generation, in their own environment.

    .venv-trl/bin/python bench/versus/theirs.py [PROCESSES]        answers the jobs of bench/versus/__main__.py

Settings: the faster attention, no gradient checkpointing, no logging, no saving; bf16 through accelerate's mixed
precision.
"""

import functools
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from work import PPO_SIZES, RM_BATCH, load_work, memory, serve

transformers.logging.set_verbosity_error()
COMMON = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 1,
          "gradient_checkpointing": False, "lr_scheduler_type": "constant", "adam_beta2": 0.95, "adam_epsilon": 1e-5,
          "learning_rate": 1e-4, "max_grad_norm": 1.0, "use_cpu": not torch.cuda.is_available()}


def fork(count: int) -> None:
    """Makes this process the first of `count`, one CPU thread each, as torchrun would start them."""
    torch.set_num_threads(1)
    COMMON["ddp_backend"] = "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = next((number for number in range(1, count) if os.fork() == 0), 0)
    os.environ |= {"RANK": str(place), "LOCAL_RANK": str(place), "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", timeout=timedelta(hours=4))


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(line: str) -> str:
    """The first process's line, for all processes."""
    box = [line]
    if size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def all_reduce(number: int) -> int:
    total = torch.tensor(number)
    if size() > 1:
        dist.all_reduce(total)
    return int(total)


def load(kind: Any, folder: Path, attention: str, **more: Any) -> Any:
    return kind.from_pretrained(str(folder), dtype=torch.float32, attn_implementation=attention, **more)


def set_precision(precision: str) -> dict[str, Any]:
    """Sets accelerate's precision, which it reads from the environment once and then caches."""
    from accelerate.state import AcceleratorState
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision == "bf16" else "no"
    AcceleratorState._reset_state(True)
    return {"bf16": precision == "bf16"}


def ppo(folder: str, precision: str, attention: str, mixed: bool, iterations: int,
        responses: list[list[int]] | None = None, micro: int = 0) -> dict[str, Any]:
    """PPOTrainer on `iterations` batches, with `micro` episodes per forward pass of the update. With `responses` it
    learns from these instead of its own samples."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    root = Path(folder)
    work = load_work(root)
    set_seed(1)
    batch, usual = PPO_SIZES[work.shape]
    micro = min(micro or usual, batch // size())
    # one batch more than needed: at the end of the data accelerate steps after every forward pass
    prompts = (work.mixed if mixed else work.prompts)[:batch * (iterations + 1)]
    config = PPOConfig(**{**COMMON, "output_dir": str(root / "trl")}, **set_precision(precision),
                       per_device_train_batch_size=micro,
                       gradient_accumulation_steps=batch // micro // size(), num_mini_batches=1, num_ppo_epochs=4,
                       total_episodes=batch * iterations, response_length=32, temperature=1.0, kl_coef=0.05,
                       vf_coef=1.0, num_sample_generations=0, local_rollout_forward_batch_size=batch // size(),
                       stop_token="eos" if mixed else None)
    tokenizer = AutoTokenizer.from_pretrained(str(root / "policy"), padding_side="left")
    models = {name: load(AutoModelForCausalLM, root / "policy", attention) for name in ("model", "ref_model")}
    scorers = {"value_model": load(AutoModelForSequenceClassification, root / "value", attention, num_labels=1),
               "reward_model": load(AutoModelForSequenceClassification, root / "rm", attention, num_labels=1)}
    for model in [*models.values(), *scorers.values()]:
        model.eval()
    data = Dataset.from_dict({"input_ids": prompts})
    trainer = PPOTrainer(args=config, processing_class=tokenizer, train_dataset=data, eval_dataset=data.select([0]),
                         **models, **scorers)
    log: list[dict[str, float]] = []
    trainer.log = lambda metrics, *rest: log.append(dict(metrics))
    batch_generation = ppo_trainer.batch_generation
    lengths: list[int] = []
    order: list[list[int]] = []

    def generation(model: Any, queries: Any, *rest: Any) -> Any:
        order.extend(queries.tolist())
        if responses is None:
            sequences, logits = batch_generation(model, queries, *rest)
        else:
            by_prompt = {tuple(prompt): response for prompt, response in zip(prompts, responses, strict=True)}
            answers = torch.tensor([by_prompt[tuple(query)] for query in queries.tolist()], device=queries.device)
            sequences = torch.cat([queries, answers], dim=1)
            with torch.no_grad():
                logits = model(sequences).logits[:, queries.shape[1] - 1:-1].float()
        ends = (sequences[:, queries.shape[1]:] == (work.eos if mixed else -1)).int()
        lengths.extend(torch.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1]).tolist())
        return sequences, logits

    ppo_trainer.batch_generation = generation
    try:
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    finally:
        ppo_trainer.batch_generation = batch_generation
    model = getattr(trainer.model, "module", trainer.model).policy
    return {"seconds": seconds, "episodes": batch * iterations, "response_tokens": sum(lengths) / len(lengths),
            "loss/policy": log[0]["loss/policy_avg"], "loss/value": log[0]["loss/value_avg"],
            "kl": log[-1]["objective/kl"], "score": log[0]["objective/scores"], "memory": memory(),
            "order": order if responses else [],
            "weight": sum(float(item.detach().double().abs().sum()) for item in model.parameters())}


@functools.cache
def sampler(folder: Path, precision: str, attention: str) -> Any:
    """A cached policy, since compiled code belongs to one model object."""
    return load(AutoModelForCausalLM, folder, attention).eval().to(
        torch.bfloat16 if precision == "bf16" else torch.float32)


def rollout(folder: str, precision: str, attention: str, mixed: bool, batch: int, prompts: int,
            continuous: bool = False, compiled: bool = False) -> dict[str, Any]:
    """Sampling with transformers' generate (or its continuous batching) on the first prompts, `batch` at a time.

    `compiled`: with a static cache and torch.compile after the prefill.
    """
    root = Path(folder)
    work = load_work(root)
    set_seed(1)
    model = sampler(root / "policy", precision, attention)
    rows = sorted((work.mixed if mixed else work.prompts)[:prompts], key=len)[rank()::size()]
    batch //= size()
    settings = {"max_new_tokens": 32, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0,
                "pad_token_id": work.pad, "eos_token_id": work.eos if mixed else None}
    if not mixed:
        settings["min_new_tokens"] = 32
    if compiled:
        settings |= {"cache_implementation": "static", "compile_config": transformers.CompileConfig(
            mode="default", fullgraph=False)}
        settings["compile_config"]._compile_all_devices = True
    config = transformers.GenerationConfig(**settings)
    model.generation_config = config
    tokens = 0
    start = time.perf_counter()
    with torch.no_grad():
        if continuous:
            outputs = model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
            tokens = sum(len(item.generated_tokens) for item in outputs.values())
        else:
            for begin in range(0, len(rows), batch):
                prompt_ids = rows[begin:begin + batch]
                longest = max(map(len, prompt_ids))
                ids = torch.tensor([[work.pad] * (longest - len(row)) + row for row in prompt_ids])
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompt_ids])
                answers = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:]
                ends = (answers == (work.eos if mixed else -1)).int()
                tokens += int(torch.where(ends.any(1), ends.argmax(1) + 1, answers.shape[1]).sum())
    tokens = all_reduce(tokens)
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "memory": memory()}


def rm(folder: str, precision: str, attention: str, prompts: int, micro: int) -> dict[str, Any]:
    """RewardTrainer on all 15 pairs of each ranking of 6, RM_BATCH prompts per step, in the order of the work."""
    from trl import RewardConfig, RewardTrainer
    root = Path(folder)
    work = load_work(root)
    set_seed(1)
    pairs = [(row["prompt"] + row["completions"][one], row["prompt"] + row["completions"][other])
             for row in work.rankings[:prompts] for one in range(6) for other in range(6)
             if row["ranks"][one] < row["ranks"][other]]
    micro = min(micro, 15 * RM_BATCH // size())
    data = Dataset.from_dict({"chosen_ids": [pair[0] for pair in pairs], "rejected_ids": [pair[1] for pair in pairs]})
    config = RewardConfig(**{**COMMON, **logged(root)}, **set_precision(precision), per_device_train_batch_size=micro,
                          gradient_accumulation_steps=15 * RM_BATCH // micro // size(), num_train_epochs=1,
                          max_length=None, train_sampling_strategy="sequential", disable_dropout=True)
    model = load(AutoModelForSequenceClassification, root / "rm", attention, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(str(root / "policy"))
    return timed(RewardTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)) | {
        "prompts": prompts}


def sft(folder: str, precision: str, attention: str, rows: int, packing: bool, micro: int) -> dict[str, Any]:
    """SFTTrainer with the loss on completions: packed to 128 tokens, or padded batches of 32 demonstrations."""
    from trl import SFTConfig, SFTTrainer
    root = Path(folder)
    work = load_work(root)
    set_seed(1)
    used = work.demonstrations[:rows]
    data = Dataset.from_dict({"input_ids": [row["prompt"] + row["completion"] for row in used],
                              "completion_mask": [[0] * len(row["prompt"]) + [1] * len(row["completion"])
                                                  for row in used]})
    config = SFTConfig(**{**COMMON, **logged(root)}, **set_precision(precision), num_train_epochs=1, max_length=128,
                       per_device_train_batch_size=micro // size(), packing=packing, completion_only_loss=True)
    model = load(AutoModelForCausalLM, root / "policy", attention)
    tokenizer = AutoTokenizer.from_pretrained(str(root / "policy"))
    return timed(SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)) | {
        "tokens": sum(len(row["prompt"]) + len(row["completion"]) for row in used)}


def logged(root: Path) -> dict[str, Any]:
    return {"output_dir": str(root / "trl"), "logging_strategy": "steps", "logging_steps": 1}


def timed(trainer: Any) -> dict[str, Any]:
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "loss/first": losses[0], "loss/mean": sum(losses) / len(losses), "steps": len(losses),
            "memory": memory()}


if __name__ == "__main__":
    if len(sys.argv) > 1 and int(sys.argv[1]) > 1:
        fork(int(sys.argv[1]))
    serve({"ppo": ppo, "rollout": rollout, "rm": rm, "sft": sft}, rank() == 0, broadcast)
