"""`--memory` of sft, rm and ppo: what each moment of the stage takes on the devices at hand; nothing is loaded."""

from pathlib import Path
from typing import Any

from mlops.config.loader import Params
from rlhf.errors import UserError
from rlhf.memory import Job, Parts, Shape, moments
from tasks import launch

USABLE = 0.9  # of a device's memory: the rest is fragmentation, buffers of kernels and of communication
LARGEST_K = 9  # completions of a ranked prompt
HINTS = {  # part -> what makes it smaller
    "activations": "{section}.micro_batch_tokens or micro_batch_size, gradient_checkpointing, offload_activations, "
                   "tensor_parallel",
    "logits": "{section}.micro_batch_tokens or micro_batch_size", "passing": "{section}.micro_batch_tokens",
    "weights": "{section}.shard with more processes, lora_rank with lora_base: bf16 or nf4",
    "moments": "{section}.shard with more processes, lora_rank, cpu_offload",
    "gradients": "{section}.shard with more processes, lora_rank", "average": "ppo.ema_decay: 0",
    "bf16 casts": "{section}.shard with several processes", "KV cache": "ppo.rollout_batch_size",
    "sampling copy": "ppo.vllm_url", "reference": "ppo.frozen_precision: bf16, frozen_on_cpu",
    "reward model": "ppo.frozen_precision: bf16, frozen_on_cpu"}


def print_memory(name: str, params: Params) -> None:
    """Prints the moments of a stage (ppo@ARM: of an arm) and what to change where one does not fit. Raises UserError
    where the model's shape is not known."""
    stage, _, arm = name.partition("@")
    section = params.stages.arms[arm] if arm else getattr(params.stages, stage)
    job = job_of(stage, section, *shapes(stage, params), one_base=params.stages.rm.lora_rank > 0)
    place, available, devices = device(job.processes)
    print(f"{name}, profile {params.profile}: {job.policy.name}, {described(job)}, {place}")
    found = moments(job)
    width = max(map(len, found))
    for moment, parts in found.items():
        total = sum(parts.values())
        largest = [part for part in sorted(parts, key=lambda part: -parts[part]) if parts[part] > 0.02 * total]
        print(f"  {moment:{width}}  {size(total):>9}   "
              + ", ".join(f"{part} {size(parts[part])}" for part in largest))
    moment = max(found, key=lambda item: sum(found[item].values()))
    print(advice(section_of(stage), moment, found[moment], available))
    if job.processes > devices:
        print(f"{section_of(stage)}.processes = {job.processes}: this machine has {devices} "
              f"{'GPUs' if 'GPU' in place else 'cores'}")


def size(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def described(job: Job) -> str:
    """The processes, and the options that say how models are held."""
    options = {"shard": job.shards > 1, f"tensor_parallel {job.tensor_parallel}": job.tensor_parallel > 1,
               "cpu_offload": job.cpu_offload and job.shards > 1, f"LoRA of rank {job.lora_rank}": job.lora_rank > 0,
               "base in bf16": job.lora_bf16, "base in nf4": job.lora_nf4, "bf16 passes": job.bf16}
    count = f"{job.processes} process{'es' if job.processes > 1 else ''}"
    return ", ".join([count, *(name for name, on in options.items() if on)])


def section_of(stage: str) -> str:
    return "ppo" if stage.startswith("ppo") else stage


def advice(section: str, moment: str, parts: Parts, available: float) -> str:
    """Whether the largest moment fits, and which parameters change its largest parts."""
    total = sum(parts.values())
    if total <= USABLE * available:
        return f"fits: the largest moment, {moment}, takes {size(total)} of {size(USABLE * available)} that can be used"
    hints = [HINTS[part].format(section=section) for part in sorted(parts, key=lambda part: -parts[part])
             if part in HINTS and parts[part] > 0.1 * total]
    return (f"does not fit: {moment} takes {size(total)}, and {size(USABLE * available)} can be used; change "
            f"{'; '.join(dict.fromkeys(hints))}")


def job_of(stage: str, section: Any, policy: Shape, scorer: Shape, one_base: bool = False) -> Job:
    """The stage's parameters as rlhf/memory.py takes them. `one_base`: PPO's models may share one, under LoRA."""
    from rlhf.model.device import device as where
    from rlhf.training.hardware import in_bf16

    ppo, processes = stage == "ppo", launch.count(section.processes)
    on_gpu = where().type == "cuda"
    response = section.max_new_tokens if ppo else section.max_tokens // 2
    return Job(
        stage=stage, policy=policy, scorer=scorer, rows=section.minibatch_size if ppo else section.batch_size,
        batch=section.batch_size if ppo else 0, response=response,
        prompt=section.max_prompt_tokens if ppo else section.max_tokens - response, k=LARGEST_K,
        micro=section.micro_batch_size, micro_tokens=section.micro_batch_tokens,
        sampled=section.rollout_batch_size if ppo else 0, average=ppo and section.ema_decay > 0,
        bf16=in_bf16(section.precision), eager=not on_gpu, checkpointing=section.gradient_checkpointing,
        offload_activations=section.offload_activations, processes=processes,
        shard=section.shard and processes > 1, tensor_parallel=min(section.tensor_parallel, processes),
        cpu_offload=section.cpu_offload,
        frozen_bf16=ppo and section.frozen_precision == "bf16", frozen_on_cpu=ppo and section.frozen_on_cpu,
        lora_rank=section.lora_rank,
        one_base=ppo and one_base and section.lora_rank > 0 and not section.shard,
        lora_bf16=section.lora_base == "bf16", lora_nf4=section.lora_base == "nf4", cache_bytes=2 if on_gpu else 4)


def shapes(stage: str, params: Params) -> tuple[Shape, Shape]:
    """Of the policy and of the reward model: of the models that are there, else of the base. Raises UserError."""
    base = params.stages.pretrain
    folders = [folder for folder in ("models/sft", "models/pretrain", base.base_model) if folder]
    policy = next(filter(None, map(shape_in, folders)), None)
    if policy is None and base.base_model:
        policy = shape_of_hub(base.base_model)
    if policy is None:
        policy = Shape(f"a GPT of {base.n_layer} blocks", base.n_layer, base.n_embd, base.n_head, base.vocab_size,
                       4 * base.n_embd, base.context, "gpt_neox")
    return policy, (shape_in("models/rm") if stage == "ppo" else None) or policy


def shape_in(folder: str) -> Shape | None:
    """The shape in a folder's config.json; None where there is none. Raises UserError for one that is no decoder's."""
    import json

    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        return Shape.of(json.loads(path.read_text(encoding="utf-8")), folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no shape of a decoder: {error!r}") from None


def shape_of_hub(name: str) -> Shape:
    """The shape of a hub model, whose config.json is fetched. Raises UserError."""
    from transformers import AutoConfig

    try:
        return Shape.of(AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict(), name)
    except Exception as error:  # whatever the hub client raises without a network
        raise UserError(f"pretrain.base_model = {name!r}: its config.json cannot be read: "
                        f"{str(error).splitlines()[0]}") from None


def device(processes: int) -> tuple[str, float, int]:
    """(where a process computes, the bytes that it has there, how many devices there are)."""
    import os

    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return f"{torch.cuda.get_device_name(0)}, {total / 1e9:.0f} GB", total, torch.cuda.device_count()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = "" if processes == 1 else f", {total / processes / 1e9:.1f} GB for each process"
    return f"CPU with {total / 1e9:.1f} GB{share}", total / processes, os.cpu_count() or 1
