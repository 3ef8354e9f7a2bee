"""The model behind bench/capacity.py: parameters, FLOPs, bytes and seconds of SFT, reward model and PPO at any size.

What is counted is what the stages' code does. tests/bench/test_capacity.py holds parameters, FLOPs, state and saved
activations against torch and transformers; bench/capacity_check.py whole steps against measured ones.
"""

import dataclasses
import math
from dataclasses import dataclass

READ_TOKENS = 16_384  # rlhf/model/sampling.py: of prompts in one pass
SCORE_ROWS = 512  # rlhf/reward_model.py:SCORE_BATCH
VALID_ROWS = 256  # rlhf/sft.py:valid_loss
PASS_TOKENS = 65_536  # rlhf/data/batching.py: of a pass without gradients
LOGITS_AT_ONCE = 2**26  # rlhf/model/forward.py: of SFT's losses; PPO makes all of a micro-batch
MOVED = 3.5  # bytes of element-wise operations in a forward pass, in saved ones; counted with a dispatch mode
DECODE_OPERATIONS = 30  # small operations of a block for a token, rlhf/fast/decoder.py
OF_A_MACHINE = 8  # accelerators that are linked
GATHERED_BLOCKS = 2  # FSDP: the block at work and the one that is fetched meanwhile


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
    """A stage and its sizes. Lengths in tokens: `prompt` and `response` are means, `longest_*` the most that occur."""

    stage: str  # sft, rm, ppo
    policy: Shape
    scorer: Shape  # shape of reward and value model
    batch: int  # demonstrations, ranked prompts or rollouts a step (PPO: an iteration)
    count: int  # demonstrations, ranked prompts or episodes in all
    epochs: int  # passes (PPO: inner epochs)
    prompt: float = 250
    response: float = 150
    longest_prompt: int = 1000
    longest_response: int = 1000
    k: float = 6.0  # completions of a ranked prompt, on average
    longest_k: int = 9
    micro: int = 0  # rows a forward pass of an update; 0: all of a step's
    sampled: int = 256  # PPO: rows of the KV cache
    minibatch: int = 64  # PPO: rollouts an optimizer step
    average: bool = True  # PPO: the EMA of the weights is kept
    precision: str = "bf16"
    attention: str = "fused"  # or eager: the scores are kept
    checkpointing: bool = True
    processes: int = 1
    sharding: str = "none"  # every process has a whole copy; or fsdp
    lean: bool = False  # what the code does not do yet: casts by block, sampling from shards, idle processes
    cache_bytes: int = 2  # of a number in the KV cache: 4 on a CPU

    @property
    def shards(self) -> int:
        return self.processes if self.sharding == "fsdp" else 1

    @property
    def rows(self) -> int:
        """Of a step, which processes share evenly."""
        return self.minibatch if self.stage == "ppo" else self.batch

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response


@dataclass(frozen=True)
class Machine:
    """What an accelerator does in a second, and what it holds."""

    memory: float  # bytes
    matmul: float  # FLOP/s of matrix products, as measured or published
    traffic: float  # bytes/s of element-wise operations
    efficiency: float = 1.0  # share of both that a step reaches, measured on one point
    launch: float = 5e-6  # seconds of an operation that does next to nothing
    link: float = 450e9  # bytes/s from one to the others of a machine
    network: float = 50e9  # and beyond it


# --- counts ------------------------------------------------------------------------------------------------------

def block_matrices(shape: Shape) -> int:
    """Weights of a block's matrix products: query, key, value, output, MLP (three matrices where it is gated)."""
    mlp = (3 if shape.family == "llama" else 2) * shape.width * shape.inner
    return 2 * shape.width * (shape.width + shape.kv_width) + mlp


def parameters(shape: Shape, head: bool = True) -> int:
    """Of a causal model as `num_parameters()` counts them; without `head`, of a scorer: backbone and a row."""
    biased = 7 * shape.width + 2 * shape.kv_width + shape.inner  # two norms and four biases
    vectors = 2 * shape.width if shape.family == "llama" else biased
    final = shape.width if shape.family == "llama" else 2 * shape.width
    positions = shape.context * shape.width if shape.family == "gpt2" else 0
    table = shape.vocabulary * shape.width
    last = (0 if shape.tied else table) if head else shape.width
    return table + positions + shape.layers * (block_matrices(shape) + vectors) + final + last


def forward_flops(shape: Shape, tokens: float, seen: float, places: float, attention: str = "fused") -> float:
    """Of a pass over `tokens` in rows of `seen` tokens, with logits at `places`; a multiply-add is 2.

    The fused attention leaves out what a causal mask hides, the eager one computes it.
    """
    mixed = 4 * seen * shape.width * (0.5 if attention == "fused" else 1.0)
    return tokens * shape.layers * (2 * block_matrices(shape) + mixed) + 2 * places * shape.width * shape.vocabulary


def activation_bytes(shape: Shape, seen: float, attention: str, precision: str) -> float:
    """Saved for the backward pass by one block for one token, in a row of `seen` tokens.

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
    """Alive at once for one token in a pass without gradients: the widest moment of a block."""
    scores = 12 * seen * shape.heads if attention == "eager" else 0
    return max(26 * shape.width + scores, 10 * shape.width + 6 * shape.inner)


# --- memory ------------------------------------------------------------------------------------------------------

def weight_copies(job: Job, shape: Shape, head: bool, frozen: bool = False) -> dict[str, float]:
    """Beyond the weights themselves: bf16 casts, and what FSDP gathers in float32.

    Autocast keeps the casts of all weights that are trained until a pass ends, under FSDP and recomputing too.
    """
    table = shape.width * (shape.vocabulary + (shape.context if shape.family == "gpt2" else 0))
    by_block = frozen or job.lean
    blocks = GATHERED_BLOCKS if by_block else shape.layers
    cast = blocks * block_matrices(shape) + shape.width * shape.vocabulary * head
    gathered = GATHERED_BLOCKS * block_matrices(shape) + table if job.shards > 1 else 0
    return {"bf16 casts": 2 * cast if job.precision == "bf16" else 0, "gathered": 4 * gathered}


def training_bytes(job: Job, shape: Shape, tokens: float, seen: float, places: float, logits: float
                   ) -> dict[str, float]:
    """Of one forward and backward pass beyond weights, gradients and moments; `logits` are alive at once."""
    each = activation_bytes(shape, seen, job.attention, job.precision)
    kept = shape.layers * 4 * shape.width + each if job.checkpointing else shape.layers * each
    return {"activations": tokens * (kept + 8 * shape.width) + 4 * places * shape.width, "logits": 12 * logits,
            **weight_copies(job, shape, places > 0)}


def passing(job: Job, shape: Shape, tokens: float, seen: float, logit_bytes: float, frozen: bool = False
            ) -> dict[str, float]:
    """Of a pass without gradients: its widest block, or its logits, which come after the blocks."""
    blocks, after = tokens * passing_bytes(shape, seen, job.attention), tokens * 4 * shape.width + logit_bytes
    return {"passing": max(blocks, after), **weight_copies(job, shape, logit_bytes > 0, frozen)}


def bounded(rows: float, tokens: int) -> float:
    """Rows of `tokens` tokens that a pass without gradients takes at once."""
    return min(rows, max(1, PASS_TOKENS // tokens))


def rows_of(job: Job, rows: float) -> float:
    """Rows that one process gets of a batch."""
    return max(1, math.ceil(rows / job.processes))


def at_once(job: Job, rows: float) -> float:
    """Rows of a batch in one forward pass of a process."""
    return min(rows_of(job, rows), job.micro) if job.micro else rows_of(job, rows)


def phases(job: Job) -> dict[str, dict[str, float]]:
    """Bytes in one process at the widest moments of a stage: {moment: {what: bytes}}."""
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
    tokens = rows * (job.longest_prompt + job.longest_k * job.longest_response)  # a prompt goes through once
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
    prefill = min(READ_TOKENS, rows * job.longest_prompt) * passing_bytes(job.policy, job.longest_prompt, job.attention)
    sample = {"sampling copy": copy, "KV cache": cache, "passing": prefill,
              "logits": 24 * rows * job.policy.vocabulary}
    tokens, places = (at_once(job, job.minibatch) * length for length in (job.longest, job.longest_response))
    look = passing(job, job.policy, read * job.longest, job.longest,
                   18 * read * job.longest_response * job.policy.vocabulary)
    score = passing(job, job.scorer, scored * job.longest, job.longest, 0, frozen=True)
    gradients = {"gradients": 4 * (policy + scorer) / job.shards}
    update = training_bytes(job, job.policy, tokens, job.longest, places, places * job.policy.vocabulary)
    value = training_bytes(job, job.scorer, tokens, job.longest, 0, 0)
    return {"sample": state | sample, "log-probs": state | look, "scores": state | score,
            "update": state | gradients | max((update, value), key=lambda parts: sum(parts.values()))}


def peak(job: Job) -> tuple[str, float]:
    """(widest moment, its bytes) of a process."""
    sums = {name: sum(parts.values()) for name, parts in phases(job).items()}
    widest = max(sums, key=lambda name: sums[name])
    return widest, sums[widest]


# --- time --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """What has to be done: FLOPs, bytes of element-wise traffic, operations in a row, bytes between processes."""

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
    """A forward pass, and a backward one where `trained` (twice the forward's work, once more where recomputed)."""
    factor = (4 if job.checkpointing else 3) if trained else 1
    flops = forward_flops(shape, tokens, seen, places, job.attention)
    moved = MOVED * tokens * shape.layers * activation_bytes(shape, seen, job.attention, job.precision)
    return Work(factor * flops, factor * (moved + 8 * places * shape.vocabulary))


def step_work(shape: Shape, head: bool = True) -> Work:
    """AdamW and clipping read and write weights, gradients and moments, and bf16 copies are made anew."""
    return Work(traffic=44.0 * parameters(shape, head))


def decode_work(job: Job, rows: float, episodes: float) -> Work:
    """Sampling `episodes` responses, `rows` at a time: a step reads the weights and the cache."""
    shape, steps = job.policy, episodes / rows * job.response
    seen = job.prompt + job.response / 2
    flops = forward_flops(shape, episodes * job.response, 2 * seen, episodes * job.response)
    weights = (2 if job.precision == "bf16" else 4) * parameters(shape)
    cached = rows * seen * 2 * shape.layers * shape.kv_width * job.cache_bytes
    drawn = rows * (24 * shape.vocabulary + shape.layers * activation_bytes(shape, 1, "fused", job.precision))
    sent = steps * weights if job.lean and job.shards > 1 else 0
    return Work(flops, steps * (weights + cached + drawn), steps * shape.layers * DECODE_OPERATIONS, sent)


def stage_work(job: Job) -> tuple[Work, float]:
    """(the whole stage's work, how many processes can share it)."""
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
    """Bytes that a process sends in a run: gradients once a step, or FSDP's weights twice a pass and gradients once."""
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
    """Time of some work that `processes` share evenly; exchange is not hidden behind it (an upper bound)."""
    done = work.flops / machine.matmul + work.traffic / machine.traffic
    return (done / machine.efficiency + work.operations * machine.launch) / processes + work.sent / machine.link


def stage_seconds(job: Job, machine: Machine) -> float:
    work, busy = stage_work(job)
    reach = machine.link if job.processes <= OF_A_MACHINE else machine.network
    return seconds(work + Work(sent=exchange(job)), dataclasses.replace(machine, link=reach), busy)


def needed(job: Job, memory: float) -> Job | None:
    """The job on the least power of two of processes that have `memory` bytes each; None where none is enough.

    A batch's rows are shared evenly, so that no more processes than rows are possible, but for a lean job.
    """
    for processes in (2**power for power in range(13) if job.lean or job.rows % 2**power == 0):
        tried = dataclasses.replace(job, processes=processes, sharding="fsdp" if processes > 1 else "none")
        if peak(tried)[1] <= memory:
            return tried
    return None
