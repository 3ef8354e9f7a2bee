"""Tests the paper's claims in the embedded world over several seeds: metrics/claims.json and docs/claims.md.

    python -m mlops.tools.study                   # seeds 1 2 3, the profile of params.yaml
    python -m mlops.tools.study --seeds 1 2 3 4 5 --profile smoke

Each unit (a seed's data, a model, a measurement) is stored in scratch/study and reused by the next run, and training
resumes from its checkpoints, so an interruption costs only minutes. What the claims need of a finished seed goes to
metrics/study/, which git keeps; remove a file there to measure its seed again. mlops/tools/claims.py has the claims.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlops.config.loader import Params, load_params, load_profile
from mlops.tools.claims import judge_claims, write_claims
from mlops.tracking.revision import revision
from rlhf.data.schema import read_rows
from rlhf.errors import Interrupted, TrainingFailed, UserError
from rlhf.evaluation.generate import Answers, answer
from rlhf.evaluation.held_out import HeldOut, best_of_curve
from rlhf.evaluation.lm_eval import TaskScore, TaskSuite, measure
from rlhf.evaluation.metrics import gold_metrics, preference_metrics, safety_metrics, tax_metrics
from rlhf.evaluation.preference import compare_all, gold_judge
from rlhf.files import write_json
from rlhf.model.chat_format import load_codec
from rlhf.params import PpoParams, Profile
from rlhf.ppo.run import train_ppo
from rlhf.pretrain import pretrain
from rlhf.reward_model import accuracy, sample_rows, score_rows, train_reward_model
from rlhf.sft import sft
from rlhf.training.journal import read_journal
from rlhf.training.seeding import seed_everything
from rlhf.world.embedded import write_embedded
from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler

FOLDER = Path("scratch/study")
NUMBERS = Path("metrics/study")  # what the claims need of each seed: kept in git, so a study may take several days
HIGH_BETA = 10.0  # times the profile's beta, fixed
FREE_BETA = 0.001  # almost no penalty: the reward model is optimised as far as possible
FREE_EPISODES = 2.0  # times the profile's episodes
SMALL_WIDTH = 0.5  # times the profile's width: the small aligned model of claim 1


@dataclass(frozen=True)
class Seed:
    """One seed's folder, parameters and world."""

    number: int
    profile: Profile
    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    def rows(self, name: str, split: str = "") -> list[dict[str, Any]]:
        rows = list(read_rows(self.root / "data" / f"{name}.jsonl"))
        return [row for row in rows if row["split"] == split] if split else rows

    def unit(self, name: str, make: Callable[[Path], Any]) -> Any:
        """The result of `make(folder)`, computed once and stored in the unit's folder."""
        folder = self.root / name
        stored = folder / "unit.json"
        if stored.is_file():
            return json.loads(stored.read_text(encoding="utf-8"))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"study: seed {self.number}: {name}", flush=True)
        before = time.monotonic()
        result = make(folder)
        print(f"study: seed {self.number}: {name} took {time.monotonic() - before:.0f} s", flush=True)
        write_json(stored, result)
        return result


def run_seed(seed: Seed) -> dict[str, Any]:
    """Trains and measures all models of one seed; returns the numbers that the claims need."""
    profile, number = seed.profile, seed.number
    labeler = GoldLabeler(World(number))
    seed.unit("data", lambda folder: write_embedded(profile.ingest, number, folder))
    texts = [row["text"] for row in read_rows(seed.path("data/corpus.jsonl"))]
    narrow = dataclasses.replace(profile.pretrain, n_embd=_width(profile))
    for name, shape in (("base", profile.pretrain), ("small_base", narrow)):
        seed.unit(name, partial(pretrain, shape, texts, number))
    for name, base in (("sft", "base"), ("small_sft", "small_base")):
        seed.unit(name, partial(_sft, seed, base))
    numbers: dict[str, Any] = {"rm": seed.unit("rm", lambda folder: _reward_model(seed, folder))}
    for name, (start, params) in ppo_runs(profile.arms).items():
        seed.unit(name, partial(_ppo, seed, start, params, labeler))
    numbers["scores"] = seed.unit("scores", lambda folder: _measure(seed, labeler, folder))
    numbers["free_run"] = [{key: float(row[f"ppo/{key}"]) for key in ("kl", "rm_score", "gold")}
                           for row in read_journal(seed.path("ppo_free/journal.csv"))]
    numbers["best_of_n"] = seed.unit("best_of_n", lambda folder: best_of_curve(
        seed.path("sft/model"), seed.path("rm/model"), HeldOut(seed.rows("ppo", "valid"), labeler), profile.evaluate,
        number))
    numbers["prompts"] = min(profile.evaluate.prompts, len(seed.rows("ppo", "valid")))
    numbers["parameters"] = {name: sum(item.numel() for item in _weights(seed.path(f"{name}/model")))
                             for name in ("base", "small_base")}
    return numbers


def _sft(seed: Seed, base: str, folder: Path) -> dict[str, float]:
    return sft(seed.profile.sft, seed.rows("sft"), seed.path(f"{base}/model"), seed.number, folder,
               seed.path("data/corpus.jsonl"))


def _ppo(seed: Seed, start: str, params: PpoParams, labeler: GoldLabeler, folder: Path) -> dict[str, float]:
    prompts = [row["prompt"] for row in seed.rows("ppo", "train")]
    return train_ppo(params, prompts, seed.path(f"{start}/model"), seed.path("rm/model"), seed.number, folder,
                     labeler.scores, seed.path("data/corpus.jsonl"))


def ppo_runs(arms: Mapping[str, PpoParams]) -> dict[str, tuple[str, PpoParams]]:
    """{run: (the SFT model it starts from, its parameters)}, from the profile's first arm and its first with
    `ptx_coef`. Raises UserError where no arm has `ptx_coef`."""
    plain = dataclasses.replace(next(iter(arms.values())), ptx_coef=0.0)
    mixed = next((params for params in arms.values() if params.ptx_coef > 0), None)
    if mixed is None:
        raise UserError("no arm of the profile has ptx_coef > 0, and three claims are about PPO-ptx; use profile cpu")
    free = int(FREE_EPISODES * plain.episodes)
    return {
        "ppo": ("sft", plain),
        "ppo_ptx": ("sft", mixed),
        "ppo_high_beta": ("sft", dataclasses.replace(plain, beta_rule="fixed", beta=HIGH_BETA * plain.beta)),
        "ppo_free": ("sft", dataclasses.replace(plain, beta_rule="fixed", beta=FREE_BETA, kl_limit=1000.0,
                                                episodes=free)),
        "small_ppo": ("small_sft", plain),
    }


def _width(profile: Profile) -> int:
    """About half the width, a multiple of the heads."""
    heads = profile.pretrain.n_head
    return max(heads * 4, int(profile.pretrain.n_embd * SMALL_WIDTH) // (heads * 4) * heads * 4)


def _weights(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def _reward_model(seed: Seed, folder: Path) -> dict[str, float]:
    """Trains the reward model; its accuracy on valid labels of training and held-out labelers, with errors."""
    params, rows = seed.profile.rm, seed.rows("rm")
    shown = [row for row in seed.rows("sft", "valid") if row["source"] == "labeler"]
    model, _ = train_reward_model(params, rows, shown, seed.path("sft/model"), seed.number, folder)
    valid = sample_rows([row for row in rows if row["split"] == "valid"], params.max_valid_prompts, seed.number)
    scored = score_rows(model, load_codec(seed.path("sft/model")), valid, params)
    training = {row["labeler_id"] for row in rows if row["split"] == "train"}
    accuracies = {}
    for name, is_training in (("training", True), ("held_out", False)):
        group = [item for item in scored if (item.row["labeler_id"] in training) == is_training]
        share = accuracy(group)
        accuracies[name] = share  # the pairs of a prompt are dependent, so n is the number of prompts
        accuracies[f"{name}_stderr"] = (share * (1 - share) / max(1, len(group))) ** 0.5
    return accuracies


def _measure(seed: Seed, labeler: GoldLabeler, folder: Path) -> dict[str, float]:
    """Preference, quality, safety and alignment-tax metrics of all models of the seed."""
    params = seed.profile.evaluate
    held_out = HeldOut(seed.rows("ppo", "valid")[: params.prompts], labeler)
    tax = TaskSuite(folders=[seed.path("data/tax")], limit=params.tax_items, batch_size=params.task_batch_size)
    answers: dict[str, Answers] = {}
    tasks: dict[str, dict[str, TaskScore]] = {}
    rm = seed.path("rm/model")
    answers["base_prompted"] = answer(seed.path("base/model"), rm, held_out.prompts, params, seed.number,
                                      ends_at_newline=True, form=params.prompt_form,
                                      shots=seed.rows("sft", "train")[: params.shots])
    runs = ppo_runs(seed.profile.arms)
    for name in ("base", "sft", *runs):
        model = seed.path(f"{name}/model")
        if name != "base":
            answers[name] = answer(model, rm, held_out.prompts, params, seed.number)
        if not name.startswith("small"):
            tasks[name] = measure(model, tax, folder / "kept")
    texts = {name: own.texts for name, own in answers.items()}
    grades = {name: labeler.grades(held_out.prompts, own) for name, own in texts.items()}
    outcomes = compare_all(held_out.prompts, texts, gold_judge(labeler))
    return (safety_metrics(held_out, answers) | gold_metrics(held_out, grades, params, seed.number)
            | preference_metrics(held_out, answers, outcomes, params, seed.number, "win_rate")
            | tax_metrics(tasks, {}, params, seed.number, [name for name in runs if name in tasks]))


def study(params: Params, seeds: list[int], root: Path) -> list[dict[str, Any]]:
    """Runs the seeds one after the other, writes the claims and returns them. Raises UserError."""
    if params.stages.ingest.source != "embedded" or params.stages.pretrain.base_model:
        raise UserError("needs the embedded source, whose gold labeler judges the claims, and no pretrain.base_model; "
                        "use profile cpu")
    digest = _digest(params)
    by_seed = {}
    for number in seeds:
        kept = root / NUMBERS / f"seed-{number}.json"
        if not _is_of(kept, digest):
            seed_everything(number)
            found = run_seed(Seed(number, params.stages, root / FOLDER / digest / f"seed-{number}"))
            write_json(kept, {"parameters": digest, **revision(root), "numbers": found})
        by_seed[number] = json.loads(kept.read_text(encoding="utf-8"))["numbers"]
    claims = judge_claims(list(by_seed.values()))
    write_claims(claims, by_seed, params.profile, root)
    return claims


def _is_of(kept: Path, digest: str) -> bool:
    """Whether a seed's numbers are there, measured with these parameters."""
    return kept.is_file() and bool(json.loads(kept.read_text(encoding="utf-8"))["parameters"] == digest)


def _digest(params: Params) -> str:
    """The folder name for these parameters, so that results of different parameters never mix. Values that are the
    default do not enter: a parameter that is new does not change what was measured before it."""
    read = {name: _changed(getattr(params.stages, name)) for name in sorted(vars(params.stages))
            if name not in ("arms", "ppo", "judge", "promote", "rounds")}
    arms = [[start, _changed(run)] for start, run in ppo_runs(params.stages.arms).values()]
    text = json.dumps([read, arms, SMALL_WIDTH], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _changed(section: Any) -> dict[str, Any]:
    """A section's values that are not the default."""
    plain = type(section)()
    return {name: value for name, value in dataclasses.asdict(section).items() if value != getattr(plain, name)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.tools.study", description="Tests the paper's claims.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--profile", help="a profile of profiles/ (default: that of params.yaml)")
    options = parser.parse_args()
    root = Path.cwd()
    try:
        params = load_params(root)
        if options.profile:
            params = dataclasses.replace(params, profile=options.profile,
                                         stages=load_profile(root / "profiles" / f"{options.profile}.yaml"))
        claims = study(params, options.seeds, root)
    except (UserError, TrainingFailed) as error:
        print(f"study: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as error:
        print(f"study: {error}; run the same command to resume", file=sys.stderr)
        raise SystemExit(143) from None
    held = sum(claim["holds"] for claim in claims)
    print(f"study: {held} of {len(claims)} claims hold: docs/claims.md, metrics/claims.json", flush=True)


if __name__ == "__main__":
    main()
