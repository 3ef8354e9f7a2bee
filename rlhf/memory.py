"""Bytes of one process at each moment of SFT, reward model and PPO, by arithmetic: before anything is loaded.

`moments(job)` counts what the stages' code holds; `python -m tasks.ppo --memory` prints it for a profile.
tests/bench/test_capacity.py compares parameters, state and saved activations with torch and transformers,
bench/sharded_memory.py whole moments with the bytes of real processes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFILL_TOKENS = 16_384  # rlhf/model/sampling.py
SCORE_ROWS = 512  # rlhf/model/scoring.py:SCORE_BATCH
VALID_ROWS = 256  # rlhf/sft.py:valid_loss
PASS_TOKENS = 65_536  # rlhf/data/batching.py: tokens of a forward pass without gradients
LOGITS_AT_ONCE = 2**26  # rlhf/model/forward.py
GATHERED_BLOCKS = 2  # FSDP: the current block and the prefetched one
GATED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "smollm3")

Parts = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A decoder: `family` gpt2 (learned positions, biases), gpt_neox (rotary, biases) or llama (gated, no biases;
    `qkv_bias` adds Qwen2's)."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    inner: int
    context: int = 2048
    family: str = "gpt2"
    kv_heads: int = 0
    tied: bool = True
    qkv_bias: bool = False

    @property
    def kv_width(self) -> int:
        return self.width * (self.kv_heads or self.heads) // self.heads

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str = "") -> "Shape":
        """From a config.json. Raises KeyError for one that is no decoder's."""
        family = str(config["model_type"])
        if family == "gpt2":
            width = int(config["n_embd"])
            return cls(name, int(config["n_layer"]), width, int(config["n_head"]), int(config["vocab_size"]),
                       int(config.get("n_inner") or 4 * width), int(config["n_positions"]), "gpt2", 0,
                       bool(config.get("tie_word_embeddings", True)))
        return cls(name, int(config["num_hidden_layers"]), int(config["hidden_size"]),
                   int(config["num_attention_heads"]), int(config["vocab_size"]), int(config["intermediate_size"]),
                   int(config.get("max_position_embeddings", 2048)), "gpt_neox" if family == "gpt_neox" else "llama",
                   int(config.get("num_key_value_heads") or 0), bool(config.get("tie_word_embeddings", False)),
                   family == "qwen2")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage and what its memory depends on. Lengths in tokens, the longest that occur; `rows`: of an optimizer step;
    `micro` and `micro_tokens`: rows and tokens of a forward pass, 0: all rows of a process."""

    stage: str  # sft, rm, ppo
    policy: Shape  # of a reward-model stage: the reward model's
    scorer: Shape  # PPO: of reward and value model
    rows: int
    batch: int = 0  # PPO: rollouts of an iteration
    prompt: int = 1000
    response: int = 1000
    k: int = 9  # completions of a ranked prompt
    looked_at: int = 512  # rows that are scored, or whose loss is measured, at most
    micro: int = 0
    micro_tokens: int = 0
    sampled: int = 256  # PPO: rows of the KV cache
    average: bool = False  # PPO: a moving average of the weights
    bf16: bool = True  # passes
    eager: bool = False  # attention that stores its scores: on a CPU
    checkpointing: bool = True
    offload_activations: bool = False
    processes: int = 1
    shard: bool = False
    tensor_parallel: int = 1  # processes of a group, which takes the rows of one
    cpu_offload: bool = False
    frozen_bf16: bool = False  # PPO: weights of reference and reward model
    frozen_on_cpu: bool = False
    lora_rank: int = 0
    lora_bf16: bool = False  # the frozen base under the adapters
    lora_nf4: bool = False  # its linear layers; the rest is in the precision of the passes
    one_base: bool = False  # PPO with LoRA: of all models
    cache_bytes: int = 2  # of a number in the KV cache: 4 on a CPU

    @property
    def shards(self) -> int:
        return self.processes if self.shard else 1

    @property
    def replicas(self) -> int:
        """How many processes, or tensor-parallel groups of them, share the rows."""
        return self.processes // self.tensor_parallel

    @property
    def longest(self) -> int:
        return self.prompt + self.response


# --- counts ----------------------------------------------------------------------------------------------------------

def block_matrices(shape: Shape) -> int:
    """Weights of a block's matrix products: query, key, value, output, MLP (three matrices if gated)."""
    mlp = (3 if shape.family == "llama" else 2) * shape.width * shape.inner
    return 2 * shape.width * (shape.width + shape.kv_width) + mlp


def block_parameters(shape: Shape) -> int:
    """All parameters of a block."""
    biased = 7 * shape.width + 2 * shape.kv_width + shape.inner  # two norms and four biases
    vectors = 2 * shape.width + shape.qkv_bias * (shape.width + 2 * shape.kv_width)
    return block_matrices(shape) + (vectors if shape.family == "llama" else biased)


def outside_blocks(shape: Shape, head: bool = True) -> int:
    """Parameters outside the blocks: embeddings, positions, last norm, output layer or (without `head`) one row."""
    final = shape.width if shape.family == "llama" else 2 * shape.width
    positions = shape.context * shape.width if shape.family == "gpt2" else 0
    table = shape.vocabulary * shape.width
    return table + positions + final + ((0 if shape.tied else table) if head else shape.width)


def parameters(shape: Shape, head: bool = True) -> int:
    """Parameters of a causal model as `num_parameters()` counts them; without `head`: backbone and one row."""
    return shape.layers * block_parameters(shape) + outside_blocks(shape, head)


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA adapters of all linear layers of the blocks: rank times (inputs + outputs) of each."""
    width, inner, attention = shape.width, shape.inner, shape.width + 2 * shape.kv_width
    projections = (3 * width + attention if shape.family == "llama" else width + attention) + 2 * width
    mlp = (3 if shape.family == "llama" else 2) * (width + inner)
    return shape.layers * rank * (projections + mlp)


def activation_bytes(shape: Shape, seen: float, eager: bool, bf16: bool, group: int = 1) -> float:
    """Bytes that one block saves for the backward pass, per token, in a row of `seen` tokens; in each process of a
    tensor-parallel `group`.

    Counted with saved-tensor hooks on transformers 5.23 models under autocast; residual stream and norms are float32,
    and whole in every process.
    """
    wide, inner = {"gpt_neox": ((16 if eager else 22) if bf16 else (28 if eager else 40), 4 if bf16 else 8),
                   "gpt2": (20 if bf16 else 32, 10 if bf16 else 20),
                   "llama": (34 if bf16 else 40, 8 if bf16 else 16)}[shape.family]
    scores = (6 if bf16 else 4) * seen if eager else 7
    of_heads = 8 if bf16 else 16  # of `wide`: queries, keys, values and what attention mixes of them
    return (wide - of_heads * (1 - 1 / group)) * shape.width + (inner * shape.inner + scores * shape.heads) / group


def passing_bytes(shape: Shape, seen: float, eager: bool, group: int = 1) -> float:
    """Peak bytes per token of a block in a pass without gradients, in each process of a tensor-parallel `group`."""
    scores = 12 * seen * shape.heads / group if eager else 0
    return max(26 * shape.width + scores, 10 * shape.width + 6 * shape.inner / group)


# --- a model ---------------------------------------------------------------------------------------------------------

def trained(job: Job, shape: Shape, head: bool) -> tuple[float, float]:
    """(parameters that are trained, bytes of those that are not) of a model that the stage trains, of one process."""
    count = parameters(shape, head)
    if not job.lora_rank:
        return count / job.shards, 0.0
    small = adapter_parameters(shape, job.lora_rank) + (0 if head else shape.width)
    if job.lora_nf4:
        return small, nf4_bytes(job, shape, head)
    return small / job.shards, count * (2 if job.lora_bf16 else 4) / job.shards


def nf4_bytes(job: Job, shape: Shape, head: bool) -> float:
    """Of a base in NF4: 4 bits a number, a byte for each 64, 4 for each 256 of those, a layer's table of scales; the
    rest is not in NF4."""
    held, tables = shape.layers * block_matrices(shape), shape.layers * (7 if shape.family == "llama" else 4)
    rest = (parameters(shape, head) - held) * (2 if job.bf16 else 4)
    return held * (0.5 + 1 / 64 + 4 / (64 * 256)) + 1028 * tables + rest


def dequantised_bytes(job: Job, shape: Shape) -> float:
    """Of the largest layer of a base in NF4, while a pass computes it: in the pass's precision, and its scales."""
    largest = shape.width * max(shape.inner, 3 * shape.width if shape.family != "llama" else shape.width)
    return largest * ((2 if job.bf16 else 4) + 4 / 64)


def state(job: Job, shape: Shape, head: bool) -> Parts:
    """Weights and AdamW's moments of a model that the stage trains."""
    count, frozen = trained(job, shape, head)
    return {"weights": 4 * count + frozen, "moments": 8 * count}


def frozen(job: Job, shape: Shape, head: bool) -> float:
    """Bytes of a model that PPO only asks."""
    narrow = job.frozen_bf16 or (job.lora_rank > 0 and (job.lora_bf16 or (job.lora_nf4 and job.bf16)))
    return parameters(shape, head) * (2 if narrow else 4) / job.shards


def copies(job: Job, shape: Shape, head: bool, gradients: bool) -> Parts:
    """Bytes of a pass beyond the weights: what FSDP2 gathers in the passes' precision, with `gradients` also the sums
    of a unit's gradients before they are split; without shards the bf16 casts that autocast keeps until a pass ends,
    of all trained weights, of frozen ones of one layer."""
    width = 2 if job.bf16 else 4
    if job.shards > 1:
        unit, outside = block_parameters(shape) / job.tensor_parallel, outside_blocks(shape, head)
        sums = {"gradients of a block": (width + 4.0) * max(unit, outside)} if gradients and not job.lora_rank else {}
        return {"gathered": width * (GATHERED_BLOCKS * unit + outside)} | sums
    if job.lora_nf4:
        return {"dequantised layer": dequantised_bytes(job, shape)}
    if not job.bf16 or (job.lora_rank and job.lora_bf16):  # nothing to cast
        return {}
    kept = shape.layers * block_matrices(shape) if gradients and not job.lora_rank else 2 * block_matrices(shape)
    return {"bf16 casts": 2.0 * (kept + shape.width * shape.vocabulary * head)}


def training(job: Job, shape: Shape, tokens: float, places: float, head: bool) -> Parts:
    """Bytes of a forward and backward pass beyond weights and moments; logits are of `places` tokens."""
    each = activation_bytes(shape, job.longest, job.eager, job.bf16, job.tensor_parallel)
    inputs = shape.layers * 4 * shape.width * (not job.offload_activations)
    saved = inputs + each if job.checkpointing else shape.layers * each
    count, _ = trained(job, shape, head)
    logits = 12.0 * min(LOGITS_AT_ONCE, places * shape.vocabulary) if head else 0.0
    return {"activations": tokens * (saved + 8 * shape.width) + 4 * places * shape.width, "logits": logits,
            "gradients": 4 * count, **copies(job, shape, head, True)}


def passing(job: Job, shape: Shape, tokens: float, logit_bytes: float) -> Parts:
    """Bytes of a pass without gradients: of a block, or of the logits after all blocks."""
    blocks = tokens * passing_bytes(shape, job.longest, job.eager, job.tensor_parallel)
    after = tokens * 4 * shape.width + logit_bytes
    return {"passing": max(blocks, after), **copies(job, shape, logit_bytes > 0, False)}


def bounded(rows: float, tokens: int) -> float:
    """Rows of `tokens` tokens in one pass without gradients."""
    return min(rows, max(1, PASS_TOKENS // tokens))


def at_once(job: Job, length: int) -> float:
    """Rows of `length` tokens in a forward pass with gradients."""
    rows = max(1, math.ceil(job.rows / job.replicas))
    rows = min(rows, job.micro) if job.micro else rows
    return min(rows, max(1, job.micro_tokens // length)) if job.micro_tokens else rows


# --- the moments -----------------------------------------------------------------------------------------------------

def moments(job: Job) -> dict[str, Parts]:
    """{moment: {part: bytes}} of one process, in the order of the stage: on the device; what is kept on the CPU is
    left out."""
    found = {"sft": _sft, "rm": _reward_model, "ppo": _ppo}[job.stage](job)
    if job.cpu_offload and job.shards > 1:
        for parts in found.values():
            for name in ("weights", "moments", "gradients", "average"):
                parts.pop(name, None)
    return found


def loading(job: Job, shape: Shape, head: bool) -> Parts:
    """A model while it is loaded: its own weights, and one tensor of the file (all of it without shards)."""
    count, frozen_bytes = trained(job, shape, head)
    largest = max(shape.width * shape.inner, shape.vocabulary * shape.width)
    return {"weights": 4 * count + frozen_bytes, "read": 4.0 * largest / job.shards}


def saving(job: Job, shape: Shape, head: bool) -> Parts:
    """A model while it is saved from shards: one whole tensor after the other."""
    largest = max(shape.width * shape.inner, shape.vocabulary * shape.width)
    return {"a whole tensor": 8.0 * largest if job.shards > 1 else 0.0}


def _sft(job: Job) -> dict[str, Parts]:
    shape, own = job.policy, state(job, job.policy, True)
    rows, valid = at_once(job, job.longest), bounded(min(VALID_ROWS, job.looked_at), job.longest)
    logits = min(LOGITS_AT_ONCE, valid * job.response * shape.vocabulary)
    look = passing(job, shape, valid * job.longest, (3 if job.eager else 10) * logits)  # a CPU's in parts
    return {"load": loading(job, shape, True), "valid loss": own | look,
            "update": own | training(job, shape, rows * job.longest, rows * job.response, True),
            "save": own | saving(job, shape, True)}


def _reward_model(job: Job) -> dict[str, Parts]:
    shape, own = job.policy, state(job, job.policy, False)
    rows = at_once(job, job.k * job.longest)
    tokens = rows * (job.prompt + job.k * job.response)  # a prompt is computed once
    look = passing(job, shape, bounded(min(SCORE_ROWS, job.looked_at), job.longest) * job.longest, 0)
    return {"load": loading(job, shape, False), "update": own | training(job, shape, tokens, 0, False),
            "scores": own | look, "save": own | saving(job, shape, False)}


def _ppo(job: Job) -> dict[str, Parts]:
    policy, scorer = job.policy, job.scorer
    both = [state(job, policy, True), state(job, scorer, False)]
    own = {name: sum(parts[name] for parts in both) for name in ("weights", "moments")}
    reference = 0.0 if job.lora_rank else frozen(job, policy, True)
    reward = frozen(job, scorer, False)
    if job.one_base:  # adapters and heads are all that value and reward model have of their own
        own["weights"] -= trained(job, scorer, False)[1]
        reward = 4.0 * trained(job, scorer, False)[0]
    average = {"average": 4 * trained(job, policy, True)[0] * job.average}
    own |= average | ({} if job.frozen_on_cpu else {"reference": reference, "reward model": reward})
    asked = {"reference": reference} if job.frozen_on_cpu and job.shards == 1 else {}
    judged = {"reward model": reward} if job.frozen_on_cpu and job.shards == 1 else {}
    mine = max(1, math.ceil((job.batch or job.rows) / job.replicas))
    rows = min(job.sampled, math.ceil(mine / job.tensor_parallel))
    cache = rows * job.longest * 2 * policy.layers * policy.kv_width * job.cache_bytes
    prefill = min(PREFILL_TOKENS, rows * job.prompt) * passing_bytes(policy, job.prompt, job.eager)
    copied = parameters(policy) * (2 if job.bf16 else 0 if job.shards == 1 else 4)
    table = 4 * policy.width * policy.vocabulary if job.shards > 1 else 0  # embeddings stay float32
    sample = {"sampling copy": copied + table, "KV cache": cache, "passing": prefill,
              "logits": 24.0 * rows * policy.vocabulary}
    read = min(4 * at_once(job, job.longest), mine)
    look = passing(job, policy, read * job.longest, 18 * min(LOGITS_AT_ONCE, read * job.response * policy.vocabulary))
    score = passing(job, scorer, bounded(min(SCORE_ROWS, mine), job.longest) * job.longest, 0)
    tokens, places = (at_once(job, job.longest) * length for length in (job.longest, job.response))
    passes = [training(job, policy, tokens, places, True), training(job, scorer, tokens, 0, False)]
    update = max(passes, key=lambda parts: sum(parts.values()))
    update = update | {"gradients": sum(parts["gradients"] for parts in passes)}
    return {"load": own | {"moments": 0.0, "read": loading(job, policy, True)["read"]}, "sample": own | sample,
            "log-probs": own | asked | look, "scores": own | judged | score, "update": own | update,
            "save": own | saving(job, policy, True)}


def peak(job: Job) -> tuple[str, float]:
    """(moment of the most memory, its bytes) of a process."""
    sums = {name: sum(parts.values()) for name, parts in moments(job).items()}
    widest = max(sums, key=lambda name: sums[name])
    return widest, sums[widest]
