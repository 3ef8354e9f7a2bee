"""Evaluates a model with lm-eval on SQuAD 2.0, HellaSwag, SST-2 and TruthfulQA; prints a line of JSON per task.

    python bench/public_tasks.py MODEL DATA [ITEMS]

MODEL: a Hugging Face folder. DATA: a folder with dev-v2.0.json (SQuAD), hellaswag.json, test.tsv (SST-2) and
mc_task.json (TruthfulQA) at any depth. They are converted to the format of their hub datasets, which lm-eval's tasks
expect, and read like `evaluate.task_data`. The ITEMS per task (default 200) are the same for every model.
"""

import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.schema import write_rows
from rlhf.evaluation.lm_eval import TaskSuite, measure

Row = dict[str, Any]
BENCHMARKS = Path(__file__).parents[1] / "profiles" / "benchmarks"


def squad(path: Path) -> Iterator[Row]:
    for article in json.loads(path.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"id": question["id"], "title": article["title"], "context": paragraph["context"],
                       "question": question["question"], "answers": {"text": [a["text"] for a in question["answers"]]}}


def hellaswag(path: Path) -> Iterator[Row]:
    for item in json.loads(path.read_text())["dev"]:
        letters = sorted(item["choices"])
        yield {"ctx_a": item["question"], "ctx_b": "", "activity_label": item.get("domain") or "",
               "endings": [item["choices"][letter] for letter in letters], "label": str(letters.index(item["answer"]))}


def sst2(path: Path) -> Iterator[Row]:
    with path.open(newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {"sentence": row["sentence"], "label": int(row["label"])}


def truthfulqa(path: Path) -> Iterator[Row]:
    for item in json.loads(path.read_text()):
        choices = sorted(item["mc1_targets"].items(), key=lambda pair: -pair[1])  # the task expects the true one first
        yield {"question": item["question"], "mc1_targets": {"choices": [text for text, _ in choices],
                                                             "labels": [label for _, label in choices]}}


SETS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "squadv2_rows": ("dev-v2.0.json", squad), "hellaswag": ("hellaswag.json", hellaswag), "sst2": ("test.tsv", sst2),
    "truthfulqa_mc1": ("mc_task.json", truthfulqa)}


def prepare(data: Path, target: Path, items: int) -> dict[str, str]:
    """{task: file}: a seeded sample of each set in the format of its hub dataset."""
    files = {}
    for task, (name, read) in SETS.items():
        if paths := sorted(data.rglob(name)):
            rows = list(read(paths[0]))
            write_rows(target / f"{task}.jsonl", random.Random(1).sample(rows, min(items, len(rows))))
            files[task] = str(target / f"{task}.jsonl")
    return files


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        files = prepare(Path(sys.argv[2]), Path(scratch), int(sys.argv[3]) if len(sys.argv) > 3 else 200)
        for task in files:
            before = time.monotonic()
            score = measure(Path(sys.argv[1]), TaskSuite([task], [BENCHMARKS], files, batch_size=8))[task]
            print(json.dumps({"task": task, "metric": score.metric, "score": round(score.value, 4),
                              "stderr": round(score.stderr, 4), "items": len(score.items),
                              "seconds": round(time.monotonic() - before)}), flush=True)
