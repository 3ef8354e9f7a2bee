"""Benchmarks with lm-evaluation-harness: public tasks by name, and folders of task YAML files with JSON Lines data.

The alignment tax of a task is the base model's score minus the aligned model's, in the task's unit [InstructGPT §4.2].
Results are cached by the contents of model and task, so that an unchanged model is evaluated once.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf.errors import UserError
from rlhf.files import hash_paths, write_json
from rlhf.model.device import device
from rlhf.model.load import load_policy
from rlhf.model.tokenizer import load_tokenizer
from rlhf.training import distributed
from rlhf.training.hardware import in_bf16

METRICS = ("f1", "best_f1", "bleu", "acc_norm", "acc", "exact_match", "mc2", "em", "score", "rougeL_acc", "bleu_acc",
           "likelihood_diff", "pct_stereotype", "toxicity", "perplexity")  # first reported one is used
PERCENT = ("bleu", "chrf", "ter", "rouge", "squadv2/")  # prefixes of metric or task/metric with a maximum of 100, not 1
ANSWER = "/answer"
BOOTSTRAP = 200  # lm-eval's resamples, for metrics that are not a mean over items


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task, in the task's unit.

    `unit` is a perfect score (1 or 100), `chance` the score of guessing if the task states it, `items` the value of
    each item if the metric is their mean, else empty. `bits`: -log2 p(right answer | prompt) of each item, which has no
    ceiling; empty where a task has no single right answer.
    """

    metric: str
    value: float
    stderr: float
    higher_is_better: bool
    unit: float
    chance: float | None
    items: list[float]
    bits: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TaskSuite:
    """The tasks and how they are run.

    `tasks`: names; None for every task of `folders`. `data`: task name -> JSON Lines file that replaces its hub
    dataset. `limit`: items per task, 0 for all. `chat`: tasks that are asked in the tokenizer's chat template; the
    others are plain text, after BOS where the tokenizer puts it.
    """

    tasks: Sequence[str] | None = None
    folders: Sequence[Path] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    limit: int = 0
    few_shot: int = 0
    batch_size: int = 64
    precision: str = "fp32"
    chat: Sequence[str] = ()


def measure(model_folder: Path, suite: TaskSuite, cache: Path | None = None) -> dict[str, TaskScore]:
    """Scores of a model on `suite.tasks`, or on every task of `suite.folders`. Processes share the items.

    `cache`: folder of earlier results. Raises UserError for an unknown task and for data that cannot be loaded.
    """
    names = local_tasks(suite.folders) if suite.tasks is None else list(suite.tasks)
    files: dict[str, Path] = {}
    if cache and model_folder.is_dir():
        model_hash = hash_paths([model_folder], model_folder)
        files = {name: cache / f"{_cache_key(name, model_hash, suite)}.json" for name in names}
    cached = distributed.broadcast({name: _read(file) for name, file in files.items() if file.is_file()})
    missing = [name for name in names if name not in cached]
    measured = _run(model_folder, missing, suite) if missing else {}
    for name in measured.keys() & files.keys():
        write_json(files[name], {task: asdict(score) for task, score in measured[name].items()})
    scores = cached | measured
    return dict(sorted((task, score) for name in names for task, score in scores[name].items()))


def _read(file: Path) -> dict[str, TaskScore]:
    return {task: TaskScore(**score) for task, score in json.loads(file.read_text()).items()}


def _cache_key(name: str, model_hash: str, suite: TaskSuite) -> str:
    """Hash of all that a task's result depends on: weights, task, data, limit, few-shot, precision, lm-eval version."""
    homes = [folder for folder in suite.folders if (folder / f"{name}.yaml").is_file()]
    # Other tasks' rows aside, whatever lies beside a task may be included by it.
    inputs = [path for folder in homes for path in sorted(folder.rglob("*"))
              if "__pycache__" not in path.parts and (path.stem == name or path.suffix != ".jsonl")]
    if name in suite.data:
        inputs.append(Path(suite.data[name]))
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs if path.is_file()]
    text = json.dumps([name, model_hash, contents, suite.limit, suite.few_shot, suite.precision, version("lm_eval"),
                       name in suite.chat])
    return f"{name.replace('/', '_')[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def local_tasks(folders: Sequence[Path]) -> list[str]:
    """The names of the tasks in the folders: one YAML file per task, named after it."""
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))


def _run(model_folder: Path, names: Sequence[str], suite: TaskSuite) -> dict[str, dict[str, TaskScore]]:
    """{name: {task: score}}: an lm-eval group or tag consists of several tasks. Raises UserError."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # lm-eval forks a process per core for its bootstrap. Forks of a trainer keep its answer to SIGTERM, which is to go
    # on until a checkpoint, so they are never ended.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with _only_errors(), tempfile.TemporaryDirectory() as scratch:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        evaluator.add_env_info = lambda _: None  # it runs pip and more, one second per model
        evaluator.get_git_commit_hash = lambda: ""  # of the working directory; git may complain about it on stderr
        known = local_tasks(suite.folders)
        folders = [str(folder.resolve()) for folder in suite.folders if folder.is_dir()]
        manager = TaskManager(include_path=folders or None, include_defaults=not set(names) <= set(known))
        loaded = {name: _load(name, manager, suite, Path(scratch)) for name in names}
        model = HFLM(pretrained=load_policy(model_folder), tokenizer=load_tokenizer(model_folder),
                     batch_size=suite.batch_size, device=str(device()),
                     mixed_precision_dtype="bfloat16" if in_bf16(suite.precision) else None)
        _share_items(model)
        tasks = {task: content for group in loaded.values() for task, content in group.items()}
        tasks |= _answers_as_tasks(tasks)
        in_chat = {task for name, group in loaded.items() if name in suite.chat for task in group}
        results: dict[str, Any] = {}
        try:
            for chat in (False, True):
                some = {task: item for task, item in tasks.items() if (task.removesuffix(ANSWER) in in_chat) == chat}
                found = evaluator.simple_evaluate(
                    model, tasks=list(some.values()), num_fewshot=suite.few_shot or None, limit=suite.limit or None,
                    bootstrap_iters=BOOTSTRAP, apply_chat_template=chat,
                    task_manager=manager) if some else None  # without the manager lm-eval scans all tasks again
                results |= dict.fromkeys(some, found) if found else {}
        except AssertionError as error:  # lm-eval's error for a text that is too long
            message = f"{', '.join(tasks)}: an item is longer than the {model.max_length} tokens of {model_folder}"
            distributed.all_gather((None, message))  # the other processes wait in `gather`
            raise UserError(message) from error
    return distributed.broadcast({} if not results else {  # empty in all processes but the main one
        name: {task: _score(task, results, group[task]) for task in group} for name, group in loaded.items()})


def _answers_as_tasks(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """For each task whose answer is generated: a second one that asks for the probability of its right answer, named
    `<task>/answer`. Without those whose right answer is no single text."""
    from lm_eval.api.task import ConfigurableTask

    answers = {}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until" or not isinstance(task, ConfigurableTask):
            continue
        config = task.config.to_dict(keep_callable=True) | {
            "task": f"{name}{ANSWER}", "doc_to_target": partial(_target, task), "target_delimiter": "",
            "output_type": "loglikelihood", "generation_kwargs": None, "filter_list": None, "process_results": None,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
        documents = task.eval_docs
        if len(documents) and isinstance(task.doc_to_target(documents[0]), str):
            answers[f"{name}{ANSWER}"] = ConfigurableTask(config=config)
    return answers


def _target(task: Any, document: dict[str, Any]) -> str:
    """The right answer as it follows the prompt."""
    return f"{task.config.target_delimiter}{task.doc_to_target(document)}"


def _share_items(model: Any) -> None:
    """Makes lm-eval split a task's items among the processes; its collective operations are replaced by ours.

    An error in one process is raised in all of them.
    """
    def gather(value: Any, dst: int = 0) -> list[Any]:
        gathered = distributed.all_gather((value, ""))
        for _, error in gathered:
            if error:
                raise UserError(error)
        return [item for item, _ in gathered]

    model._rank, model._world_size = distributed.rank(), distributed.size()
    model.gather_object = gather
    model.all_gather = lambda tensor: tensor.new_tensor(gather(tensor.item()))
    model.barrier = lambda: gather(None)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Silences lm-eval's progress; a stage reports its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load(name: str, manager: Any, suite: TaskSuite, scratch: Path) -> dict[str, Any]:
    """{task name: lm-eval task}. Raises UserError if there is no such task or its data cannot be loaded."""
    spec = name
    if name in manager.task_index and (rows := _rows_file(name, suite)):
        spec = str(_with_rows(manager.task_index[name].yaml_path, name, rows, scratch))
    if name not in manager.task_index:
        raise UserError(f"no task {name!r}: neither in {', '.join(map(str, suite.folders)) or 'a folder'} "
                        "nor in lm-eval; `lm-eval ls tasks` lists its tasks")
    try:
        return dict(manager.load([spec])["tasks"])
    except Exception as error:  # whatever the hub, a parser or a task's own code raises
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"task {name}: its data cannot be loaded ({type(error).__name__}: {reason}); name a file "
                        "for it in evaluate.task_data") from error


def _rows_file(name: str, suite: TaskSuite) -> Path | None:
    """The JSON Lines file of a task: from `suite.data`, or next to the task's YAML; None for the hub's dataset."""
    if name in suite.data:
        path = Path(suite.data[name])
        if not path.is_file():
            raise UserError(f"{path}: no such file, and evaluate.task_data names it for {name}")
        return path.resolve()
    local = [folder / f"{name}.jsonl" for folder in suite.folders]
    return next((path.resolve() for path in local if path.is_file()), None)


def _with_rows(task: Path, name: str, rows: Path, scratch: Path) -> Path:
    """A copy of a task's YAML that reads every split from the file `rows`."""
    path, link = scratch / f"{name}.yaml", scratch / f"{name}.jsonl"
    link.unlink(missing_ok=True)  # a task may be named twice
    link.symlink_to(rows)  # datasets takes a path for a pattern, and the checkout's may have [ or ? in it
    files = dict.fromkeys(("train", "validation", "test"), str(link))
    path.write_text(yaml.safe_dump({"include": str(task), "dataset_path": "json", "dataset_name": None,
                                    "dataset_kwargs": {"data_files": files, "cache_dir": str(scratch / "rows")}}))
    return path


def _score(task: str, found: Mapping[str, Mapping[str, Any]], loaded: Any) -> TaskScore:
    """The task's main metric with its standard error: that of the mean over items, else a bootstrap.

    `found`: the results of lm-eval's run that each task was part of.
    """
    results = found[task]
    metric, variant = main_metric(results["results"][task])
    value = float(results["results"][task][f"{metric},{variant}"])
    samples = sorted((sample for sample in results["samples"][task] if sample["filter"] == variant),
                     key=lambda sample: sample["doc_id"])
    values = [sample[metric] for sample in samples]
    numbers = all(isinstance(item, (int, float)) for item in values)
    items = [float(item) for item in values] if numbers else []
    if items and not math.isclose(sum(items) / len(items), value, rel_tol=1e-6, abs_tol=1e-9):
        items = []  # the metric is not a mean over items
    error = results["results"][task].get(f"{metric}_stderr,{variant}")
    if items:
        stderr = _standard_error(items)
    elif isinstance(error, (int, float)) and math.isfinite(error):
        stderr = float(error)
    else:  # a corpus-level score for which lm-eval gives no error (SQuAD's F1)
        stderr = resampled_error(loaded.aggregation()[metric], values)
    percent = metric.startswith(PERCENT) or f"{task}/{metric}".startswith(PERCENT)
    chance = (loaded.config.metadata or {}).get("chance")
    better = results["higher_is_better"].get(task, {}).get(metric)
    return TaskScore(metric, value, stderr, better is not False, 100.0 if percent else 1.0, chance, items,
                     _answer_bits(task, results["samples"], loaded))


def _answer_bits(task: str, samples: Mapping[str, Any], loaded: Any) -> list[float]:
    """-log2 p(right answer | prompt) of each item: of a choice, or of the text that `_answers_as_tasks` asked for."""
    if loaded.OUTPUT_TYPE == "multiple_choice" and not loaded.multiple_input:
        of_choices = {sample["doc_id"]: (sample["resps"], sample["target"]) for sample in samples[task]}
        if all(isinstance(target, int) and target >= 0 for _, target in of_choices.values()):
            return [-resps[target][0][0] / math.log(2) for _, (resps, target) in sorted(of_choices.items())]
    if f"{task}{ANSWER}" in samples:
        of_texts = {sample["doc_id"]: sample["resps"] for sample in samples[f"{task}{ANSWER}"]}
        return [-resps[0][0][0] / math.log(2) for _, resps in sorted(of_texts.items())]
    return []


def resampled_error(score: Callable[[list[Any]], float], values: Sequence[Any], resamples: int = 50) -> float:
    """Standard error of `score(values)` by a seeded bootstrap over the items."""
    random = np.random.default_rng(0)
    draws = [float(score([values[place] for place in random.integers(0, len(values), len(values))]))
             for _ in range(resamples)]
    return float(np.std(draws, ddof=1))


def main_metric(results: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, filter) of a task's score: the first of METRICS, else the first by name. Raises UserError if none."""
    keys = sorted(key for key in results if "," in key and "_stderr," not in key)
    by_name: dict[str, str] = {}
    for key in keys:
        metric, variant = key.split(",", 1)
        by_name.setdefault(metric, variant)
    for metric in (*METRICS, *sorted(by_name)):
        if metric in by_name:
            return metric, by_name[metric]
    raise UserError("lm-eval reports no metric for a task")


def _standard_error(items: Sequence[float]) -> float:
    """Standard error of the mean with n - 1, as lm-eval computes it."""
    if len(items) < 2:
        return 0.0
    mean = sum(items) / len(items)
    return math.sqrt(sum((item - mean) ** 2 for item in items) / (len(items) - 1) / len(items))
