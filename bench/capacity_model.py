"""The model behind bench/capacity.py: parameters, FLOPs, bytes and seconds of SFT, reward model and PPO at any size.

It counts what the stages' code does. tests/bench/test_capacity.py compares parameters, FLOPs, state and saved
activations with torch and transformers; bench/capacity_check.py compares whole steps with measurements.
"""

import dataclasses
import math
from dataclasses import dataclass

PREFILL_TOKENS = 16_384  # rlhf/model/sampling.py: prompt tokens of one forward pass
SCORE_ROWS = 512  # rlhf/model/scoring.py:SCORE_BATCH
VALID_ROWS = 256  # rlhf/sft.py:valid_loss
PASS_TOKENS = 65_536  # rlhf/data/batching.py: tokens of a forward pass without gradients
LOGITS_AT_ONCE = 2**26  # rlhf/model/forward.py
MOVED = 3.5  # element-wise traffic of a forward pass / saved bytes; counted with a torch dispatch mode
DECODE_OPERATIONS = 30  # rlhf/fast/decoder.py: small operations per block and token
OF_A_MACHINE = 8  # accelerators with fast links
GATHERED_BLOCKS = 2  # FSDP: the current block and the prefetched one


@dataclass(frozen=True)
class Shape:
    """A decoder: `family` gpt2 (learned positions, biases), gpt_neox (rotary, biases) or llama (gated, no biases)."""

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

    @property
    def kv_width(self) -> int:
        return self.width * (self.kv_heads or self.heads) // self.heads


@dataclass(frozen=True)
class Job:
    """A stage and its sizes. Lengths in tokens: `prompt` and `response` are means, `longest_*` maxima."""

    stage: str  # sft, rm, ppo
    policy: Shape
    scorer: Shape  # shape of reward and value model
    batch: int  # demonstrations, ranked prompts or rollouts per step (PPO: per iteration)
    count: int  # demonstrations, ranked prompts or episodes in total
    epochs: int  # passes (PPO: inner epochs)
    prompt: float = 250
    response: float = 150
    longest_prompt: int = 1000
    longest_response: int = 1000
    k: float = 6.0  # completions of a ranked prompt, on average
    longest_k: int = 9
    micro: int = 0  # rows per forward pass of an update; 0: all of a step's
    sampled: int = 256  # PPO: rows of the KV cache
    minibatch: int = 64  # PPO: rollouts per optimizer step
    average: bool = True  # PPO: keep an EMA of the weights
    precision: str = "bf16"
    attention: str = "fused"  # or eager, which stores the attention scores
    checkpointing: bool = True
    processes: int = 1
    sharding: str = "none"  # every process has all weights; or fsdp
    lean: bool = False  # with optimisations that the code lacks: casts by block, sampling from shards, idle processes
    cache_bytes: int = 2  # of a number in the KV cache: 4 on a CPU

    @property
    def shards(self) -> int:
        return self.processes if self.sharding == "fsdp" else 1

    @property
    def rows(self) -> int:
        """Rows per step, divided evenly among the processes."""
        return self.minibatch if self.stage == "ppo" else self.batch

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response


@dataclass(frozen=True)
class Machine:
    """Memory and rates of an accelerator."""

    memory: float  # bytes
    matmul: float  # FLOP/s of matrix products, measured or published
    traffic: float  # bytes/s of element-wise operations
    efficiency: float = 1.0  # share of both rates that a step reaches
    launch: float = 5e-6  # seconds of overhead per operation
    link: float = 450e9  # bytes/s within a machine
    network: float = 50e9  # bytes/s between machines


# --- counts ------------------------------------------------------------------------------------------------------

def block_matrices(shape: Shape) -> int:
    """Weights of a block's matrix products: query, key, value, output, MLP (three matrices if gated)."""
    mlp = (3 if shape.family == "llama" else 2) * shape.width * shape.inner
    return 2 * shape.width * (shape.width + shape.kv_width) + mlp


def parameters(shape: Shape, head: bool = True) -> int:
    """Parameters of a causal model as `num_parameters()` counts them; without `head`: backbone and one row."""
    biased = 7 * shape.width + 2 * shape.kv_width + shape.inner  # two norms and four biases
    vectors = 2 * shape.width if shape.family == "llama" else biased
    final = shape.width if shape.family == "llama" else 2 * shape.width
    positions = shape.context * shape.width if shape.family == "gpt2" else 0
    table = shape.vocabulary * shape.width
    last = (0 if shape.tied else table) if head else shape.width
    return table + positions + shape.layers * (block_matrices(shape) + vectors) + final + last


def forward_flops(shape: Shape, tokens: float, seen: float, places: float, attention: str = "fused") -> float:
    """FLOPs of a forward pass over `tokens` in rows of `seen` tokens, with logits at `places`; a multiply-add is 2.

    Fused attention skips what the causal mask hides, eager attention computes it.
    """
    mixed = 4 * seen * shape.width * (0.5 if attention == "fused" else 1.0)
    return tokens * shape.layers * (2 * block_matrices(shape) + mixed) + 2 * places * shape.width * shape.vocabulary


def activation_bytes(shape: Shape, seen: float, attention: str, precision: str) -> float:
    """Bytes that one block saves for the backward pass, per token, in a row of `seen` tokens.

    Counted with saved-tensor hooks on transformers 5.23 models under autocast; residual stream and norms are float32.
    """
    bf16 = precision == "bf16"
    wide, inner = {"gpt_neox": ((16 if attention == "eager" else 22) if bf16 else (28 if attention == "eager" else 40),
                                4 if bf16 else 8),
                   "gpt2": (20 if bf16 else 32, 10 if bf16 else 20),
                   "llama": (34 if bf16 else 40, 8 if bf16 else 16)}[shape.family]
    scores = (6 if bf16 else 4) * seen if attention == "eager" else 7
    return wide * shape.width + inner * shape.inner + scores * shape.heads


def passing_bytes(shape: Shape, seen: float, attention: str) -> float:
    """Peak bytes per token of a block in a pass without gradients."""
    scores = 12 * seen * shape.heads if attention == "eager" else 0
    return max(26 * shape.width + scores, 10 * shape.width + 6 * shape.inner)


# --- memory ------------------------------------------------------------------------------------------------------

def weight_copies(job: Job, shape: Shape, head: bool, frozen: bool = False) -> dict[str, float]:
    """Bytes beyond the weights themselves: bf16 casts, and float32 weights that FSDP gathers.

    Autocast keeps the casts of all trained weights until the end of a pass, also with FSDP and gradient checkpointing.
    """
    table = shape.width * (shape.vocabulary + (shape.context if shape.family == "gpt2" else 0))
    by_block = frozen or job.lean
    blocks = GATHERED_BLOCKS if by_block else shape.layers
    cast = blocks * block_matrices(shape) + shape.width * shape.vocabulary * head
    gathered = GATHERED_BLOCKS * block_matrices(shape) + table if job.shards > 1 else 0
    return {"bf16 casts": 2 * cast if job.precision == "bf16" else 0, "gathered": 4 * gathered}


def training_bytes(job: Job, shape: Shape, tokens: float, seen: float, places: float, logits: float
                   ) -> dict[str, float]:
    """Bytes of a forward and backward pass beyond weights, gradients and moments; `logits`: number held at once."""
    each = activation_bytes(shape, seen, job.attention, job.precision)
    saved = shape.layers * 4 * shape.width + each if job.checkpointing else shape.layers * each
    return {"activations": tokens * (saved + 8 * shape.width) + 4 * places * shape.width, "logits": 12 * logits,
            **weight_copies(job, shape, places > 0)}


def passing(job: Job, shape: Shape, tokens: float, seen: float, logit_bytes: float, frozen: bool = False
            ) -> dict[str, float]:
    """Bytes of a pass without gradients: of a block, or of the logits after all blocks."""
    blocks, after = tokens * passing_bytes(shape, seen, job.attention), tokens * 4 * shape.width + logit_bytes
    return {"passing": max(blocks, after), **weight_copies(job, shape, logit_bytes > 0, frozen)}


def bounded(rows: float, tokens: int) -> float:
    """Rows of `tokens` tokens in one pass without gradients."""
    return min(rows, max(1, PASS_TOKENS // tokens))


def rows_of(job: Job, rows: float) -> float:
    """Rows of a batch per process."""
    return max(1, math.ceil(rows / job.processes))


def at_once(job: Job, rows: float) -> float:
    """Rows per forward pass of a process."""
    return min(rows_of(job, rows), job.micro) if job.micro else rows_of(job, rows)


def phases(job: Job) -> dict[str, dict[str, float]]:
    """Bytes of one process at the memory peaks of a stage: {moment: {part: bytes}}."""
    if job.stage == "ppo":
        return _ppo_phases(job)
    shape = job.policy
    count = parameters(shape, head=job.stage == "sft")
    state = {"weights": 4 * count / job.shards, "moments": 8 * count / job.shards}
    gradients = {"gradients": 4 * count / job.shards}
    if job.stage == "sft":
        rows, valid = at_once(job, job.batch), bounded(VALID_ROWS, job.longest)
        places = rows * job.longest_response
        update = training_bytes(job, shape, rows * job.longest, job.longest, places,
                                min(LOGITS_AT_ONCE, places * shape.vocabulary))
        logits = min(LOGITS_AT_ONCE, valid * job.longest_response * shape.vocabulary)
        look = passing(job, shape, valid * job.longest, job.longest, 10 * logits)
        head = {"gradients": 6 * shape.width * shape.vocabulary / job.shards}
        return {"forward": state | update | head, "step": state | gradients, "valid loss": state | look}
    rows = at_once(job, job.batch)
    tokens = rows * (job.longest_prompt + job.longest_k * job.longest_response)  # a prompt is computed once
    update = training_bytes(job, shape, tokens, job.longest, 0, 0)
    look = passing(job, shape, bounded(SCORE_ROWS, job.longest) * job.longest, job.longest, 0)
    return {"forward": state | update, "step": state | gradients, "scores": state | look}


def _ppo_phases(job: Job) -> dict[str, dict[str, float]]:
    policy, scorer = parameters(job.policy), parameters(job.scorer, head=False)
    state = {"weights": 4 * policy / job.shards, "reference": 4 * policy / job.shards,
             "reward and value model": 8 * scorer / job.shards, "moments": 8 * (policy + scorer) / job.shards,
             "average": 4 * policy / job.shards * job.average}
    mine = rows_of(job, job.batch)
    rows, read = min(job.sampled, mine), min(4 * at_once(job, job.minibatch), mine)
    scored = bounded(min(SCORE_ROWS, mine), job.longest)
    copy: float = (2 if job.precision == "bf16" else 0) * policy
    if job.shards > 1:
        copy = copy / job.shards if job.lean else copy + 4 * policy  # gathered, then copied
    cache = rows * job.longest * 2 * job.policy.layers * job.policy.kv_width * job.cache_bytes
    prefill_tokens = min(PREFILL_TOKENS, rows * job.longest_prompt)
    prefill = prefill_tokens * passing_bytes(job.policy, job.longest_prompt, job.attention)
    sample = {"sampling copy": copy, "KV cache": cache, "passing": prefill,
              "logits": 24 * rows * job.policy.vocabulary}
    tokens, places = (at_once(job, job.minibatch) * length for length in (job.longest, job.longest_response))
    look = passing(job, job.policy, read * job.longest, job.longest,
                   18 * min(LOGITS_AT_ONCE, read * job.longest_response * job.policy.vocabulary))
    score = passing(job, job.scorer, scored * job.longest, job.longest, 0, frozen=True)
    gradients = {"gradients": 4 * (policy + scorer) / job.shards}
    update = training_bytes(job, job.policy, tokens, job.longest, places,
                            min(LOGITS_AT_ONCE, places * job.policy.vocabulary))
    value = training_bytes(job, job.scorer, tokens, job.longest, 0, 0)
    return {"sample": state | sample, "log-probs": state | look, "scores": state | score,
            "update": state | gradients | max((update, value), key=lambda parts: sum(parts.values()))}


def peak(job: Job) -> tuple[str, float]:
    """(moment of the memory peak, its bytes) of a process."""
    sums = {name: sum(parts.values()) for name, parts in phases(job).items()}
    widest = max(sums, key=lambda name: sums[name])
    return widest, sums[widest]


# --- time --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """FLOPs, bytes of element-wise traffic, sequential operations, bytes sent between processes."""

    flops: float = 0.0
    traffic: float = 0.0
    operations: float = 0.0
    sent: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(one + two for one, two in pairs))

    def times(self, factor: float) -> "Work":
        return Work(*(factor * value for value in dataclasses.astuple(self)))


def pass_work(job: Job, shape: Shape, tokens: float, seen: float, places: float, trained: bool) -> Work:
    """A forward pass, and a backward pass if `trained` (2 times the forward's work, 3 with checkpointing)."""
    factor = (4 if job.checkpointing else 3) if trained else 1
    flops = forward_flops(shape, tokens, seen, places, job.attention)
    moved = MOVED * tokens * shape.layers * activation_bytes(shape, seen, job.attention, job.precision)
    return Work(factor * flops, factor * (moved + 8 * places * shape.vocabulary))


def step_work(shape: Shape, head: bool = True) -> Work:
    """AdamW and clipping read and write weights, gradients and moments; the bf16 casts are made again."""
    return Work(traffic=44.0 * parameters(shape, head))


def decode_work(job: Job, rows: float, episodes: float) -> Work:
    """Sampling of `episodes` responses, `rows` at a time: each step reads the weights and the KV cache."""
    shape, steps = job.policy, episodes / rows * job.response
    seen = job.prompt + job.response / 2
    flops = forward_flops(shape, episodes * job.response, 2 * seen, episodes * job.response)
    weights = (2 if job.precision == "bf16" else 4) * parameters(shape)
    cached = rows * seen * 2 * shape.layers * shape.kv_width * job.cache_bytes
    drawn = rows * (24 * shape.vocabulary + shape.layers * activation_bytes(shape, 1, "fused", job.precision))
    sent = steps * weights if job.lean and job.shards > 1 else 0
    return Work(flops, steps * (weights + cached + drawn), steps * shape.layers * DECODE_OPERATIONS, sent)


def stage_work(job: Job) -> tuple[Work, float]:
    """(work of the whole stage, number of processes that can share it)."""
    rows = job.prompt + job.response
    if job.stage == "sft":
        steps = job.count * job.epochs / job.batch
        once = pass_work(job, job.policy, job.count * rows, rows, job.count * job.response, True)
        return once.times(job.epochs) + step_work(job.policy).times(steps), min(job.processes, job.rows)
    if job.stage == "rm":
        tokens = job.count * (job.prompt + job.k * job.response)
        steps = job.count * job.epochs / job.batch
        return (pass_work(job, job.policy, tokens, rows, 0, True).times(job.epochs)
                + step_work(job.policy, False).times(steps), min(job.processes, job.rows))
    tokens, places = job.count * rows, job.count * job.response
    mine = min(job.sampled, rows_of(job, job.batch))
    read = pass_work(job, job.policy, job.count * job.prompt, job.prompt, job.count, False)
    looks = (pass_work(job, job.policy, tokens, rows, places, False).times(2)
             + pass_work(job, job.scorer, tokens, rows, 0, False).times(2))
    update = (pass_work(job, job.policy, tokens, rows, places, True)
              + pass_work(job, job.scorer, tokens, rows, 0, True)).times(job.epochs)
    updates = (step_work(job.policy) + step_work(job.scorer, False)).times(job.epochs * job.count / job.minibatch)
    return decode_work(job, mine, job.count) + read + looks + update + updates, min(job.processes, job.rows)


def exchange(job: Job) -> float:
    """Bytes that a process sends: gradients once per step; with FSDP weights twice and gradients once per pass."""
    if job.processes == 1:
        return 0.0
    models = [parameters(job.policy)] + ([parameters(job.scorer, False)] if job.stage == "ppo" else [])
    epochs = job.epochs * job.count
    steps = epochs / (job.minibatch if job.stage == "ppo" else job.batch)
    if job.shards == 1:
        return 8.0 * sum(models) * steps
    passes = max(steps, epochs / job.processes / job.micro) if job.micro else steps
    looks = 2.0 * 2 * sum(models) * passes / 4 if job.stage == "ppo" else 0.0
    return 8.0 * sum(models) * max(passes, steps) + looks


def seconds(work: Work, machine: Machine, processes: float = 1) -> float:
    """Seconds of work that `processes` share evenly; communication does not overlap with it (an upper bound)."""
    done = work.flops / machine.matmul + work.traffic / machine.traffic
    return (done / machine.efficiency + work.operations * machine.launch) / processes + work.sent / machine.link


def stage_seconds(job: Job, machine: Machine) -> float:
    work, busy = stage_work(job)
    reach = machine.link if job.processes <= OF_A_MACHINE else machine.network
    return seconds(work + Work(sent=exchange(job)), dataclasses.replace(machine, link=reach), busy)


def needed(job: Job, memory: float) -> Job | None:
    """The job on the smallest power of two of processes with `memory` bytes each; None if no number suffices.

    The rows of a batch are divided evenly, so there can be no more processes than rows, except for a lean job.
    """
    for processes in (2**power for power in range(13) if job.lean or job.rows % 2**power == 0):
        sharded = dataclasses.replace(job, processes=processes, sharding="fsdp" if processes > 1 else "none")
        if peak(sharded)[1] <= memory:
            return sharded
    return None
