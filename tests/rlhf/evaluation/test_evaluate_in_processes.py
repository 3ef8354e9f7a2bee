"""An evaluation in several processes gives each the results of one process; an error of one is raised in all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.world.facts import World
from rlhf.world.tax import TASKS, task_yaml, tax_items

ROOT = Path(__file__).resolve().parents[3]
Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def evaluate(model_folders: dict[str, tuple[Path, Path]], prompt_texts: list[str], tmp_path: Path) -> Evaluate:
    """evaluate(processes, changes) -> the results of each process."""
    tasks = tmp_path / "tax"
    tasks.mkdir()
    for task in TASKS:
        items = tax_items(World(1), task, 12)
        (tasks / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        (tasks / f"{task}.yaml").write_text(task_yaml(task))

    def run(processes: int, **changes: Any) -> list[dict[str, Any]]:
        folder = tmp_path / f"{processes}-{len(changes)}"
        folder.mkdir()
        task = {"policy": str(model_folders["gpt2"][0]), "reference": str(model_folders["gpt_neox"][0]),
                "scorer": str(model_folders["gpt2"][1]), "prompts": prompt_texts, "tasks": str(tasks), "limit": 7,
                "folder": str(folder)} | changes
        command = [sys.executable, "-m", "tests.rlhf.evaluation.evaluate_in_processes"]
        done = subprocess.run([*command, str(processes), json.dumps(task)],
                              cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return run


def test_three_processes_get_the_results_of_one(evaluate: Evaluate) -> None:
    [alone], together = evaluate(1), evaluate(3)
    assert together[0] == together[1] == together[2]
    results = together[0]
    for exact in ("texts", "several", "outcomes"):
        assert results[exact] == alone[exact]
    assert results["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert results["kl"] == pytest.approx(alone["kl"], abs=1e-5)
    assert min(alone["kl"]) > 0.01
    assert sorted(results["tasks"]) == sorted(TASKS)
    for task, values in alone["tasks"].items():
        assert len(values) == 2 + 7
        assert results["tasks"][task] == pytest.approx(values, abs=1e-9)
    assert 0 < sum(outcome == 1 for outcome in alone["outcomes"]) < len(alone["outcomes"])


def test_an_item_that_is_too_long_is_an_error_in_all_processes(evaluate: Evaluate, tmp_path: Path) -> None:
    """The first process has the items 0 and 2, the second has item 1; only item 1 is too long."""
    rows = [json.loads(line) for line in (tmp_path / "tax" / "cloze.jsonl").read_text().splitlines()][:3]
    rows[1]["choices"][0] *= 200
    (tmp_path / "tax" / "cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate(2, limit=3)
    assert [list(one) for one in results] == [["error"]] * 2
    assert results[0] == results[1]
    assert "cloze" in results[0]["error"]
    assert "an item is longer than the 128 tokens of" in results[0]["error"]
