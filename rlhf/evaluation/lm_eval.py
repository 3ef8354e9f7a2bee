"""Benchmarks through lm-evaluation-harness: public tasks by name, and folders of task YAML with JSON Lines beside it.

The alignment tax of a task is the base model's score less the aligned one's, in the task's own unit [InstructGPT §4.2].
A result is kept by the contents of model and task, so that a second evaluation of an unchanged model costs nothing.
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

METRICS = ("f1", "best_f1", "bleu", "acc_norm", "acc", "exact_match", "mc2", "em", "score", "rougeL_acc", "bleu_acc",
           "likelihood_diff", "pct_stereotype", "toxicity", "perplexity")  # the first one a task has is its score
OF_100 = ("bleu", "chrf", "ter", "rouge", "squadv2/")  # beginnings of task/metric or metric whose best is 100, not 1
BOOTSTRAP = 200  # the harness's own resamples, for metrics that are no mean over items


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task, in the task's own unit.

    `unit` is what a perfect score is (1 or 100), `chance` what guessing gives where the task says so, `items` the value
    of each item where the metric is their mean.
    """

    metric: str
    value: float
    stderr: float
    higher_is_better: bool
    unit: float
    chance: float | None
    items: list[float]


@dataclass(frozen=True)
class Harness:
    """What to measure and how. `tasks`: None for every task of the folders. `data`: task name -> JSON Lines that stand
    in for its hub dataset."""

    tasks: Sequence[str] | None = None
    folders: Sequence[Path] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    limit: int = 0
    few_shot: int = 0
    batch_size: int = 64
    precision: str = "fp32"


def measure(model_folder: Path, harness: Harness, kept: Path | None = None) -> dict[str, TaskScore]:
    """Scores of a model on `harness.tasks`, or on every task of `harness.folders`. Several processes share the items.

    `kept`: a folder of earlier results. Raises UserError for an unknown task and for data that cannot be had.
    """
    names = local_tasks(harness.folders) if harness.tasks is None else list(harness.tasks)
    places: dict[str, Path] = {}
    if kept and model_folder.is_dir():
        model_hash = hash_paths([model_folder], model_folder)
        places = {name: kept / f"{result_key(name, model_hash, harness)}.json" for name in names}
    earlier = distributed.broadcast({name: _read(place) for name, place in places.items() if place.is_file()})
    missing = [name for name in names if name not in earlier]
    measured = _run(model_folder, missing, harness) if missing else {}
    for name in measured.keys() & places.keys():
        write_json(places[name], {task: asdict(score) for task, score in measured[name].items()})
    found = earlier | measured
    return dict(sorted((task, score) for name in names for task, score in found[name].items()))


def _read(kept: Path) -> dict[str, TaskScore]:
    return {task: TaskScore(**score) for task, score in json.loads(kept.read_text()).items()}


def result_key(name: str, model_hash: str, harness: Harness) -> str:
    """Hash of all that a task's result depends on: weights, task, data, limit, examples, arithmetic, library."""
    homes = [folder for folder in harness.folders if (folder / f"{name}.yaml").is_file()]
    inputs = [path for folder in homes for form in (f"{name}.*", "*.py") for path in sorted(folder.glob(form))]
    if name in harness.data:
        inputs.append(Path(harness.data[name]))
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs if path.is_file()]
    text = json.dumps([name, model_hash, contents, harness.limit, harness.few_shot, harness.precision,
                       version("lm_eval")])
    return f"{name.replace('/', '_')[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def local_tasks(folders: Sequence[Path]) -> list[str]:
    """The tasks that the folders describe: one a YAML file, named like it."""
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))


def _run(model_folder: Path, names: Sequence[str], harness: Harness) -> dict[str, dict[str, TaskScore]]:
    """{asked name: {task: score}}: a group or tag of the harness has several tasks."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        evaluator.add_env_info = lambda _: None  # asks pip and more about this machine, a second for each model
        known = local_tasks(harness.folders)
        folders = [str(folder.resolve()) for folder in harness.folders if folder.is_dir()]
        manager = TaskManager(include_path=folders or None, include_defaults=not set(names) <= set(known))
        loaded = {name: _load(name, manager, harness, Path(scratch)) for name in names}
        model = HFLM(pretrained=load_policy(model_folder), tokenizer=load_tokenizer(model_folder),
                     batch_size=harness.batch_size, device=str(device()),
                     mixed_precision_dtype="bfloat16" if harness.precision == "bf16" else None)
        _share_items(model)
        tasks = {name: task for found in loaded.values() for name, task in found.items()}
        try:
            results = evaluator.simple_evaluate(model, tasks=list(tasks.values()), num_fewshot=harness.few_shot or None,
                                                limit=harness.limit or None, bootstrap_iters=BOOTSTRAP,
                                                task_manager=manager)  # left out, it would scan all tasks once more
        except AssertionError as error:  # how the harness says that a text does not fit
            said = f"{', '.join(tasks)}: an item is longer than the {model.max_length} tokens of {model_folder}"
            distributed.all_gather((None, said))  # the others are waiting
            raise UserError(said) from error
    return distributed.broadcast({} if results is None else {  # None in all processes but the first
        name: {task: _score(task, results, found[task]) for task in found} for name, found in loaded.items()})


def _share_items(model: Any) -> None:
    """Has the harness give each process its share of a task's items: in its own way, told to each other in ours."""
    def gather(thing: Any, dst: int = 0) -> list[Any]:
        found = distributed.all_gather((thing, ""))
        for _, failed in found:
            if failed:
                raise UserError(failed)
        return [item for item, _ in found]

    model._rank, model._world_size = distributed.rank(), distributed.size()
    model.gather_object = gather
    model.all_gather = lambda tensor: tensor.new_tensor(gather(tensor.item()))
    model.barrier = lambda: gather(None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness reports every request on stderr; a stage has its own progress line."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load(name: str, manager: Any, harness: Harness, scratch: Path) -> dict[str, Any]:
    """{task name: task of the harness}. Raises UserError where there is no such task or its data cannot be had."""
    spec = name
    if name in manager.task_index and (rows := _rows_of(name, harness)):
        spec = str(_with_rows(manager.task_index[name].yaml_path, name, rows, scratch))
    if name not in manager.task_index:
        raise UserError(f"no task {name!r}: neither in {', '.join(map(str, harness.folders)) or 'a folder'} "
                        "nor known to lm-eval; `lm-eval ls tasks` lists those")
    try:
        return dict(manager.load([spec])["tasks"])
    except Exception as error:  # whatever the hub, a parser or a task's own code raises
        said = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"task {name}: its data cannot be had ({type(error).__name__}: {said}); name a file "
                        "for it in evaluate.task_data") from error


def _rows_of(name: str, harness: Harness) -> Path | None:
    """The file of rows that the parameters name, or that lies beside the task's YAML; None: the hub's."""
    if name in harness.data:
        path = Path(harness.data[name])
        if not path.is_file():
            raise UserError(f"{path}: no such file, and evaluate.task_data names it for {name}")
        return path.resolve()
    beside = [folder / f"{name}.jsonl" for folder in harness.folders]
    return next((path.resolve() for path in beside if path.is_file()), None)


def _with_rows(task: Path, name: str, rows: Path, scratch: Path) -> Path:
    """A task's YAML again, its rows taken from a file whatever split is asked for."""
    path = scratch / f"{name}.yaml"
    files = dict.fromkeys(("train", "validation", "test"), str(rows))
    path.write_text(yaml.safe_dump({"include": str(task), "dataset_path": "json", "dataset_name": None,
                                    "dataset_kwargs": {"data_files": files, "cache_dir": str(scratch / "rows")}}))
    return path


def _score(task: str, results: Mapping[str, Any], loaded: Any) -> TaskScore:
    """The task's main metric with its standard error: that of a mean over items, else the harness's bootstrap."""
    metric, variant = main_metric(results["results"][task])
    value = float(results["results"][task][f"{metric},{variant}"])
    samples = sorted((sample for sample in results["samples"][task] if sample["filter"] == variant),
                     key=lambda sample: sample["doc_id"])
    values = [sample[metric] for sample in samples]
    plain = all(isinstance(item, (int, float)) and not isinstance(item, complex) for item in values)
    items = [float(item) for item in values] if plain else []
    if items and not math.isclose(sum(items) / len(items), value, rel_tol=1e-6, abs_tol=1e-9):
        items = []  # no mean over items
    error = results["results"][task].get(f"{metric}_stderr,{variant}")
    if items:
        stderr = _standard_error(items)
    elif isinstance(error, (int, float)) and math.isfinite(error):
        stderr = float(error)
    else:  # a score of the whole corpus that the harness gives no error for (SQuAD's F1): never pass it for exact
        stderr = resampled_error(loaded.aggregation()[metric], values)
    percent = metric.startswith(OF_100) or f"{task}/{metric}".startswith(OF_100)
    chance = (loaded.config.metadata or {}).get("chance")
    better = results["higher_is_better"].get(task, {}).get(metric)
    return TaskScore(metric, value, stderr, better is not False, 100.0 if percent else 1.0, chance, items)


def resampled_error(score: Callable[[list[Any]], float], values: Sequence[Any], resamples: int = 50) -> float:
    """Standard error of `score(values)` by a seeded bootstrap over the items."""
    random = np.random.default_rng(0)
    draws = [float(score([values[place] for place in random.integers(0, len(values), len(values))]))
             for _ in range(resamples)]
    return float(np.std(draws, ddof=1))


def main_metric(results: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, filter) that stands for a task: the first of METRICS, else the first by name."""
    keys = sorted(key for key in results if "," in key and "_stderr," not in key)
    by_name: dict[str, str] = {}
    for key in keys:
        metric, variant = key.split(",", 1)
        by_name.setdefault(metric, variant)
    for metric in (*METRICS, *sorted(by_name)):
        if metric in by_name:
            return metric, by_name[metric]
    raise UserError("a task without a metric")


def _standard_error(items: Sequence[float]) -> float:
    """Of the mean of the items, with n - 1, as the harness has it."""
    if len(items) < 2:
        return 0.0
    mean = sum(items) / len(items)
    return math.sqrt(sum((item - mean) ** 2 for item in items) / (len(items) - 1) / len(items))
