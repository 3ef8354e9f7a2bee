"""Measures the stages' real code on small models, to check the predictions of bench/capacity.py.

    python bench/capacity.py --check        # predicted / measured memory and time; three minutes on an idle core

Memory on a CPU: the peak of the resident set minus its size before the model was made, after the imports and the same
steps of a tiny model. Time: CPU time of one thread, which other programs disturb little; it is calibrated on one
measurement and predicted for the others.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capacity_model import Job, Machine, peak, seconds, stage_work

from rlhf.memory import SCORE_ROWS, VALID_ROWS, Shape

TINY = "tiny"  # runs before the baseline of the memory is taken
SHAPES = {TINY: Shape(TINY, 1, 32, 2, 1024, 64, 256, "gpt_neox"),
          "1M": Shape("1M", 4, 128, 4, 1024, 512, 256, "gpt_neox"),
          "10M": Shape("10M", 6, 384, 6, 1024, 1536, 256, "gpt_neox"),
          "30M": Shape("30M", 9, 512, 8, 2048, 2048, 256, "gpt_neox")}
PROMPT, RESPONSE, K = 48, 48, 6
BATCH = {"sft": 32, "rm": 8, "ppo": 32}
MICRO = 16
CALIBRATED_ON = ("10M", "sft")
ROW = "| {:5} | {:5} | {:>13} | {:>12} | {:>5} | {:>11} | {:>10} | {:>5} |"


def point(shape: Shape, stage: str) -> Job:
    """The job of one measurement: one step, or one iteration of PPO; all texts have the same length."""
    return Job(stage, shape, shape, BATCH[stage], BATCH[stage], 1, PROMPT, RESPONSE, PROMPT, RESPONSE, K, K,
               MICRO if stage == "ppo" else 0, BATCH["ppo"], average=False, attention="eager", checkpointing=False,
               cache_bytes=4)


# --- one measurement, in its own process ------------------------------------------------------------------------

def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def steps_of(folder: Path, stage: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Makes the stage's models; returns one training step and one evaluation of it."""
    import torch

    from rlhf.losses import ranking_loss
    from rlhf.model.load import load_policy, load_scorer
    from rlhf.model.scoring import score_groups, score_sequences
    from rlhf.params import PpoParams, SftParams
    from rlhf.ppo.trainer import Trainer
    from rlhf.reward_model import Rankings
    from rlhf.sft import Demonstrations, batch_loss, valid_loss
    from rlhf.training.optim import adamw

    draw = torch.Generator().manual_seed(1)

    def texts(count: int, length: int) -> list[list[int]]:
        return torch.randint(300, 1000, (count, length), generator=draw).tolist()

    rows = BATCH[stage]
    if stage == "ppo":
        params = PpoParams(batch_size=rows, minibatch_size=rows, micro_batch_size=MICRO, inner_epochs=1,
                           max_prompt_tokens=PROMPT, max_new_tokens=RESPONSE, lr=1e-5, value_lr=1e-5, no_eos_score=1e9)
        trainer = Trainer(params, folder / "policy", folder / "rm", 1)
        trainer.sampler.sampling = dataclasses.replace(trainer.sampler.sampling, stop_ids=(-1,))
        prompts = texts(rows, PROMPT)
        return lambda: trainer.step(prompts, 0)[1], lambda: None
    model = load_policy(folder / "policy") if stage == "sft" else load_scorer(folder / "rm")
    model.train()
    optimizer = adamw(model, 1e-5)
    if stage == "sft":
        data = Demonstrations(texts(rows, PROMPT + RESPONSE), [PROMPT] * rows, 0)

        def loss() -> Any:
            return batch_loss(model, *data.batch(model, list(range(rows)), 0), "bf16")

        def evaluate() -> Any:
            held_out = Demonstrations(texts(VALID_ROWS, PROMPT + RESPONSE), [PROMPT] * VALID_ROWS, 0)
            return valid_loss(model, held_out, SftParams(), 0)
    else:
        groups = [[prompt + end for end in texts(K, RESPONSE)] for prompt in texts(rows, PROMPT)]
        ranks = Rankings(groups, [list(range(1, K + 1))] * rows, 0).batch_ranks(list(range(rows)))

        def loss() -> Any:
            return ranking_loss(score_groups(model, groups, 0, "bf16"), *ranks)

        def evaluate() -> Any:
            return score_sequences(model, texts(SCORE_ROWS, PROMPT + RESPONSE), 0, "bf16")

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, evaluate


def measure(folder: Path, stage: str, what: str) -> dict[str, float]:
    """Peak bytes of two steps and an evaluation, or the seconds of the faster of two steps after a warm-up."""
    import torch

    torch.set_num_threads(1)
    for call in steps_of(folder / TINY, stage):  # the baseline contains imports and kernels built at run time
        call()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step, evaluate = steps_of(folder, stage)
    if what == "seconds":
        return {"seconds": fastest(step, 2)}
    for call in (step, step, evaluate):
        call()
    return {"bytes": resident("VmHWM") - before}


# --- the machine -------------------------------------------------------------------------------------------------

def fastest(call: Callable[[], Any], times: int = 7) -> float:
    call()
    took = []
    for _ in range(times):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return min(took)


def machine_for(width: int) -> Machine:
    """This machine's rates with one thread: bf16 products of this width, float32 additions, a tiny operation."""
    import torch

    torch.set_num_threads(1)
    left, right = (torch.randn(shape).bfloat16() for shape in ((2048, width), (width, 4 * width)))
    products = 8 * 2048 * width**2 / fastest(lambda: left @ right)
    one, two, out = (torch.randn(4_000_000) for _ in range(3))
    moved = 48e6 / fastest(lambda: torch.add(one, two, out=out))
    tiny = torch.randn(8)
    launch = fastest(lambda: [tiny + tiny for _ in range(1000)]) / 1000
    return Machine(0, products, moved, launch=launch)


def make(folder: Path, shape: Shape) -> None:
    """Policy and reward model of a shape with random weights, as the stages' folders."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from rlhf.model.load import new_scorer, save_model
    from rlhf.model.tokenizer import train_tokenizer

    torch.manual_seed(1)
    tokenizer = train_tokenizer(["a few words about nothing, again and again"] * 300, 300)
    policy = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=shape.vocabulary, max_position_embeddings=shape.context, hidden_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, intermediate_size=shape.inner, rotary_pct=0.5,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))
    save_model(policy, tokenizer, folder / "policy")
    save_model(new_scorer(folder / "policy", tokenizer.pad_token_id, torch.Generator().manual_seed(1)), tokenizer,
               folder / "rm")


def main() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # freed memory returns to the system at once, so that the resident set is the live memory; this costs time
    strict = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    machines = {name: machine_for(shape.width) for name, shape in SHAPES.items() if name != TINY}
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for name in machines:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "make", folder, name], env=environment, check=True,
                           capture_output=True)
            for stage, (what, more) in itertools.product(BATCH, (("bytes", strict), ("seconds", {}))):
                done = subprocess.run([sys.executable, __file__, what, folder, stage], env=environment | more,
                                      check=True, capture_output=True, text=True)
                measured.setdefault((name, stage), {}).update(json.loads(done.stdout.splitlines()[-1]))

    def predicted(name: str, stage: str) -> float:
        return seconds(stage_work(point(SHAPES[name], stage))[0], machines[name])

    efficiency = predicted(*CALIBRATED_ON) / measured[CALIBRATED_ON]["seconds"]
    for name, machine in machines.items():
        print(f"{name}: products {machine.matmul / 1e9:.0f} GFLOP/s, additions {machine.traffic / 1e9:.1f} GB/s, "
              f"operation overhead {machine.launch * 1e6:.1f} µs")
    print(f"efficiency {efficiency:.2f}, calibrated on {' '.join(CALIBRATED_ON)}\n")
    names = ("model", "stage", "MB, predicted", "MB, measured", "ratio", "s, predicted", "s, measured", "ratio")
    print(ROW.format(*names))
    print("|---|---|---|---|---|---|---|---|")
    for (name, stage), seen in measured.items():
        size, took = peak(point(SHAPES[name], stage))[1], predicted(name, stage) / efficiency
        print(ROW.format(name, stage, f"{size / 1e6:.0f}", f"{seen['bytes'] / 1e6:.0f}", f"{size / seen['bytes']:.2f}",
                         f"{took:.3f}", f"{seen['seconds']:.3f}", f"{took / seen['seconds']:.2f}"))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]) / TINY, SHAPES[TINY])
        make(Path(sys.argv[2]), SHAPES[sys.argv[3]])
    else:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], sys.argv[1])))
