"""Benchmarks: the scores of lm-eval's own command, a float64 count by hand, batch size, the cache, clear errors."""

import json
import math
import multiprocessing.pool
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rlhf.evaluation.lm_eval
from bench.public_tasks import prepare
from rlhf.errors import UserError
from rlhf.evaluation.lm_eval import TaskSuite, main_metric, measure
from rlhf.model.chat_format import load_codec
from rlhf.model.load import load_policy
from rlhf.model.tokenizer import load_tokenizer, text_ids
from rlhf.world.facts import World
from rlhf.world.tax import TASKS, task_yaml, tax_items

ITEMS = 12
BENCHMARKS = Path(__file__).parents[3] / "profiles" / "benchmarks"
REAL = Path(__file__).parents[3] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, tuple[Path, Path]]) -> Path:
    """A checkout with data/tax and a model."""
    root = tmp_path_factory.mktemp("suite")
    (root / "data" / "tax").mkdir(parents=True)
    for task in TASKS:
        items = tax_items(World(1), task, ITEMS)
        (root / "data" / "tax" / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        (root / "data" / "tax" / f"{task}.yaml").write_text(task_yaml(task))
    (root / "model").symlink_to(model_folders["gpt2"][0])
    return root


@pytest.fixture(scope="module")
def suite(folder: Path) -> TaskSuite:
    return TaskSuite(folders=[folder / "data" / "tax"])


def test_scores_are_those_of_lm_eval_s_own_command(folder: Path, suite: TaskSuite) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder / 'model'}",
         "--include_path", "data/tax", "--tasks", *TASKS, "--batch_size", "5", "--device", "cpu", "--output_path",
         "out.json"],
        cwd=folder, env={**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(next(folder.glob("out*.json")).read_text())["results"]
    ours = measure(folder / "model", suite)
    assert sorted(ours) == sorted(TASKS)
    for task, score in ours.items():
        metric, variant = main_metric(theirs[task])
        assert score.metric == metric
        assert score.value == pytest.approx(theirs[task][f"{metric},{variant}"], abs=1e-9)
        assert score.stderr == pytest.approx(theirs[task][f"{metric}_stderr,{variant}"], abs=1e-9)
        assert len(score.items) == ITEMS
    assert {task: score.chance for task, score in ours.items()} == {
        "reading": 0.25, "sentiment": 0.5, "translation": 0, "cloze": 0.25, "numbers": 0.25, "geography": 0.25}


@torch.no_grad()
@pytest.mark.parametrize("task", ["cloze", "translation"])  # a choice, a generated text
def test_bits_are_the_right_answer_s_by_hand(folder: Path, suite: TaskSuite, task: str) -> None:
    model, tokenizer = load_policy(folder / "model").double(), load_tokenizer(folder / "model")
    expected = []
    for item in tax_items(World(1), task, ITEMS):
        answer = item["choices"][item["answer"]] if item["choices"] else item["answer"]
        [context], [whole] = (text_ids(tokenizer, [text]) for text in (item["prompt"], item["prompt"] + answer))
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected.append(-sum(logits[place - 1, whole[place]].item() for place in range(len(context), len(whole)))
                        / math.log(2))
    assert measure(folder / "model", replace(suite, tasks=[task]))[task].bits == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_choice_is_the_likeliest_per_character(folder: Path, suite: TaskSuite) -> None:
    model, tokenizer = load_policy(folder / "model").double(), load_tokenizer(folder / "model")
    expected = []
    for item in tax_items(World(1), "cloze", ITEMS):
        values = []
        for choice in item["choices"]:
            [context], [whole] = (text_ids(tokenizer, [text]) for text in (item["prompt"], item["prompt"] + choice))
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(logits[place - 1, whole[place]].item() for place in range(len(context), len(whole)))
            values.append(total / len(choice))
        expected.append(float(values.index(max(values)) == item["answer"]))
    assert measure(folder / "model", replace(suite, tasks=["cloze"]))["cloze"].items == expected
    assert 0 < sum(expected) < ITEMS  # neither always right nor always wrong, else the comparison shows nothing


def test_batch_size_changes_nothing(folder: Path, suite: TaskSuite) -> None:
    alone = measure(folder / "model", replace(suite, batch_size=1))
    assert measure(folder / "model", replace(suite, batch_size=7)) == alone


def test_a_result_is_measured_once(folder: Path, suite: TaskSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   model_folders: dict[str, tuple[Path, Path]]) -> None:
    first = measure(folder / "model", suite, tmp_path / "cache")
    measured: list[str] = []

    def run(model: Path, names: list[str], suite: TaskSuite) -> dict[str, dict[str, rlhf.evaluation.lm_eval.TaskScore]]:
        measured.extend(names)
        return {name: {} for name in names}

    monkeypatch.setattr(rlhf.evaluation.lm_eval, "_run", run)
    assert measure(folder / "model", suite, tmp_path / "cache") == first
    assert not measured
    measure(folder / "model", replace(suite, limit=5), tmp_path / "cache")
    assert sorted(measured) == sorted(TASKS)
    measured.clear()
    measure(model_folders["llama"][0], suite, tmp_path / "cache")
    assert sorted(measured) == sorted(TASKS)
    measured.clear()
    task = folder / "data" / "tax" / "cloze.jsonl"
    text = task.read_text()
    task.write_text(text + text.splitlines()[0] + "\n")
    measure(folder / "model", suite, tmp_path / "cache")
    task.write_text(text)
    assert measured == ["cloze"]


def test_rows_of_a_file_replace_the_hub_dataset(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": str(number), "title": "T", "context": "A red fish.", "question": "What?",
             "answers": {"text": answers}} for number, answers in enumerate((["fish", "red fish"], []))]
    odd = tmp_path / "what? [1] 50% $x"
    odd.mkdir()
    (odd / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = TaskSuite(["squadv2_rows"], [BENCHMARKS], {"squadv2_rows": str(odd / "rows.jsonl")}, limit=2)
    score = measure(folder / "model", suite)
    assert (score["squadv2_rows"].metric, len(score["squadv2_rows"].items)) == ("f1", 2)
    task = yaml.safe_load((BENCHMARKS / "squadv2_rows.yaml").read_text().replace("!function", ""))
    assert "Not in background." in task["doc_to_text"]  # the model is told what means that there is no answer
    assert "'Not in background.'" in task["doc_to_target"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the public dev sets are not there")
def test_real_dev_sets_run_through_the_public_tasks(folder: Path, tmp_path: Path, copy_folder: Callable[[Path], Path],
                                                   model_folders: dict[str, tuple[Path, Path]]) -> None:
    files = prepare(REAL, tmp_path, 3)
    assert sorted(files) == ["hellaswag", "squadv2_rows", "sst2", "truthfulqa_mc1"]
    suite = TaskSuite(sorted(files), [BENCHMARKS], files)
    with pytest.raises(UserError, match="an item is longer than the 128 tokens of"):
        measure(folder / "model", suite)
    long = copy_folder(model_folders["llama"][0])
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    scores = measure(long, suite)
    assert {task: score.metric for task, score in scores.items()} == {
        "hellaswag": "acc_norm", "squadv2_rows": "f1", "sst2": "acc", "truthfulqa_mc1": "acc"}
    assert all(len(score.items) == 3 for score in scores.values())


@pytest.mark.parametrize(("suite", "message"), [
    (TaskSuite(["no_such_task"]), "no task 'no_such_task'"),
    (TaskSuite(["squadv2_rows"], [BENCHMARKS], {"squadv2_rows": "missing.jsonl"}), "missing.jsonl: no such file"),
])
def test_an_unknown_task_or_a_missing_file_is_refused(folder: Path, suite: TaskSuite, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(folder / "model", suite)


def test_no_process_is_forked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own bootstrap (of perplexity here) forks a pool, which a trainer's answer to SIGTERM keeps alive."""
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("forked")

    monkeypatch.setattr(multiprocessing.pool.Pool, "__init__", never)
    task = yaml.safe_load(task_yaml("translation"))
    for key in ("generation_kwargs", "filter_list"):
        del task[key]
    task |= {"output_type": "loglikelihood",
             "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]}
    (tmp_path / "translation.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "translation.jsonl").symlink_to(folder / "data" / "tax" / "translation.jsonl")
    score = measure(folder / "model", TaskSuite(folders=[tmp_path]))["translation"]
    assert score.metric == "perplexity"
    assert score.stderr > 0


def test_scores_are_measured_in_silence(folder: Path, suite: TaskSuite, capfd: pytest.CaptureFixture[str]) -> None:
    measure(folder / "model", suite)
    assert capfd.readouterr() == ("", "")


def test_a_corpus_level_score_has_the_standard_error_of_its_items() -> None:
    values = [float(number % 4 == 0) for number in range(400)]
    error = rlhf.evaluation.lm_eval.resampled_error(lambda items: 100 * sum(items) / len(items), values, 400)
    assert error == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 400), rel=0.15)


def test_the_main_metric() -> None:
    assert main_metric({"alias": "x", "acc,none": 1, "acc_norm,none": 1, "acc_stderr,none": 0}) == ("acc_norm", "none")
    assert main_metric({"exact_match,strict": 1, "exact_match,flexible": 1}) == ("exact_match", "flexible")
    assert main_metric({"odd,none": 1}) == ("odd", "none")


@pytest.mark.parametrize(("answer", "references", "f1", "exact"), [
    ("The fish!", ["a fish"], 1, 1), ("red fish", ["fish", "blue"], 2 / 3, 0), ("unanswerable.", [], 1, 1),
    ("Not in background.", [], 1, 1), ("no answer", [], 1, 1), ("Not in background.", ["fish"], 0, 0),
    ("fish", [], 0, 0), ("", ["fish"], 0, 0), ("fish fish", ["fish"], 2 / 3, 0),
])
def test_squad_f1(answer: str, references: list[str], f1: float, exact: float) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("squad", BENCHMARKS / "squad.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scores = module.process_results({"answers": {"text": references}}, [answer])
    assert math.isclose(scores["f1"], f1)
    assert scores["exact"] == exact


def test_a_task_named_in_chat_is_asked_in_the_chat_format_and_the_others_are_not(
        folder: Path, suite: TaskSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator

    one, other = sorted(TASKS)[:2]
    real, asked = evaluator.simple_evaluate, {}

    def recorded(model: Any, tasks: list[Any], **options: Any) -> Any:
        found = real(model, tasks=tasks, **options)
        for name, samples in found["samples"].items():
            asked[name] = samples[0]["arguments"][0][0]
        return found

    monkeypatch.setattr(evaluator, "simple_evaluate", recorded)
    scores = measure(folder / "model", replace(suite, tasks=[one, other], chat=[one]))
    codec = load_codec(folder / "model")
    plain, in_chat = asked[other], asked[one]
    measure(folder / "model", replace(suite, tasks=[one]))
    assert in_chat == codec.tokenizer.apply_chat_template([{"role": "user", "content": asked[one]}], tokenize=False,
                                                          add_generation_prompt=True)
    assert not plain.endswith("\n")  # what the template puts after a user's turn
    assert sorted(scores) == [one, other]
