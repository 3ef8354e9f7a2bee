"""The model behind bench/capacity.py: FLOPs and seconds of SFT, reward model and PPO at any size; bytes as
rlhf/memory.py counts them.

It counts what the stages' code does. tests/bench/test_capacity.py compares FLOPs with torch; bench/capacity_check.py
compares whole steps with measurements.
"""

import dataclasses
import math
from dataclasses import dataclass

from rlhf import memory
from rlhf.memory import Parts, Shape, activation_bytes, block_matrices, parameters

MOVED = 3.5  # element-wise traffic of a forward pass / saved bytes; counted with a torch dispatch mode
DECODE_OPERATIONS = 30  # rlhf/fast/decoder.py: small operations per block and token
OF_A_MACHINE = 8  # accelerators with fast links


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
    frozen_bf16: bool = False  # PPO: weights of reference and reward model
    cache_bytes: int = 2  # of a number in the KV cache: 4 on a CPU

    @property
    def shards(self) -> int:
        return self.processes if self.sharding == "fsdp" else 1

    @property
    def rows(self) -> int:
        """Rows per step, divided evenly among the processes."""
        return self.minibatch if self.stage == "ppo" else self.batch

    def memory(self) -> memory.Job:
        """What decides its bytes."""
        return memory.Job(
            stage=self.stage, policy=self.policy, scorer=self.scorer, rows=self.rows, batch=self.batch,
            prompt=self.longest_prompt, response=self.longest_response, k=self.longest_k, micro=self.micro,
            sampled=self.sampled, average=self.average, bf16=self.precision == "bf16", eager=self.attention == "eager",
            checkpointing=self.checkpointing, processes=self.processes, shard=self.sharding == "fsdp",
            frozen_bf16=self.frozen_bf16, cache_bytes=self.cache_bytes)




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

def forward_flops(shape: Shape, tokens: float, seen: float, places: float, attention: str = "fused") -> float:
    """FLOPs of a forward pass over `tokens` in rows of `seen` tokens, with logits at `places`; a multiply-add is 2.

    Fused attention skips what the causal mask hides, eager attention computes it.
    """
    mixed = 4 * seen * shape.width * (0.5 if attention == "fused" else 1.0)
    return tokens * shape.layers * (2 * block_matrices(shape) + mixed) + 2 * places * shape.width * shape.vocabulary


# --- memory ------------------------------------------------------------------------------------------------------

def phases(job: Job) -> dict[str, Parts]:
    """Bytes of one process at the moments of a stage: {moment: {part: bytes}}."""
    return memory.moments(job.memory())


def peak(job: Job) -> tuple[str, float]:
    """(moment of the memory peak, its bytes) of a process."""
    return memory.peak(job.memory())


def rows_of(job: Job, rows: float) -> float:
    """Rows of a batch per process."""
    return max(1, math.ceil(rows / job.processes))


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
    each = activation_bytes(shape, seen, job.attention == "eager", job.precision == "bf16")
    moved = MOVED * tokens * shape.layers * each
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
    drawn = rows * (24 * shape.vocabulary + shape.layers * activation_bytes(shape, 1, False, job.precision == "bf16"))
    return Work(flops, steps * (weights + cached + drawn), steps * shape.layers * DECODE_OPERATIONS)


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

    The rows of a batch are divided evenly, so there can be no more processes than rows.
    """
    for processes in (2**power for power in range(13) if job.rows % 2**power == 0):
        sharded = dataclasses.replace(job, processes=processes, sharding="fsdp" if processes > 1 else "none")
        if peak(sharded)[1] <= memory:
            return sharded
    return None
