"""Checkpoints hold everything that a trainer needs to resume as if it had never stopped.

A checkpoint is the folder `step-<n>` (rlhf/training/parts.py) plus `step-<n>.json` with the SHA-256 of each of its
files. The JSON is written last; without it the checkpoint is ignored. The folder is written under a temporary name,
fsynced and renamed, in the background: the training waits only for the copy of its state into memory.
"""

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from rlhf.errors import Interrupted
from rlhf.files import sync_folder, write_json
from rlhf.training import distributed, parts
from rlhf.training.parts import Saved
from rlhf.training.settings import number
from rlhf.training.state import State, Tensors

Result = TypeVar("Result")
log = logging.getLogger(__name__)

SHARE = 0.02  # of the time that saves may cost


class StopSignal:
    """Records SIGTERM (a preempted machine, a cancelled flow), so that a trainer can save before it ends."""

    requested = False

    @classmethod
    def listen(cls) -> None:
        """Makes SIGTERM set `requested` instead of ending the process."""
        signal.signal(signal.SIGTERM, cls._handle)

    @classmethod
    def _handle(cls, number: int, frame: FrameType | None) -> None:
        cls.requested = True


def interval(least: float, cost: float) -> float:
    """Seconds until the next save is due, after one that cost the training `cost` seconds: `least`, or as many as make
    the cost `SHARE` of the time. `least` 0: a save at every step, whatever it costs."""
    return max(least, cost / SHARE) if least else 0.0


class Background:
    """One function at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.cpu_seconds = 0.0  # processor time of the last function

    def start(self, function: Callable[[], None]) -> None:
        def run() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error
            self.cpu_seconds = time.thread_time()

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Returns when the function has ended; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error


class Checkpoints:
    """Saves a checkpoint every `seconds`, less often where that costs much, and keeps the newest `keep` in one folder.

    The defaults come from the environment: INSTRUCTFLOW_CHECKPOINT_SECONDS (30) and INSTRUCTFLOW_CHECKPOINTS_KEPT (2).
    Raises UserError if one is not a number. The one that is being written counts among those kept: with 2, no more lie
    on the disk at any time; with 1, they are 2 while one is written. All processes call the same methods in the same
    order, and share the folder. As a context manager it ends when nothing is being written any more.
    """

    def __init__(self, folder: Path, keep: int | None = None, seconds: float | None = None) -> None:
        self.folder = folder
        self.keep = int(number("INSTRUCTFLOW_CHECKPOINTS_KEPT", 2, 1)) if keep is None else keep
        self.seconds = number("INSTRUCTFLOW_CHECKPOINT_SECONDS", 30.0, 0) if seconds is None else seconds
        self._saved_at = time.monotonic()
        self._waited = 0.0  # seconds that the training waited for the last save
        self._writing = Background()
        self._group: Any = None
        StopSignal.listen()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as second:  # what ended the training is what its caller must hear of
            if not distributed.peer_gone(second):
                log.warning("a checkpoint could not be written: %s", second)

    def save(self, step: int, state: State) -> None:
        """Copies the state after `step` completed steps and writes it in the background. Waits for the save before it,
        and raises what went wrong with that. A complete checkpoint of the step stays as it is."""
        self.wait()
        if distributed.broadcast(step in self.steps()):
            return
        tensors, values = state.copied()
        if self._group is None:
            self._group = parts.own_group()
        self._writing.start(partial(self._write, step, tensors, values, self._group))

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what went wrong (OSError), in all processes alike."""
        self._writing.wait()

    def latest(self) -> Saved | None:
        """The newest intact checkpoint; damaged ones are logged and passed over, in all processes alike."""
        self.wait()
        if distributed.is_main():
            self._tidy()
        for step in reversed(distributed.broadcast(self.steps())):
            # First all files are checked, each by one process; only then are their contents looked at.
            _, problem = _tried(partial(self._check, step))
            if not problem:
                saved, problem = _tried(partial(Saved, step, self._folder(step)))
            if not problem:
                return saved
            if distributed.is_main():
                log.warning("checkpoint %s is damaged and is passed over: %s", self._folder(step), problem)
                self._record(step).unlink(missing_ok=True)  # no longer counts as one of the newest `keep`
            distributed.barrier()
        return None

    def after_step(self, step: int, state_of: Callable[[], State]) -> None:
        """Saves when the main process finds that a checkpoint is due. When any process received SIGTERM, saves, waits
        until all is written, and raises Interrupted."""
        cost = self._waited + (0.0 if torch.cuda.is_available() else self._writing.cpu_seconds)
        past = time.monotonic() - self._saved_at
        due = past >= interval(self.seconds, cost) and not (self.seconds and self._writing.busy())
        requests = distributed.any_of({"stop": StopSignal.requested, "failed": self._writing.failed(),
                                       "save": due and distributed.is_main()})
        if requests["failed"]:
            self.wait()
        if requests["stop"] or requests["save"]:
            begun = time.monotonic()
            self.save(step, state_of())
            self._saved_at = time.monotonic()
            self._waited = self._saved_at - begun
        if requests["stop"]:
            self.wait()
            raise Interrupted(f"stopped by SIGTERM after step {step}; run the same command to resume")

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints; their contents are not verified."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.json")
                      if path.with_suffix("").is_dir())

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _record(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"

    def _check(self, step: int) -> None:
        files = json.loads(self._record(step).read_text())["sha256"]
        parts.check(self._folder(step), files, distributed.share(sorted(files)))

    def _write(self, step: int, tensors: Tensors, values: bytes, group: Any) -> None:
        """Runs in the background, in all processes."""
        unfinished = self._folder(step).with_suffix(".partial")
        files: dict[str, str] = {}

        def begin() -> None:
            if distributed.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_but(max(1, self.keep - 1))
                self._tidy()
                unfinished.mkdir()

        def complete() -> None:
            if distributed.is_main():
                sync_folder(unfinished)
                unfinished.replace(self._folder(step))
                sync_folder(self.folder)
                write_json(self._record(step), {"sha256": files, "step": step})
                self._remove_but(self.keep)

        try:
            parts.together(begin, group)
            files.update(parts.write(unfinished, tensors, values, group))
            parts.together(complete, group)
        except BaseException:
            if distributed.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk it would take the last bytes
            raise

    def _remove_but(self, count: int) -> None:
        for step in self.steps()[:-count]:
            self._record(step).unlink()
            shutil.rmtree(self._folder(step))

    def _tidy(self) -> None:
        """Removes what is no complete checkpoint: leftovers of killed saves, files of earlier versions."""
        complete = {path.name for step in self.steps() for path in (self._folder(step), self._record(step))}
        for path in self.folder.glob("step-*"):
            if path.name not in complete and path.is_dir():
                shutil.rmtree(path)
            elif path.name not in complete:
                path.unlink()


def _tried(look: Callable[[], Result]) -> tuple[Result | None, str]:
    """(what `look` returns, what is wrong with a checkpoint). The latter is the same in all processes, and empty where
    none of them found anything."""
    found, problem = None, ""
    try:
        found = look()
    except Exception as error:  # whatever json, pickle or torch raise: the checkpoint before it is tried
        problem = f"{type(error).__name__}: {error}"
    return found, next(filter(None, distributed.all_gather(problem)), "")
