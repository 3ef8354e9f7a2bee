"""What the uploader knows of a scratch folder (its upload.json), and how it sends what is new there, each point once.

1. A run is created with a key of ours as a tag, and the key is on disk before. After a crash the run is found by it.
2. Before rows are sent, upload.json gets the batch's last step and its timestamp; after the answer, that they are
   sent. A crash or a lost answer in between leaves the batch open: the server is asked for the last step it has
   (it stores a batch whole or not at all), and what remains goes again *with the same timestamp*. The server's
   primary key is (run, metric, step, timestamp, value), so even a batch that arrives late, twice, stays one.
3. A journal that was cut back by a resumed stage repeats its steps; those up to the last sent are skipped. An open
   batch keeps its timestamp until the journal has grown past it again.
4. All that follows done.json (final metrics, artifacts, status) overwrites itself when repeated.
5. A stage that ended otherwise is FAILED in MLflow where it has left failed.json, else KILLED: that is told when no
   stage and no flow lives any more, by whichever uploader comes by. If the stage goes on, its run is RUNNING again.

A new MLflow run begins where the run's name is not the recorded one, or the stage finished again with another result.
"""

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from rlhf.files import write_json
from rlhf.training.journal import read_journal

FAILED_NOTE = "failed.json"  # of a stage that ended with an error (tasks/stage.py)
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's states of a run
RECORD, OLD_RECORD = "upload.json", "mirror.json"  # the latter as older code called it
OPEN, DONE = "open", "done"
UNFINISHED = Path("scratch") / "unfinished.json"  # runs whose flow has begun and not ended
POINTS_PER_CALL = 1000  # MLflow's limit for log_batch

Mark = tuple[int, int, int] | None  # mtime in ns, size, inode; None if the file is absent


class Row(NamedTuple):
    """One journal row; empty cells are left out."""

    step: int
    values: dict[str, float]


class Unreachable(Exception):
    """The tracker does not answer, or fails in a way that may pass: try again later."""


class Refused(Exception):
    """The tracker answered and does not take this; the same request would fail again."""


class Gone(Exception):
    """The tracker does not know the run: its store was replaced."""


class Marks(NamedTuple):
    """When the files of a scratch folder were last written."""

    run: Mark
    journal: Mark
    done: Mark


@dataclass
class Record:
    """upload.json."""

    run_name: str  # the parent run's name
    key: str  # tag by which the server's run is found, should we crash before its id is written here
    started_ns: int  # run.json's time for which `run_name` was determined
    run_id: str = ""
    parent_run_id: str = ""
    experiment_id: str = ""
    last_step: int = -1  # every row up to here is on the server
    open_upto: int | None = None  # last step of a batch that may or may not be on the server
    open_ms: int = 0  # timestamp of that batch
    end_ms: int = 0  # timestamp of the final metrics
    state: str = OPEN
    done_ns: int = 0  # time and content of the done.json that was sent
    digest: str = ""
    ended: str = ""  # FAILED or KILLED, once MLflow has been told

    @classmethod
    def load(cls, folder: Path) -> "Record | None":
        """None where nothing has been sent yet. A record of older code counts until the first `save`."""
        content = read_json(folder / RECORD)
        if content is None:
            content = read_json(folder / OLD_RECORD)
        return None if content is None else cls(**_renamed(content))

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD, dataclasses.asdict(self))
        (folder / OLD_RECORD).unlink(missing_ok=True)


class Tracker(Protocol):
    """What the uploader asks of MLflow (`mlops.tracking.mlflow_client`). All raise Unreachable, Refused or Gone."""

    def knows(self, run_id: str) -> bool:
        """Whether the store has the run."""

    def open_run(self, record: Record, run: dict[str, Any]) -> None:
        """Finds or creates the run with `record.key` and its parent; fills in the record's three ids."""

    def send(self, record: Record, run: dict[str, Any], rows: Sequence[Row], timestamp_ms: int) -> None:
        """Logs rows as metrics of the stage's run, and the main ones as the parent's."""

    def last_step(self, run_id: str, metric: str) -> int:
        """The last step the server has of a metric, -1 for none."""

    def finish(self, record: Record, run: dict[str, Any], done: dict[str, Any], journaled: Collection[str]) -> None:
        """Logs final metrics and artifacts and ends the run; may be repeated."""

    def end(self, run_id: str, status: str, note: str = "") -> None:
        """Gives a run that counts as running its end, and says why; of any other it changes nothing."""

    def reopen(self, run_id: str) -> None:
        """The run goes on after all."""


@dataclass(frozen=True)
class Snapshot:
    """What a stage has written so far, of one start of the stage."""

    run: dict[str, Any]
    rows: list[Row]
    done: dict[str, Any] | None
    marks: Marks

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.done, self.rows]).encode()).hexdigest()


# --- reading ------------------------------------------------------------------------------------------------------


def scratch_folders(root: Path) -> list[Path]:
    """The scratch folders of stage runs, in the order they were started."""
    times = {path.parent: _mark(path) for path in (root / "scratch").glob("*/*/run.json")}
    return sorted(times, key=lambda folder: (times[folder] or (0,), folder))


def file_marks(folder: Path) -> Marks:
    return Marks(*(_mark(folder / name) for name in ("run.json", "journal.csv", "done.json")))


def _mark(path: Path) -> Mark:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json, what a starting stage writes; None where there is none."""
    content = read_json(folder / "run.json")
    return None if content is None else _renamed(content)


def _renamed(content: dict[str, Any]) -> dict[str, Any]:
    """A file of older code with today's keys: what is `run_name` was `line`."""
    return {"run_name" if key == "line" else key: value for key, value in content.items()}


def read_snapshot(folder: Path) -> Snapshot | None:
    """None if the stage was started anew or finished while we read: look again."""
    marks = file_marks(folder)
    run, done = read_run(folder), read_json(folder / "done.json")
    # A journal older than run.json is that of an earlier start; the stage will cut it back when it gets there.
    fresh = marks.journal and marks.run and marks.journal[0] >= marks.run[0]
    rows = _read_rows(folder / "journal.csv") if fresh or done is not None else []
    after = file_marks(folder)
    if run is None or (after.run, after.done) != (marks.run, marks.done):
        return None
    return Snapshot(run, rows, done, marks)


def _read_rows(path: Path) -> list[Row]:
    try:
        rows = read_journal(path)
    except FileNotFoundError:
        return []
    return [Row(int(row["step"]), {name: float(value) for name, value in row.items() if name != "step" and value})
            for row in rows]


def run_name_of(run: dict[str, Any], root: Path) -> str:
    """The run a stage belongs to: the flow run's name, or for `dvc repro` one name for each configuration."""
    if run["run_name"]:
        return str(run["run_name"])
    digest = hashlib.sha256()
    for name in ("params.yaml", f"profiles/{run['profile']}.yaml", "data.dvc"):
        digest.update((root / name).read_bytes() if (root / name).exists() else b"")
        digest.update(b"\0")
    return f"repro-{digest.hexdigest()[:8]}"


def data_version(root: Path) -> str:
    """The md5 by which data.dvc pins data/, empty if there is none yet."""
    path = root / "data.dvc"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return str((content or {}).get("outs", [{}])[0].get("md5", ""))


def forget_lost_store(root: Path, tracker: Tracker) -> int:
    """Where the store has none of the runs that are recorded as sent (it was deleted, or is another one), forgets the
    records, so that all that is on disk goes to it; returns their number."""
    sent: dict[Path, Record] = {}
    for folder in scratch_folders(root):
        with suppress(ValueError, TypeError, AttributeError):  # a record that cannot be read is its own folder's matter
            record = Record.load(folder)
            if record and record.run_id and record.state == DONE:
                sent[folder] = record
    if not sent or any(tracker.knows(record.run_id) for record in sent.values()):
        return 0
    for folder in sent:
        for name in (RECORD, OLD_RECORD):
            (folder / name).unlink(missing_ok=True)
    return len(sent)


# --- sending ------------------------------------------------------------------------------------------------------


def advance(folder: Path, root: Path, tracker: Tracker) -> bool:
    """Sends what is new in one scratch folder. False: there may be more at once, look again."""
    snapshot = read_snapshot(folder)
    if snapshot is None:
        return not (folder / "run.json").exists()
    record = _record_for(snapshot, folder, root, tracker)
    if record.state == DONE:
        return True
    try:
        if not record.run_id:
            tracker.open_run(record, snapshot.run)
            record.save(folder)
        _send_rows(record, snapshot, folder, tracker)
        if snapshot.done is not None:
            _finish(record, snapshot, folder, tracker)
    except Gone:
        _new_record(record.run_name, snapshot).save(folder)
        return False
    return True


def _new_record(run_name: str, snapshot: Snapshot) -> Record:
    assert snapshot.marks.run is not None
    return Record(run_name=run_name, key=uuid.uuid4().hex, started_ns=snapshot.marks.run[0])


def _record_for(snapshot: Snapshot, folder: Path, root: Path, tracker: Tracker) -> Record:
    """The folder's record, on disk, or a new one where a new MLflow run is due."""
    record = Record.load(folder)
    assert snapshot.marks.run is not None
    if record is None:
        record = _new_record(run_name_of(snapshot.run, root), snapshot)
        record.save(folder)
        return record
    restarted = record.started_ns != snapshot.marks.run[0]
    run_name = run_name_of(snapshot.run, root) if restarted else record.run_name
    other_result = False
    if record.state == DONE and snapshot.marks.done is not None and record.done_ns != snapshot.marks.done[0]:
        other_result = snapshot.digest != record.digest
        record.done_ns = snapshot.marks.done[0]
    elif not restarted:
        return record
    if run_name != record.run_name or other_result:
        if record.state == OPEN and record.run_id:
            tracker.end(record.run_id, KILLED, "its stage goes on in another run")
        record = _new_record(run_name, snapshot)
    elif record.run_id and (record.ended or other_result or restarted):
        for run_id in (record.run_id, record.parent_run_id) if record.state == OPEN else (record.parent_run_id,):
            tracker.reopen(run_id)
        record.ended = ""
    record.started_ns = snapshot.marks.run[0]
    record.save(folder)
    return record


def unfinished(root: Path) -> set[str]:
    """The names of the runs whose flow has begun and has not come to its end."""
    return set((read_json(root / UNFINISHED) or {}).get("runs", []))


@contextmanager
def flow_of(root: Path, run_name: str) -> Iterator[None]:
    """While a flow runs the stages of a run in `root`, whose lock it holds. A run that is cut short between two stages
    is known by what stays here: no stage of its was stopped."""
    write_json(root / UNFINISHED, {"runs": sorted({*unfinished(root), run_name})})
    yield
    write_json(root / UNFINISHED, {"runs": sorted(unfinished(root) - {run_name})})


def end_stopped(root: Path, tracker: Tracker) -> None:
    """Ends the runs of stages that ended without done.json, and the parent runs whose stages have all ended. Call it
    where no stage and no flow lives."""
    last: dict[str, dict[str, str]] = {}  # parent run: stage: how it ended last
    names, cut_short = dict[str, str](), unfinished(root)
    for folder in scratch_folders(root):
        run, record = read_run(folder), Record.load(folder)
        if run is None or record is None or not record.run_id:
            continue
        if record.state == OPEN and not record.ended:
            failure = read_json(folder / FAILED_NOTE)
            record.ended = KILLED if failure is None else FAILED
            tracker.end(record.run_id, record.ended, "its process was stopped or killed; the same command resumes it"
                        if failure is None else str(failure.get("message")))
            record.save(folder)
        last.setdefault(record.parent_run_id, {})[run["stage"]] = record.ended or FINISHED
        names[record.parent_run_id] = record.run_name
    for parent, ends in last.items():
        status = next((status for status in (FAILED, KILLED) if status in ends.values()), FINISHED)
        stopped = [stage for stage, end in ends.items() if end == status]
        if status == FINISHED and names[parent] in cut_short:
            tracker.end(parent, KILLED, "cancelled, stopped or killed between two stages")
            continue
        tracker.end(parent, status, "" if status == FINISHED else f"stage {', '.join(stopped)}: {status.lower()}")


def _send_rows(record: Record, snapshot: Snapshot, folder: Path, tracker: Tracker) -> None:
    """Sends the rows after `last_step`; see this module's first lines for the order of writes."""
    rows = snapshot.rows
    if record.open_upto is not None and rows:
        metric = next(iter(rows[0].values), None)
        known = tracker.last_step(record.run_id, metric) if metric else -1
        record.last_step = max(record.last_step, min(known, record.open_upto))
    while True:
        if record.open_upto is None:
            waiting = [row for row in rows if row.step > record.last_step]
            if not waiting:
                return
            batch = waiting[: max(1, POINTS_PER_CALL // max(1, *(len(row.values) for row in waiting)))]
            record.open_upto, record.open_ms = batch[-1].step, time.time_ns() // 1_000_000
            record.save(folder)
        else:
            batch = [row for row in rows if record.last_step < row.step <= record.open_upto]
        if batch:
            tracker.send(record, snapshot.run, batch, record.open_ms)
            record.last_step = batch[-1].step
        whole = record.last_step >= record.open_upto or snapshot.done is not None
        if whole:
            record.open_upto = None
        record.save(folder)
        if not whole:
            return  # the journal was cut back within the open batch; its rows come again


def journaled(rows: Sequence[Row], final: Mapping[str, float]) -> set[str]:
    """The metrics that need no final value: a curve of every step shows its own end. One of some steps (validation) may
    end with weights that are not the ones kept."""
    last = {name: value for row in rows for name, value in row.values.items()}
    return {name for name, value in last.items() if final.get(name) == value or all(name in row.values for row in rows)}


def _finish(record: Record, snapshot: Snapshot, folder: Path, tracker: Tracker) -> None:
    assert snapshot.done is not None
    assert snapshot.marks.done is not None
    if not record.end_ms:
        record.end_ms = snapshot.marks.done[0] // 1_000_000
        record.save(folder)
    tracker.finish(record, snapshot.run, snapshot.done, journaled(snapshot.rows, numbers(snapshot.done["metrics"])))
    record.state, record.done_ns, record.digest = DONE, snapshot.marks.done[0], snapshot.digest
    record.save(folder)


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested dictionary, keys joined by slashes; texts and lists are left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat
