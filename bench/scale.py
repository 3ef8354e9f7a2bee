"""Time and memory of data preparation in SFT, reward model and PPO for datasets of 1, 10 or 100 times the paper's rows.

    python bench/scale.py [TIMES ...] [--stages sft rm ppo corpus]

Default: 1 10 for sft rm ppo. Writes only to a temporary folder. Each measurement is a process that runs the stage's own
function on made-up rows and a tiny model up to the third step (PPO: two iterations of 8 rollouts): it reads, tokenizes,
stores and orders the rows. `tokens_a_row`: prompt and completions. `peak_mb`: peak resident memory minus that of the
same process before it read a row. `cpu_seconds`: CPU time of all threads, less disturbed on a busy machine than
seconds. Pretraining text is not mixed in, since the corpus does not grow with the datasets; `corpus` reads and packs
CORPUS_ROWS documents and takes three batches.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from rlhf.data.schema import PAPER_ROWS

STEPS = 3
CORPUS_ROWS = 60_000  # documents, as in the pipeline's own corpus
WORDS = [f"{one}{other}{end}" for one in "bdfgklmnprst" for other in "aeiou" for end in ("", "n", "ra", "sting")]


class Enough(Exception):
    """The measured steps are done."""


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(4, 14))) + rng.choice(".?!") for _ in range(count)]


def rows(stage: str, times: int) -> Iterator[dict[str, Any]]:
    """`times` as many rows as in the paper, by split; each text is joined from two of a few thousand halves."""
    rng, halves = random.Random(stage), texts(4000, 1)
    if stage == "corpus":
        yield from ({"text": f"{rng.choice(halves)} {rng.choice(halves)}"} for _ in range(times * CORPUS_ROWS))
        return
    counts = {split: times * sum(count for (name, _), count in PAPER_ROWS[stage].items() if name == split)
              for split in ("train", "valid")}
    for split, count in counts.items():
        for number in range(count):
            row: dict[str, Any] = {"prompt_id": f"{split}-{number}", "labeler_id": f"l{number % 40}",
                                   "source": "labeler", "split": split, "use_case": "other"}
            size = rng.randint(5, 10) if stage == "rm" else 2
            row_texts = [f"{rng.choice(halves)} {rng.choice(halves)}" for _ in range(size)]
            row["prompt"] = row_texts[0]
            if stage == "sft":
                row["completion"] = row_texts[1]
            elif stage == "rm":
                row |= {"completions": row_texts[1:], "ranks": [rng.randint(1, size - 1) for _ in row_texts[1:]]}
            yield row


def write(path: Path, stage: str, times: int) -> int:
    with path.open("w") as out:
        return sum(out.write(json.dumps(row) + "\n") > 0 for row in rows(stage, times))


def make_models(folder: Path) -> None:
    """A policy of two blocks of width 32 and a reward model of the same shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    from transformers.utils import logging

    from rlhf.model.load import new_scorer, save_model
    from rlhf.model.tokenizer import train_tokenizer
    from rlhf.training.seeding import generator

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(texts(1000, 2), 400)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    save_model(model, tokenizer, folder / "policy")
    save_model(new_scorer(folder / "policy", tokenizer.pad_token_id, generator(1, "rm")), tokenizer, folder / "rm")


def resident(which: str) -> float:
    """VmRSS or VmHWM (the peak so far) of this process, MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) / 1024


def prepare(stage: str, folder: Path) -> dict[str, float]:
    """In a separate process: runs the stage's function up to its first steps."""
    import rlhf.reward_model
    import rlhf.sft
    from rlhf.data.rows import Rows
    from rlhf.model.load import load_scorer
    from rlhf.model.scoring import score_sequences
    from rlhf.model.tokenizer import load_tokenizer
    from rlhf.params import PpoParams, RmParams, SftParams
    from rlhf.ppo.run import train_ppo
    from rlhf.pretrain import corpus_batch, read_corpus

    def first_steps(*arguments: Any, loss_of_step: Any, **others: Any) -> int:
        for step in range(STEPS):
            for loss, _ in loss_of_step(step):
                loss.backward()
        raise Enough

    rlhf.sft.train_loop = rlhf.reward_model.train_loop = first_steps
    rlhf.sft.valid_loss = lambda *arguments: 0.0  # the model's pass over the valid rows is not measured
    data, policy, scorer = Rows(folder / f"{stage}.jsonl"), folder / "policy", folder / "rm"
    score_sequences(load_scorer(scorer), [[5] * 40] * 8, 0, "fp32")
    before, start, used = resident("VmRSS"), time.monotonic(), time.process_time()
    try:
        if stage == "sft":
            rlhf.sft.sft(SftParams(pretrain_mix=0, max_tokens=120, precision="fp32"), data, policy, 1, folder / "run")
        elif stage == "rm":
            rlhf.reward_model.train_reward_model(
                RmParams(normalise="gain_and_bias", batch_size=8, max_tokens=120, precision="fp32"), data, [], policy,
                1, folder / "run")
        elif stage == "corpus":
            packed = read_corpus(folder / "corpus.jsonl", load_tokenizer(policy), 128, folder / "run")
            for step in range(STEPS):
                corpus_batch(packed, 16, step, 1)
        else:
            train_ppo(PpoParams(episodes=16, batch_size=8, minibatch_size=8, max_new_tokens=8, precision="fp32"),
                      (row["prompt"] for row in data if row["split"] == "train"), policy, scorer, 1, folder / "run")
    except Enough:
        pass
    return {"seconds": time.monotonic() - start, "cpu": time.process_time() - used,
            "peak_mb": resident("VmHWM") - before}


def mean_tokens(stage: str, folder: Path) -> float:
    """Mean tokens of the first thousand rows."""
    from rlhf.model.tokenizer import PromptCodec, load_tokenizer

    codec = PromptCodec(load_tokenizer(folder / "policy"))
    sample = list(islice(rows(stage, 1), 1000))
    if stage == "corpus":
        return sum(map(len, codec.prompts([row["text"] for row in sample]))) / len(sample)
    written = [text for row in sample for text in [*row.get("completions", []), row.get("completion")] if text]
    return sum(map(len, codec.prompts([row["prompt"] for row in sample]) + codec.completions(written))) / len(sample)


def measure(stage: str, times: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        count = write(folder / f"{stage}.jsonl", stage, times)
        size = (folder / f"{stage}.jsonl").stat().st_size
        done = subprocess.run([sys.executable, __file__, "--prepare", stage, str(folder)], check=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        measured = json.loads(done.stdout)
        return {"stage": stage, "times": times, "rows": count, "file_mb": round(size / 2**20),
                "tokens_a_row": round(mean_tokens(stage, folder)),
                "seconds": round(measured["seconds"], 1), "cpu_seconds": round(measured["cpu"], 1),
                "cpu_microseconds_a_row": round(1e6 * measured["cpu"] / count),
                "peak_mb": round(measured["peak_mb"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", nargs="*", type=int, default=[1, 10])
    parser.add_argument("--stages", nargs="+", default=["sft", "rm", "ppo"], choices=["sft", "rm", "ppo", "corpus"])
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        print(json.dumps(prepare(options.prepare[0], Path(options.prepare[1]))))
    else:
        for stage in options.stages:
            for times in options.times:
                print(json.dumps(measure(stage, times)), flush=True)
