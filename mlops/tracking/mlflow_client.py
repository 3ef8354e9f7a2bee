"""The uploader's MLflow calls: a parent run for each run, a child run for each stage, metrics, datasets, artifacts.

Used by `python -m mlops.tracking.uploader` only. Everything goes to experiment "instructflow" at MLFLOW_TRACKING_URI,
or to `mlflow.db` and `mlartifacts/` in the checkout.
"""

import dataclasses
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

# Retries are the uploader's: it looks for what an unanswered request did before it repeats it.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")

from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from mlops.config.loader import load_params
from mlops.config.paths import metrics_of
from mlops.config.stage_graph import OF_A_ROUND, declared_stages
from mlops.tracking.credentials import move_logins
from mlops.tracking.own_store import artifacts_beside, keep_private, own_store, with_driver
from mlops.tracking.parent_run import REPORTS, child_name, curve_rows, description, final_names, with_run
from mlops.tracking.proxies import ask_loopback_directly
from mlops.tracking.revision import COMMIT, revision
from mlops.tracking.upload_record import (
    RUNNING,
    Gone,
    Record,
    Refused,
    Row,
    Unreachable,
    data_version,
    numbers,
)
from rlhf.errors import UserError, without_secrets
from rlhf.params import Profile

Answer = TypeVar("Answer")
EXPERIMENT = "instructflow"
LAST_STAGE = "promote"  # the run is finished when it is
LAST_OF_ROUND = "round_scores@"
KEY_TAG = "instructflow.key"
RUN_NAME_TAG = "instructflow.run_name"
PARENT_TAG = "mlflow.parentRunId"
END_TAG = "ended"  # why a run failed or was killed
LONGEST_TAG = 5000  # characters that MLflow takes
NOTE_TAG = "mlflow.note.content"  # what MLflow shows as a run's description
DIGEST_CHARS = 36  # MLflow's limit; an md5 with ".dir" just fits
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST", "MALFORMED_REQUEST", "FEATURE_DISABLED"}

for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is raised as well


def tracking_uri(root: Path) -> str:
    """Where everything goes: MLFLOW_TRACKING_URI, without its login, or mlflow.db in the checkout."""
    move_logins(os.environ)
    ask_loopback_directly(os.environ)
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return with_driver(named)
    keep_private(root)
    return own_store(root)


def experiment_id(client: MlflowClient, root: Path) -> str:
    """The project's experiment, made or restored where it is missing; artifacts lie beside a database of our own."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts_beside(tracking_uri(root))))
    if found.lifecycle_stage == LifecycleStage.DELETED:
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


class MlflowTracker:
    """`mlops.tracking.upload_record.Tracker` for MLflow. Makes no request before it is asked something."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.uri = tracking_uri(self.root)
        self._answered: dict[tuple[Any, ...], Any] = {}

    def knows(self, run_id: str) -> bool:
        try:
            with _answers():
                self._client.get_run(run_id)
        except Gone:
            return False
        except Refused:
            return True  # it cannot be told: nothing is sent twice
        return True

    def open_run(self, record: Record, run: dict[str, Any]) -> None:
        stage, start_ms = run["stage"], record.started_ns // 1_000_000
        arm = {"arm": run["arm"]} if "arm" in run else {}
        params = {"seed": run["seed"], "profile": run["profile"], **arm, **_prefixed(stage, run["params"])}
        with _answers(gone=Unreachable):  # "no such experiment": replaced under us, made anew at the next attempt
            try:
                once = (record.key, record.started_ns)
                parent = self._once((*once, "parent"), lambda: self._parent_run(record.run_name, start_ms))
                if parent.info.status != RUNNING:
                    self._once((*once, "reopen"), lambda: self.reopen(parent.info.run_id))
                child = self._once((*once, "run"), lambda: self._find_or_create(
                    record.key, child_name(run, record.run_name), start_ms, {PARENT_TAG: parent.info.run_id}))
                self._once((*once, "describe"), lambda: self._describe_parent(parent, record.run_name, run))
                tags = self._tags(run) | {"stage": stage.partition("@")[0] if arm else stage, **arm}
                if "beta_rule" in run["params"]:
                    tags["beta_rule"] = run["params"]["beta_rule"]
                self._once((*once, "log"), lambda: self._log(child, params, tags))
                self._once((*once, "inputs"), lambda: self._log_datasets(stage, [child.info.run_id,
                                                                                 parent.info.run_id]))
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    self._answered.clear()
                    self.__dict__.pop("_experiment", None)
                raise
        record.run_id, record.parent_run_id = child.info.run_id, parent.info.run_id
        record.experiment_id = self._experiment

    def send(self, record: Record, run: dict[str, Any], rows: Sequence[Row], timestamp_ms: int) -> None:
        # The parent's first: what is asked after a lost answer is the stage's own run.
        for run_id, part in ((record.parent_run_id, curve_rows(run, rows)), (record.run_id, rows)):
            points = [Metric(key=metric_name(name), value=value, timestamp=timestamp_ms, step=row.step)
                      for row in part for name, value in row.values.items()]
            with _answers():
                if points:
                    self._client.log_batch(run_id, metrics=points)

    def last_step(self, run_id: str, metric: str) -> int:
        with _answers():
            history = self._client.get_metric_history(run_id, metric_name(metric))
        return max((point.step for point in history), default=-1)

    def finish(self, record: Record, run: dict[str, Any], done: dict[str, Any], journaled: Collection[str]) -> None:
        """The stage's run gets the final metrics that its journal does not have, the parent run all of them, by the
        names of `final_names`, and what REPORTS names."""
        stage, final = run["stage"], numbers(done["metrics"])
        own = {name: value for name, value in final.items() if name not in journaled}
        once = (record.run_id, record.end_ms)
        with _answers():
            self._once((*once, "final"),
                       lambda: self._log_final(record.run_id, own, max(record.end_ms, record.open_ms + 1),
                                               max(record.last_step, 0)))  # after the journal's: the last one counts
            told = partial(self._told, record)
            for path in dict.fromkeys([*done["artifacts"], f"{metrics_of(stage)}.json"]):
                self._once((*once, "upload", path), partial(self._upload, record.run_id, path, told))
            self._once((*once, "ended"), lambda: self._client.set_terminated(record.run_id, "FINISHED", record.end_ms))
            parent = self._parent_run(record.run_name, record.started_ns // 1_000_000)
            if parent.info.run_id != record.parent_run_id:  # somebody deleted it
                self._describe_parent(parent, record.run_name, run)
                self._client.set_tag(record.run_id, PARENT_TAG, parent.info.run_id)
                record.parent_run_id = parent.info.run_id
            self._once((*once, "final", record.parent_run_id), lambda: self._log_final(
                record.parent_run_id, final_names(run, final, self._promoted()), record.end_ms, run.get("round", 0)))
            if report := REPORTS.get(stage):
                self._once((*once, "report"), lambda: self._upload(record.parent_run_id, report, told))
                said = description(self.root, record.run_name, self._tags(run), stage != "validate")
                self._client.set_tag(record.parent_run_id, NOTE_TAG, said[:LONGEST_TAG])
            if stage == LAST_STAGE or stage.startswith(LAST_OF_ROUND):
                self._client.set_terminated(record.parent_run_id, "FINISHED", record.end_ms)

    def end(self, run_id: str, status: str, note: str = "") -> None:
        with _answers(gone=None):
            if self._client.get_run(run_id).info.status != RUNNING:
                return
            if note:
                self._client.set_tag(run_id, END_TAG, without_secrets(note)[:LONGEST_TAG])
            self._client.set_terminated(run_id, status)

    def reopen(self, run_id: str) -> None:
        with _answers(gone=None):
            if self._client.get_run(run_id).info.status != RUNNING:
                self._client.update_run(run_id, RUNNING)
                self._client.set_tag(run_id, END_TAG, "")

    def system(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        """The machine's load, as it is now (`mlops.tracking.system_metrics`)."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    # --- parts ---

    def _once(self, key: tuple[Any, ...], request: Callable[[], Answer]) -> Answer:
        """A request that is not made again once it was answered: a server that fails now and then lets each attempt
        get a little further."""
        if key not in self._answered:
            self._answered[key] = request()
        return cast(Answer, self._answered[key])

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    @cached_property
    def _experiment(self) -> str:
        return experiment_id(self._client, self.root)

    def _find_or_create(self, key: str, name: str, start_ms: int, tags: Mapping[str, str]) -> Run:
        found = self._client.search_runs([self._experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1,
                                         order_by=["attributes.start_time ASC"])
        if found:
            return found[0]
        return self._client.create_run(self._experiment, start_ms, {KEY_TAG: key, **tags}, name)

    def _parent_run(self, run_name: str, start_ms: int) -> Run:
        return self._find_or_create(parent_key(run_name), run_name, start_ms, {RUN_NAME_TAG: run_name})

    def _promoted(self) -> str:
        """The arm that goes to the gates; empty where the profile cannot be read any more."""
        try:
            return load_params(self.root).stages.promoted
        except UserError:
            return ""

    def _describe_parent(self, parent: Run, run_name: str, run: dict[str, Any]) -> None:
        """Gives the parent run the parameters of all stages, so that runs can be compared."""
        arm = ""
        try:
            loaded = load_params(self.root)
            arm = loaded.stages.promoted
            params = {"seed": loaded.seed, "profile": loaded.profile}
            for section, values in dataclasses.asdict(loaded.stages).items():
                params |= _prefixed(section, values) if section != "arms" else _arms(loaded.stages)
        except UserError:  # edited since the stage started
            params = {"seed": run["seed"], "profile": run["profile"], **_prefixed(run["stage"], run["params"])}
        rule = params.get(f"arms.{arm}.beta_rule", params.get("ppo.beta_rule"))
        tags = self._tags(run) | {RUN_NAME_TAG: run_name}  # also where older code has made the run, without this tag
        tags |= {NOTE_TAG: description(self.root, run_name, tags, False)} if NOTE_TAG not in parent.data.tags else {}
        self._log(parent, params, tags | ({"beta_rule": rule} if rule else {}))

    def _log(self, run: Run, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Parameters that the run does not have yet (MLflow never changes one), and tags."""
        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        changed = [RunTag(key, str(value)) for key, value in tags.items() if run.data.tags.get(key) != str(value)]
        self._client.log_batch(run.info.run_id, params=new, tags=changed)

    def _log_final(self, run_id: str, values: Mapping[str, float], time_ms: int, step: int) -> None:
        self._client.log_batch(run_id, metrics=[Metric(metric_name(name), value, time_ms, step)
                                                for name, value in values.items()])

    def _tags(self, run: dict[str, Any]) -> dict[str, str]:
        tags = {"profile": run["profile"], "data_version": data_version(self.root), **revision(self.root)}
        return tags | ({"mlflow.source.git.commit": tags[COMMIT]} if COMMIT in tags else {})

    def _log_datasets(self, stage: str, run_ids: Sequence[str]) -> None:
        """What dvc.yaml declares as the stage's inputs from data/, with the version that data.dvc pins."""
        path = self.root / "dvc.yaml"
        declared = declared_stages(self.root).get(stage, {}) if path.exists() else {}
        version = data_version(self.root)
        inputs = []
        for dep in declared.get("deps", []):
            if str(dep).startswith("data/") and version:
                source = CodeDatasetSource({"path": dep, "data.dvc": version})
                dataset = MetaDataset(source, Path(dep).stem, version[:DIGEST_CHARS])  # type: ignore[abstract]
                inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", stage)]))
        for run_id in run_ids:
            self._client.log_inputs(run_id, inputs)

    def _upload(self, run_id: str, path: str, told: Callable[[str], str]) -> None:
        """`told`: adds to a report which run it is of."""
        source, folder = self.root / path, str(Path(path).parent)
        if source.is_dir():
            self._client.log_artifacts(run_id, str(source), path)
        elif source.exists():  # else another run has replaced it since
            with tempfile.TemporaryDirectory() as scratch:
                if source.suffix == ".html":
                    source = Path(scratch) / source.name
                    source.write_text(told((self.root / path).read_text(encoding="utf-8")), encoding="utf-8")
                self._client.log_artifact(run_id, str(source), None if folder == "." else folder)

    def _told(self, record: Record, page: str) -> str:
        started = self._client.get_run(record.parent_run_id).info.start_time
        return with_run(page, record.run_name, started, revision(self.root).get(COMMIT, ""))


@contextmanager
def _answers(gone: type[Exception] | None = Gone) -> Iterator[None]:
    """Turns MLflow's errors into the three that the uploader knows; `gone=None`: a missing run is fine."""
    try:
        yield
    except MlflowException as error:
        text = without_secrets(" ".join(str(error).split()))
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            if gone is not None:
                raise gone(text) from error
        elif error.error_code in REFUSALS:
            raise Refused(text) from error
        else:
            raise Unreachable(text) from error
    except Exception as error:  # the object store's client, the database's driver: each has its own
        raise Unreachable(without_secrets(f"{type(error).__name__}: {error}")) from error


def metric_name(name: str) -> str:
    """The name with characters that MLflow does not allow replaced."""
    return re.sub(r"[^\w/.\- :]", "_", name)


def _arms(profile: Profile) -> dict[str, Any]:
    """The arms, and what each changes of section ppo: arms.ppo_ptx.ptx_coef."""
    ppo = dataclasses.asdict(profile.ppo)
    return {"arms": ", ".join(profile.arms), **{
        f"arms.{arm}.{name}": value for arm, own in profile.arms.items()
        for name, value in dataclasses.asdict(own).items() if value != ppo[name]}}


def _prefixed(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as section.name: those of an arm (ppo@ppo_ptx) in section ppo, of a round's stage (round_rm@r1) in
    section rounds."""
    section = "rounds" if stage.startswith(OF_A_ROUND) else stage.partition("@")[0]
    return {f"{section}.{name}": value for name, value in values.items()}


def parent_key(run_name: str) -> str:
    """The tag by which a parent run is found: safe inside a search filter, whatever the run is called.

    Its prefix is an earlier word for a run, and stays: parent runs that are in MLflow are found by it.
    """
    return "line-" + hashlib.sha256(run_name.encode()).hexdigest()[:32]
