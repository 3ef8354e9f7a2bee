"""Uploads the journals of scratch/ to MLflow, beside the training: `python -m mlops.tracking.uploader [--once]`.

A stage calls `ensure_uploader`, which costs it a fork and no import of MLflow. The uploader then follows every scratch
folder until no stage lives and nothing has changed for a while. `--once` sends what is pending and ends: for the
backlog of an outage. The files are the only link between the two, so a slow or absent server cannot touch a stage.

A checkout has one uploader: the holder of the flock of scratch/uploader.lock. The starter takes the lock and the
uploader inherits it, so there is no moment without an owner, and the kernel frees it however the uploader ends. A stage
holds scratch/stages.lock (shared) as long as it lives, so that an uploader stays through a long step without news. The
order that makes leaving safe: a stage writes run.json, takes stages.lock, then tests uploader.lock; an uploader frees
uploader.lock, then looks at stages.lock and the files once more. One of the two always sees the other.

How each point goes once: `mlops.tracking.upload_record`. The MLflow calls: `mlops.tracking.mlflow_client`.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mlops.tracking.locks import free_lock, hold_stages_lock, owns_lock, run_alive, stage_alive, take_lock, try_lock
from mlops.tracking.system_metrics import SystemWatch
from mlops.tracking.upload_record import (
    DONE,
    Marks,
    Record,
    Tracker,
    Unreachable,
    advance,
    end_stopped,
    file_marks,
    forget_lost_store,
    read_run,
    scratch_folders,
    unfinished,
)
from rlhf.errors import UserError, without_secrets

POLL_S = float(os.environ.get("INSTRUCTFLOW_UPLOADER_POLL_S", "1.5"))
IDLE_S = float(os.environ.get("INSTRUCTFLOW_UPLOADER_IDLE_S", "20"))
PATIENCE_S = float(os.environ.get("INSTRUCTFLOW_UPLOADER_PATIENCE_S", "3600"))  # with a server that does not answer
STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")  # of MLFLOW_TRACKING_URI
OLD_NAMES = {"INSTRUCTFLOW_MIRROR": "INSTRUCTFLOW_UPLOADER", "INSTRUCTFLOW_LINE": "INSTRUCTFLOW_RUN_NAME"}
LONGEST_BACKOFF_S = 30.0
LOG = "uploader.log"  # in scratch/
NICE = 10


# --- what stages and flows call -----------------------------------------------------------------------------------


def check_variables() -> None:
    """Raises UserError where a variable is set by the name that it had before, which would be ignored without a word,
    and where MLFLOW_TRACKING_URI can be no store of MLflow's."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else ""
    if scheme and scheme not in STORES:
        raise UserError(f"MLFLOW_TRACKING_URI = {uri}: MLflow has no store of that kind; it must begin with http://, "
                        "https://, sqlite:/// or another of its databases")
    if scheme == "sqlite" and "?" not in uri and not Path(uri.partition("///")[2]).parent.is_dir():
        raise UserError(f"MLFLOW_TRACKING_URI = {uri}: no such folder")
    for name in sorted(os.environ):
        for old, new in OLD_NAMES.items():
            if name == old or name.startswith(f"{old}_"):
                raise UserError(f"{name} is now called {new}{name.removeprefix(old)}: set that instead")


def ensure_uploader(root: Path) -> None:
    """Makes sure that one uploader follows `root`/scratch for as long as this process lives. Never raises OSError.

    Call it after run.json is written. INSTRUCTFLOW_UPLOADER=off turns it off. Raises UserError as `check_variables`.
    """
    check_variables()
    if _off():
        return
    try:
        root = root.resolve()
        (root / "scratch").mkdir(exist_ok=True)
        hold_stages_lock(root)
        start_uploader(root)
    except OSError as error:
        print(f"uploader: not started ({error}); `python -m mlops.tracking.uploader --once` sends the journals later",
              file=sys.stderr, flush=True)


def start_uploader(root: Path, environment: Mapping[str, str] | None = None) -> None:
    """Starts a detached uploader unless one is alive, with `environment` beside this process's own. It outlives this
    process and its session."""
    lock = take_lock(root)
    if lock is None:
        return
    code = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        with (root / "scratch" / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlops.tracking.uploader", "--lock", str(lock)], cwd=root, pass_fds=[lock],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **(environment or {}), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
    finally:
        os.close(lock)  # the child's copy keeps the lock
    process.returncode = 0  # it is nobody's child from now on: no warning that it still runs when we end


def end_run_cut_short(root: Path, environment: Mapping[str, str]) -> bool:
    """Starts an uploader in a folder whose run was killed together with its uploader, so that MLflow says so. False:
    there is no such run there, or somebody works there. Never raises OSError."""
    try:
        if _off() or not unfinished(root) or run_alive(root):
            return False
        start_uploader(root.resolve(), environment)
    except OSError:
        return False
    return True


def wait_until_uploaded(root: Path, run_name: str, timeout_s: float) -> dict[str, Any]:
    """Waits until every finished stage of the run is in MLflow; reads files only.

    Returns {"stages": {stage: run_id}, "parent_run_id": ..., "experiment_id": ...}; empty where there is nothing,
    at once with INSTRUCTFLOW_UPLOADER=off. Raises TimeoutError, which loses nothing: the uploader goes on.
    """
    root = root.resolve()
    now = start_next = time.monotonic()
    deadline = now + timeout_s
    while True:
        uploaded, pending = _state_of(root, run_name)
        if not pending or _off():
            return uploaded
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"not yet in MLflow after {timeout_s:g} s: {', '.join(pending)} of run {run_name}"
                               f"{_last_trouble(root)}")
        if now >= start_next:  # the one that lived may have been killed
            start_uploader(root)
            start_next = now + 5.0
        time.sleep(0.25)


def _state_of(root: Path, run_name: str) -> tuple[dict[str, Any], list[str]]:
    """What `wait_until_uploaded` returns, and the stages that are still to be sent."""
    uploaded: dict[str, Any] = {"stages": {}, "parent_run_id": "", "experiment_id": ""}
    pending = []
    for folder in scratch_folders(root):
        run, record, marks = read_run(folder), Record.load(folder), file_marks(folder)
        if run is None or marks.done is None or run_name not in (
                run["run_name"], record and record.run_name):
            continue
        if record is None or record.state != DONE or record.done_ns != marks.done[0]:
            pending.append(run["stage"])
            continue
        uploaded["stages"][run["stage"]] = record.run_id
        uploaded |= {"parent_run_id": record.parent_run_id, "experiment_id": record.experiment_id}
    return uploaded, pending


def _last_trouble(root: Path) -> str:
    """What the uploader's log says of MLflow at its end, if anything."""
    try:
        last = (root / "scratch" / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-1]
    except (OSError, IndexError):
        return ""
    return f" ({last.partition('trying on: ')[2]})" if "trying on: " in last else ""


def _off() -> bool:
    return os.environ.get("INSTRUCTFLOW_UPLOADER", "") == "off"


# --- the uploader ---------------------------------------------------------------------------------------------------


class Follower:
    """Sends what is new in the scratch folders. `sweep()` goes through them once, in the order they were started."""

    def __init__(self, root: Path, tracker: Tracker) -> None:
        self.root, self.tracker = root, tracker
        self.seen: dict[Path, Marks] = {}  # the files as they were when their folder had nothing left to send
        self.refused: dict[Path, str] = {}
        self.compared = False

    def end_stopped(self) -> bool:
        """Ends what nobody works on any more. False: MLflow did not answer, try again; if not, the next uploader
        will."""
        if run_alive(self.root):
            return True
        try:
            end_stopped(self.root, self.tracker)
        except (Unreachable, OSError):
            return False
        except Exception as error:
            say(f"what has stopped is not marked so in MLflow: {_one_line(error)}")
        return True

    def sweep(self) -> bool:
        """True if nothing is left to send. Raises Unreachable or OSError: call again later.

        What the server refuses, or cannot be read, is logged and left until its files change or another uploader
        starts; the other folders go on.
        """
        settled = True
        if not self.compared:
            if lost := forget_lost_store(self.root, self.tracker):
                say(f"MLflow has none of the {lost} stage runs that it once had: they are sent again")
            self.compared = True
        for folder in scratch_folders(self.root):
            marks = file_marks(folder)
            if self.seen.get(folder) == marks:
                continue
            try:
                if not advance(folder, self.root, self.tracker):
                    settled = False
                    continue
                self.refused.pop(folder, None)
            except (Unreachable, OSError):
                raise
            except Exception as error:  # Refused, or files that are not what they should be
                reason = f"{folder.relative_to(self.root)}: {type(error).__name__}: {_one_line(error)}"
                if self.refused.get(folder) != reason:
                    say(reason)
                self.refused[folder] = reason
            self.seen[folder] = marks
        return settled


def all_marks(root: Path) -> dict[Path, Marks]:
    """The state of every scratch folder's files, to see whether anything changed."""
    return {folder: file_marks(folder) for folder in scratch_folders(root)}


def follow(root: Path, lock: int, follower: Follower, watch: Callable[[], None]) -> None:
    """Sends what is new until no stage lives and nothing changes any more; `watch` is called in between."""
    marks: dict[Path, Marks] = {}
    news, delay, trouble = time.monotonic(), POLL_S, False
    while owns_lock(root, lock):
        before, marks = marks, all_marks(root)
        alive = stage_alive(root)
        if marks != before or run_alive(root):
            news = time.monotonic()
        try:
            settled = follower.sweep()
            if trouble:
                say("MLflow answers again")
            delay, trouble = POLL_S, False
            if alive:
                watch()
        except (Unreachable, OSError) as error:
            settled, delay = False, min(2 * delay, LONGEST_BACKOFF_S)
            if not trouble:
                say(f"MLflow can't be reached; trying on: {_one_line(error)}")
            trouble = True
        long_quiet = time.monotonic() - news > (IDLE_S if settled else PATIENCE_S)
        if long_quiet and settled and not follower.end_stopped() and time.monotonic() - news < PATIENCE_S:
            long_quiet, delay = False, min(2 * delay, LONGEST_BACKOFF_S)
        if long_quiet and _leave(root, lock, marks):
            if not settled:
                say("not everything is sent; the next stage's uploader or `python -m mlops.tracking.uploader --once` "
                    "goes on")
            return
        time.sleep(delay)


def _leave(root: Path, lock: int, marks: dict[Path, Marks]) -> bool:
    """Frees the lock and looks once more; False if there is work after all, with the lock held again."""
    free_lock(lock)
    if all_marks(root) == marks and not run_alive(root):
        return True
    return not try_lock(lock)


def send_once(follower: Follower) -> None:
    """Sends everything that is pending. Exits with code 1 and one line if that is not possible."""
    try:
        while not follower.sweep():
            time.sleep(0.1)
    except (Unreachable, OSError) as error:
        fail(f"MLflow can't be reached, nothing is lost: {_one_line(error)}")
    if not follower.end_stopped():
        say("what has stopped is not marked so in MLflow, which does not answer any more")
    if follower.refused:
        raise SystemExit(1)
    print(f"uploader: nothing is pending in {len(follower.seen)} stage runs", flush=True)


def say(message: str) -> None:
    """One line of the log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} uploader {os.getpid()}: {without_secrets(message)}", flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"uploader: {without_secrets(message)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.tracking.uploader",
                                     description="Uploads the journals to MLflow.")
    parser.add_argument("--once", action="store_true", help="send what is pending, then end")
    parser.add_argument("--lock", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        check_variables()
    except UserError as error:
        fail(str(error), 2)
    root = Path.cwd()
    (root / "scratch").mkdir(exist_ok=True)
    lock = args.lock if args.lock is not None else take_lock(root)
    if lock is None:
        print("uploader: another uploader is alive and sends what is pending; see scratch/uploader.log", flush=True)
        return
    os.set_inheritable(lock, False)
    if args.lock is not None:
        os.nice(NICE)
    try:
        from mlops.tracking.mlflow_client import MlflowTracker
    except ImportError as error:
        fail(f"MLflow can't be imported: {error}")
    tracker = MlflowTracker(root)
    follower = Follower(root, tracker)
    if args.once:
        send_once(follower)
        return
    say("follows scratch/")
    follow(root, lock, follower, SystemWatch(root, tracker).look)
    say("ends")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
