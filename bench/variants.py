"""Variants of PPO after a finished `cpu` run: β rules, KL goals over a decade, best-of-4, PPO-ptx.

    python bench/variants.py [NAME ...]     # in the checkout of a finished run; writes only to a temporary folder

Prints a line of JSON per variant. Each trains from models/sft and models/rm with the profile's other parameters and is
evaluated by the gold labeler on as many held-out prompts as the profile's evaluation, and on the alignment-tax tasks.
About three minutes each on two cores.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mlops.config.loader import load_params
from rlhf.data.schema import read_rows
from rlhf.evaluation.generate import answer
from rlhf.evaluation.lm_eval import TaskSuite, measure
from rlhf.evaluation.preference import gold_judge
from rlhf.evaluation.statistics import with_interval
from rlhf.model.chat_format import load_codec
from rlhf.ppo.run import train_ppo
from rlhf.reward_model import Scored, accuracy, sample_rows, score_rows, train_reward_model
from rlhf.sft import sft
from rlhf.training.journal import read_journal
from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler

VARIANTS: dict[str, dict[str, Any]] = {
    "KL goal 0.3": {"ppo": {"kl_goal": 0.3}},
    "KL goal 0.6": {},
    "KL goal 1.5": {"ppo": {"kl_goal": 1.5}},
    "the article's rule": {"ppo": {"beta_rule": "step", "beta_band": 1.5, "beta_factor": 2.0}},
    "proportional": {"ppo": {"beta_rule": "proportional", "beta": 0.08}},
    "proportional, gain 1": {"ppo": {"beta_rule": "proportional", "beta_gain": 1.0, "beta": 0.08}},
    "fixed": {"ppo": {"beta_rule": "fixed", "beta": 0.08}},
    "best of 4": {"rm": {"loss": "best_of", "epochs": 2}},
    "SFT without pretraining text": {"sft": {"pretrain_mix": 0.0}},
    "SFT without pretraining text, PPO-ptx": {"sft": {"pretrain_mix": 0.0}, "ppo": {"ptx_coef": 2.0}},
    "averaged weights": {"ppo": {"ema_decay": 0.9}},
    "value from the policy": {"ppo": {"value_init": "policy"}},
    "LoRA, rank 16": {"ppo": {"lora_rank": 16, "lr": 1e-3, "value_lr": 1e-3}},
}


def tax(folder: Path) -> float:
    """Mean accuracy on the alignment-tax tasks."""
    scores = measure(folder, TaskSuite(folders=[Path("data/tax")], batch_size=128))
    return sum(score.value for score in scores.values()) / len(scores)


def run(name: str, changes: dict[str, Any], folder: Path, labeler: GoldLabeler) -> dict[str, Any]:
    params = load_params().stages
    seed, results = 1, {"variant": name}
    start, reward_model = Path("models/sft"), Path("models/rm")
    before = time.monotonic()
    if "sft" in changes:
        rows = list(read_rows(Path("data/sft.jsonl")))
        sft(dataclasses.replace(params.sft, **changes["sft"]), rows, Path("models/pretrain"), seed, folder / "sft",
            Path("data/corpus.jsonl"))
        start = folder / "sft" / "model"
        results["tax_sft"] = round(tax(Path("models/pretrain")) - tax(start), 3)
    if "rm" in changes:
        rows = list(read_rows(Path("data/rm.jsonl")))
        shown = [row for row in read_rows(Path("data/sft.jsonl")) if row["split"] == "valid"
                 and row["source"] == "labeler"]
        rm = dataclasses.replace(params.rm, **changes["rm"])
        model, _ = train_reward_model(rm, rows, shown, start, seed, folder / "rm")
        reward_model = folder / "rm" / "model"
        valid = sample_rows([row for row in rows if row["split"] == "valid"], rm.max_valid_prompts, seed)
        scored = score_rows(model, load_codec(start), valid, rm)
        gold = [Scored({**item.row, "ranks": labeler.rank(item.row["prompt"], item.row["completions"])}, item.scores)
                for item in scored]
        results |= {"rm_accuracy": round(accuracy(scored), 3), "rm_accuracy_gold": round(accuracy(gold), 3)}
    ppo = dataclasses.replace(params.ppo, **changes.get("ppo", {}))
    rows = list(read_rows(Path("data/ppo.jsonl")))
    train_ppo(ppo, [row["prompt"] for row in rows if row["split"] == "train"], start, reward_model, seed,
              folder / "ppo", labeler.scores, Path("data/corpus.jsonl"))
    journal = [{key: float(value) for key, value in row.items()} for row in read_journal(folder / "ppo/journal.csv")]
    quarter = journal[-(len(journal) // 4):]
    kl = sum(row["ppo/kl"] for row in quarter) / len(quarter)
    prompts = [row["prompt"] for row in rows if row["split"] == "valid"][: params.evaluate.prompts]
    texts = [answer(one, reward_model, prompts, params.evaluate, seed).texts
             for one in (folder / "ppo" / "model", start)]
    wins = gold_judge(labeler)(prompts, *texts)
    ours, theirs = (labeler.scores(prompts, item) for item in texts)
    gain = [a - b for a, b in zip(ours, theirs, strict=True)]
    results |= {"kl": round(kl, 3), "kl_over_goal": round(kl / ppo.kl_goal, 2),
              "kl_max_over_goal": round(max(row["ppo/kl"] for row in journal) / ppo.kl_goal, 2),
              "beta_last": round(journal[-1]["ppo/beta"], 4)}
    results |= {key: round(value, 3) for key, value in with_interval("win_rate_vs_sft", wins, 2000, seed).items()}
    results |= {key: round(value, 3) for key, value in with_interval("gold_gain", gain, 2000, seed).items()}
    results["tax_ppo"] = round(tax(Path("models/pretrain")) - tax(folder / "ppo" / "model"), 3)
    return results | {"seconds": round(time.monotonic() - before)}


if __name__ == "__main__":
    torch.set_num_threads(2)
    gold_labeler = GoldLabeler(World(1))
    for chosen in sys.argv[1:] or list(VARIANTS):
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(run(chosen, VARIANTS[chosen], Path(scratch), gold_labeler)), flush=True)
