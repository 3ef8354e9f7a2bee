"""Counts the bytes of real processes at each moment of a stage, beside what rlhf/memory.py says of it.

    python bench/sharded_memory.py [--stages sft rm ppo] [--shapes llama qwen2] [--options shard lora ...]

Llama and Qwen2 shapes of some 100 million parameters with random weights, one process and two, the stages' real code:
load, validation, update, save; of PPO also sampling, log-probs and scores. Bytes: the most resident memory of the
process during the moment, above what it had after the same with a tiny model. Ten minutes on two idle cores.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.memory import Job, Shape, moments

SHAPES = {
    "tiny": Shape("tiny", 1, 64, 2, 1024, 128, 512, "llama", 2, False),
    "llama": Shape("llama", 16, 640, 10, 16_384, 1792, 512, "llama", 2, False),
    "qwen2": Shape("qwen2", 14, 768, 12, 32_768, 2048, 512, "llama", 2, True, True)}
PROMPT, RESPONSE, K, LOOKED_AT = 64, 64, 4, 64
ROWS = {"sft": 8, "rm": 4, "ppo": 8}
MICRO = {"sft": 4, "rm": 2, "ppo": 2}
ROW = "| {:6} | {:4} | {:24} | {:10} | {:>12} | {:>12} | {:>5} |"


def job_of(stage: str, shape: Shape, processes: int, options: dict[str, Any]) -> Job:
    """What rlhf/memory.py is asked."""
    return Job(stage=stage, policy=shape, scorer=shape, rows=ROWS[stage], batch=ROWS[stage], prompt=PROMPT,
               response=RESPONSE, k=K, looked_at=LOOKED_AT, micro=MICRO[stage], sampled=ROWS[stage], bf16=True,
               eager=True, checkpointing=True, processes=processes, shard=processes > 1 and options.get("shard", False),
               tensor_parallel=options.get("tensor_parallel", 1),
               frozen_bf16=options.get("frozen_precision") == "bf16", lora_rank=options.get("lora_rank", 0),
               lora_bf16=options.get("lora_base") == "bf16", lora_nf4=options.get("lora_base") == "nf4", cache_bytes=4)


# --- one measurement, in processes of its own ------------------------------------------------------------------------

class Moments:
    """The most memory during each moment, above that at the start, bytes."""

    def __init__(self) -> None:
        self.start, self.peaks, self.now = resident(), {}, ""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            threading.Event().wait(0.001)

    def look(self) -> None:
        if now := self.now:  # read once: the other thread changes it
            self.peaks[now] = max(self.peaks.get(now, 0), resident() - self.start)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        yield
        self.look()
        self.now = before

    def wrap(self, module: Any, function: str, name: str) -> None:
        """Calls of module.function are a moment."""
        original = getattr(module, function)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            with self.during(name):
                return original(*arguments, **more)

        setattr(module, function, wrapped)


def resident() -> int:
    """Memory of this process, weights that are mapped from their file included, bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmRSS:")[1].split()[0])


def stage(kind: str, folder: Path, shape: Shape, options: dict[str, Any]) -> dict[str, int]:
    """Runs the moments of a stage once; returns their peaks."""
    import torch

    from rlhf.losses import ranking_loss
    from rlhf.model.load import Layout, load_policy, load_scorer, no_dropout, prepare_training, save_model
    from rlhf.model.scoring import score_groups, score_together
    from rlhf.model.tokenizer import load_tokenizer
    from rlhf.params import PpoParams, RmParams, SftParams
    from rlhf.sft import Demonstrations, batch_loss, valid_loss
    from rlhf.training import distributed
    from rlhf.training.optim import adamw

    draw = torch.Generator().manual_seed(1)
    rows = ROWS[kind] // distributed.shares()

    def texts(count: int, length: int) -> list[list[int]]:
        return torch.randint(300, shape.vocabulary, (count, length), generator=draw).tolist()

    watch = Moments()
    if kind == "ppo":
        return ppo(watch, folder, texts, PpoParams(
            batch_size=ROWS[kind], minibatch_size=ROWS[kind], micro_batch_size=MICRO[kind], inner_epochs=1,
            max_prompt_tokens=PROMPT, max_new_tokens=RESPONSE, lr=1e-5, value_lr=1e-5, no_eos_score=1e9,
            gradient_checkpointing=True, precision="bf16", **options))
    params: Any = (SftParams if kind == "sft" else RmParams)(gradient_checkpointing=True, precision="bf16", **options)
    with watch.during("load"):
        layout = Layout.of(params, kind, draw)
        model = (load_policy(folder / "policy", layout) if kind == "sft" else
                 load_scorer(folder / "rm", layout=layout))
    no_dropout(model)
    prepare_training(model, params)
    optimizer = adamw(model, 1e-5)

    def losses() -> Iterator[Any]:
        for start in range(0, rows, MICRO[kind]):
            count = min(MICRO[kind], rows - start)
            if kind == "sft":
                data = Demonstrations(texts(count, PROMPT + RESPONSE), [PROMPT] * count, 0)
                yield batch_loss(model, *data.batch(model, list(range(count)), 0), "bf16")
            else:
                groups = [[prompt + end for end in texts(K, RESPONSE)] for prompt in texts(count, PROMPT)]
                ranks = torch.arange(1, K + 1).repeat(count, 1)
                yield ranking_loss(score_groups(model, groups, 0, "bf16"), ranks, torch.ones_like(ranks).bool())

    for _ in range(2):
        with watch.during("update"):
            for loss in losses():
                distributed.backward(model, loss)
            distributed.all_reduce_gradients([model], {})
            distributed.clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    if kind == "sft":
        held_out = Demonstrations(texts(LOOKED_AT, PROMPT + RESPONSE), [PROMPT] * LOOKED_AT, 0)
        with watch.during("valid loss"):
            valid_loss(model, held_out, params, 0)
    else:
        with watch.during("scores"):
            score_together(model, texts(LOOKED_AT, PROMPT + RESPONSE), 0, "bf16")
    with watch.during("save"):
        save_model(model, load_tokenizer(folder / "policy"), folder / "saved")
    return watch.peaks


def ppo(watch: Moments, folder: Path, texts: Callable[[int, int], list[list[int]]], params: Any) -> dict[str, int]:
    from rlhf.ppo import rollouts
    from rlhf.ppo.trainer import Trainer

    with watch.during("load"):
        trainer = Trainer(params, folder / "policy", folder / "rm", 1)
    trainer.sampler.sampling = dataclasses.replace(trainer.sampler.sampling, stop_ids=(-1,))
    watch.wrap(rollouts, "sample_responses", "sample")
    watch.wrap(rollouts, "score_sequences", "scores")
    watch.wrap(rollouts, "evaluate_rollouts", "log-probs")
    for number in range(2):
        found = trainer.respond(texts(ROWS["ppo"], PROMPT), number)
        with watch.during("update"):
            trainer.learn(found, number)
    with watch.during("save"):
        trainer.save(folder / "saved")
    return watch.peaks


def main_of_process(folder: Path, kind: str, name: str, processes: int, options: dict[str, Any]) -> None:
    import torch

    from rlhf.training import distributed

    torch.set_num_threads(1)
    if processes > 1:
        distributed.fork(processes)
    stage(kind, folder / "tiny", SHAPES["tiny"], options)  # what is imported and kept from then on
    own = stage(kind, folder / name, SHAPES[name], options)
    peaks = distributed.all_gather(own)
    if distributed.is_main():
        print(json.dumps({moment: max(item[moment] for item in peaks) for moment in own}))
    distributed.leave()


# --- the tables ------------------------------------------------------------------------------------------------------

def make(folder: Path, shape: Shape) -> None:
    """Policy and reward model of a shape with random weights, as the stages' folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from rlhf.model.load import new_scorer, save_model
    from rlhf.model.tokenizer import train_tokenizer

    torch.manual_seed(1)
    tokenizer = train_tokenizer(["a few words about nothing, again and again"] * 300, 300)
    config, kind = (Qwen2Config, Qwen2ForCausalLM) if shape.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    policy = kind(config(
        vocab_size=shape.vocabulary, max_position_embeddings=shape.context, hidden_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner, tie_word_embeddings=shape.tied, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id))
    save_model(policy, tokenizer, folder / "policy")
    save_model(new_scorer(folder / "policy", tokenizer.pad_token_id, torch.Generator().manual_seed(1)), tokenizer,
               folder / "rm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["sft", "rm", "ppo"])
    parser.add_argument("--shapes", nargs="+", default=["llama", "qwen2"])
    parser.add_argument("--options", type=json.loads, nargs="+", default=[{}, {"shard": True}],
                        help="JSON objects; the first ones without shard are of one process")
    chosen = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
                   # freed memory returns to the system at once, so that resident memory is live memory
                   "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(ROW.format("shape", "", "stage and options", "moment", "MB, said", "MB, counted", "ratio"))
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("tiny", *chosen.shapes):
            make(folder / name, SHAPES[name])
        for name in chosen.shapes:
            for kind in chosen.stages:
                for options in chosen.options:
                    processes = 2 if options.get("shard") else 1
                    done = subprocess.run([sys.executable, __file__, "process", place, kind, name, str(processes),
                                           json.dumps(options)], env=environment, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    counted = json.loads(done.stdout.splitlines()[-1])
                    said = moments(job_of(kind, SHAPES[name], processes, options))
                    label = " ".join([kind, *(f"{key}={value}" for key, value in options.items())])
                    for moment, parts in said.items():
                        if moment in counted:
                            one, other = sum(parts.values()) / 1e6, counted[moment] / 1e6
                            print(ROW.format(name, f"{processes} pr", label, moment, f"{one:.0f}", f"{other:.0f}",
                                             f"{one / other:.2f}"), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "process":
        main_of_process(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]), json.loads(sys.argv[6]))
    else:
        main()
