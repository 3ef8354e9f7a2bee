"""A small evaluation in several processes, for test_evaluate_in_processes.py.

    python -m tests.rlhf.evaluation.evaluate_in_processes PROCESSES '{...}'

The JSON has policy, reference, scorer (folders), prompts, tasks (folder), limit and folder. Each process writes its
results, or its error message, to folder/RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf.errors import UserError
from rlhf.evaluation.generate import answer, kl_to_reference, sample_several
from rlhf.evaluation.lm_eval import TaskSuite, measure
from rlhf.evaluation.preference import compare_all, reward_judge
from rlhf.params import EvaluateParams
from rlhf.training import distributed

PARAMS = EvaluateParams(max_new_tokens=10, batch_size=5)
SEED = 3


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    policy, reference, scorer = (Path(task[name]) for name in ("policy", "reference", "scorer"))
    prompts, cache = task["prompts"], Path(task["folder"]) / "cache"
    one, other = (answer(folder, scorer, prompts, PARAMS, SEED) for folder in (policy, reference))
    suite = TaskSuite(folders=[Path(task["tasks"])], limit=task["limit"])
    scores = measure(policy, suite, cache)
    assert measure(policy, suite, cache) == scores  # read by the main process and broadcast
    return {"texts": one.texts, "scores": one.rm_scores,
            "kl": kl_to_reference(policy, reference, prompts, one, "fp32", 1.0).exact,
            "several": sample_several(policy, prompts, 3, PARAMS, SEED),
            "outcomes": compare_all(prompts, {"one": one.texts, "other": other.texts}, reward_judge(scorer, "fp32"))[
                "one", "other"],
            "tasks": {name: [score.value, score.stderr, *score.items] for name, score in scores.items()}}


def main() -> None:
    task = json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if int(sys.argv[1]) > 1:
        distributed.fork(int(sys.argv[1]))
    try:
        results = evaluate(task)
    except UserError as error:
        results = {"error": str(error)}
    (Path(task["folder"]) / f"{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.leave()


if __name__ == "__main__":
    main()
