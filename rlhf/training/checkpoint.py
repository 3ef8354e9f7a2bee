"""Checkpoints hold everything that a trainer needs to resume as if it had never stopped.

A checkpoint is `step-<n>.pt` plus `step-<n>.json` with its SHA-256. The JSON is written last; without it the checkpoint
is ignored. Both are written to a temporary file, fsynced and renamed.
"""

import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlhf.errors import Interrupted
from rlhf.files import is_writer, sync_folder, write_json
from rlhf.training import distributed
from rlhf.training.settings import number

log = logging.getLogger(__name__)


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


class Checkpoints:
    """Saves a checkpoint every `seconds` and keeps the newest `keep` in one folder.

    The defaults come from the environment: INSTRUCTFLOW_CHECKPOINT_SECONDS (30) and INSTRUCTFLOW_CHECKPOINTS_KEPT (2).
    Raises UserError if one is not a number.
    """

    def __init__(self, folder: Path, keep: int | None = None, seconds: float | None = None) -> None:
        self.folder = folder
        self.keep = int(number("INSTRUCTFLOW_CHECKPOINTS_KEPT", 2, 1)) if keep is None else keep
        self.seconds = number("INSTRUCTFLOW_CHECKPOINT_SECONDS", 30.0, 0) if seconds is None else seconds
        self._saved_at = time.monotonic()
        StopSignal.listen()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state (tensors, numbers, strings, lists, dicts) after `step` completed steps."""
        if not is_writer():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        for stale in self.folder.glob("*.partial"):  # of a process that was killed, or whose disk was full
            stale.unlink()
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as handle:
                torch.save(state, handle)
                handle.flush()
                os.fsync(handle.fileno())
            digest = _sha256(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        write_json(path.with_suffix(".json"), {"sha256": digest, "step": step})
        for old in self._complete()[: -self.keep]:
            old.with_suffix(".json").unlink()
            old.unlink()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest intact checkpoint as (step, state); damaged ones are logged and skipped.

        All processes read the same checkpoint, so they must share the folder.
        """
        if distributed.is_main():
            checkpoint = self._newest()
            distributed.broadcast(None if checkpoint is None else checkpoint[0])
            return checkpoint
        step = distributed.broadcast(-1)
        if step is None:
            return None
        return step, torch.load(self.folder / f"step-{step:08d}.pt", map_location="cpu", weights_only=True)

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        for path in reversed(self._complete()):
            try:
                record = json.loads(path.with_suffix(".json").read_text())
                if _sha256(path) != record["sha256"]:
                    raise ValueError("its SHA-256 is not the one that was saved")
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever zip, pickle or torch raise: the one before it is tried
                log.warning("checkpoint %s is damaged and is skipped: %s", path, error)
                path.with_suffix(".json").unlink(missing_ok=True)  # no longer counts as one of the newest `keep`
                continue
            return int(record["step"]), state
        return None

    def after_step(self, step: int, state_of: Callable[[], dict[str, Any]]) -> None:
        """Saves when a checkpoint is due. When any process received SIGTERM, saves and raises Interrupted."""
        due = time.monotonic() - self._saved_at >= self.seconds and is_writer()
        requests = distributed.all_reduce({"stop": float(StopSignal.requested), "save": float(due)})
        if requests["stop"] or requests["save"]:
            self.save(step, state_of())
            self._saved_at = time.monotonic()
        if requests["stop"]:
            raise Interrupted(f"stopped by SIGTERM after step {step}; run the same command to resume")

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints; their contents are not verified."""
        return [int(path.stem.removeprefix("step-")) for path in self._complete()]

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.pt") if path.with_suffix(".json").exists())


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
