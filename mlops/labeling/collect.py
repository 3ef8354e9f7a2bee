"""Makes a batch for labeling: several completions of each prompt, from one policy or several, and the assignments.

    python -m mlops.labeling.collect feedback/first --labelers ada bob eve \\
        --models models/policies/ppo models/sft --prompts 200 --k 4

Sampling follows the profile's section `evaluate`. Prompts come from data/ppo.jsonl, without those of other batches in
the same folder. `mlops.labeling.terminal` shows the batch to labelers, `mlops.labeling.to_rows` reads their labels.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlops.config.loader import load_params
from mlops.config.paths import POLICIES
from mlops.labeling.batch import MIN_CHOICES, Item, assign, make_items, write_batch
from rlhf.data.schema import MAX_K, read_rows
from rlhf.errors import UserError, one_line
from rlhf.params import EvaluateParams

SPARE = 2  # samples for each completion that is needed, since duplicates are dropped


def collect(folder: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Writes items.jsonl and assignments.jsonl; returns the number of each."""
    if (folder / "items.jsonl").exists():
        raise UserError(f"{folder}: there is a batch already; name another folder (labels belong to one batch)")
    for model in options.models:
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"{model}: no model; run `make run`, or name a model folder")
    params = load_params()
    seed = params.seed if options.seed is None else options.seed
    used = {row["prompt_id"] for path in sorted(folder.parent.glob("*/items.jsonl")) for row in read_rows(path)}
    rows = [row for row in read_rows(Path("data/ppo.jsonl"))
            if row["split"] == options.split and row["prompt_id"] not in used]
    if len(rows) < options.prompts:
        raise UserError(f"data/ppo.jsonl: {len(rows)} unused {options.split} prompts; --prompts is {options.prompts}")
    random.Random(f"{seed} prompts {folder.name}").shuffle(rows)
    rows = sorted(rows[: options.prompts], key=lambda row: str(row["prompt_id"]))
    items = sample_items(rows, options.models, options.k, params.stages.evaluate, seed)
    assignments = assign(items, options.labelers, options.overlap, options.per_item, seed)
    write_batch(folder, items, assignments)
    return len(items), len(assignments)


def sample_items(rows: Sequence[Mapping[str, Any]], models: Sequence[str], k: int, params: EvaluateParams,
                 seed: int) -> list[Item]:
    """`k` distinct completions of each prompt, taken from the models in turn."""
    from rlhf.evaluation.generate import sample_several  # imports torch, which takes seconds

    share = -(-k // len(models))
    prompts = [row["prompt"] for row in rows]
    answers = {Path(model).as_posix(): sample_several(Path(model), prompts, share * SPARE, params, seed + turn)
               for turn, model in enumerate(models)}
    return make_items(rows, answers, k, seed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.labeling.collect",
                                     description="Makes a batch for labeling.")
    parser.add_argument("folder", type=Path, help="where the batch goes: feedback/NAME")
    parser.add_argument("--labelers", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--models", nargs="+", metavar="FOLDER",
                        help="policies to sample from (default: that of the promoted arm)")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--k", type=int, default=4, choices=range(MIN_CHOICES, MAX_K + 1), metavar="K",
                        help="completions per prompt: 4 to choose from, 4 to 9 to rank")
    parser.add_argument("--overlap", type=float, default=0.2, help="share of the items that several labelers rank")
    parser.add_argument("--per-item", type=int, default=2, help="labelers of each such item")
    parser.add_argument("--split", choices=("train", "valid"), default="train")
    parser.add_argument("--seed", type=int, help="default: the seed of params.yaml")
    options = parser.parse_args()
    with one_line("collect"):
        if not 0 <= options.overlap <= 1:
            raise UserError(f"--overlap {options.overlap}: must be 0 to 1")
        options.models = options.models or [str(POLICIES / load_params().stages.promoted)]
        items, assignments = collect(options.folder, options)
    print(f"{options.folder}: {items} prompts with up to {options.k} completions, {assignments} rankings for "
          f"{len(options.labelers)} labelers")


if __name__ == "__main__":
    main()
