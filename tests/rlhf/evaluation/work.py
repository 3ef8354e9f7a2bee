"""A small evaluation in several processes, for tests/rlhf/evaluation/test_evaluate_together.py: python -m tests.rlhf.evaluate_work
PROCESSES '{...}'

The JSON has policy, reference, scorer (folders), prompts, tasks (a folder of them), limit and folder. Each process
writes what it has found, or the mistake that it was told of, to folder/RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf.errors import UserError
from rlhf.evaluation.generate import answer, mean_kl, several
from rlhf.evaluation.lm_eval import Harness, measure
from rlhf.evaluation.preference import compare_all, reward_judge
from rlhf.params import EvaluateParams
from rlhf.training import distributed

PARAMS = EvaluateParams(max_new_tokens=10, batch_size=5)
SEED = 3


def evaluate(given: dict[str, Any]) -> dict[str, Any]:
    policy, reference, scorer = (Path(given[name]) for name in ("policy", "reference", "scorer"))
    prompts, kept = given["prompts"], Path(given["folder"]) / "kept"
    one, other = (answer(folder, scorer, prompts, PARAMS, SEED) for folder in (policy, reference))
    harness = Harness(folders=[Path(given["tasks"])], limit=given["limit"])
    scores = measure(policy, harness, kept)
    assert measure(policy, harness, kept) == scores  # read by the first, told to all
    return {"texts": one.texts, "scores": one.rm_scores, "kl": mean_kl(policy, reference, prompts, one, "fp32", 1.0),
            "several": several(policy, prompts, 3, PARAMS, SEED),
            "outcomes": compare_all(prompts, {"one": one.texts, "other": other.texts}, reward_judge(scorer, "fp32"))[
                "one", "other"],
            "tasks": {name: [score.value, score.stderr, *score.items] for name, score in scores.items()}}


def main() -> None:
    given = json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if int(sys.argv[1]) > 1:
        distributed.fork(int(sys.argv[1]))
    try:
        found = evaluate(given)
    except UserError as error:
        found = {"mistake": str(error)}
    (Path(given["folder"]) / f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.leave()


if __name__ == "__main__":
    main()
