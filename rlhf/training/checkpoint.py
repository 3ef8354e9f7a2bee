"""Checkpoints of everything a trainer needs to go on as if it had never stopped.

A checkpoint is `step-<n>.pt` plus `step-<n>.json` (its SHA-256), the second written last: without it the first
does not count. Both are written to a temporary name, fsynced and renamed.
"""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlhf.errors import Interrupted
from rlhf.files import write_atomic, write_json, writes
from rlhf.settings import number
from rlhf.training import distributed

log = logging.getLogger(__name__)


class StopSignal:
    """Remembers SIGTERM (a pre-empted machine, a cancelled flow), so that a trainer can save before it ends."""

    requested = False

    @classmethod
    def listen(cls) -> None:
        """From now on SIGTERM sets `requested` instead of ending the process."""
        signal.signal(signal.SIGTERM, cls._handle)

    @classmethod
    def _handle(cls, number: int, frame: FrameType | None) -> None:
        cls.requested = True


class Checkpoints:
    """The newest `keep` checkpoints in one folder, one every `seconds`.

    They change no result, so they are no parameters: the environment may set INSTRUCTFLOW_CHECKPOINT_SECONDS (30) and
    INSTRUCTFLOW_CHECKPOINTS_KEPT (2). Raises UserError where that is no number.
    """

    def __init__(self, folder: Path, keep: int | None = None, seconds: float | None = None) -> None:
        self.folder = folder
        self.keep = int(number("INSTRUCTFLOW_CHECKPOINTS_KEPT", 2, 1)) if keep is None else keep
        self.seconds = number("INSTRUCTFLOW_CHECKPOINT_SECONDS", 30.0, 0) if seconds is None else seconds
        self._saved_at = time.monotonic()
        StopSignal.listen()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state (tensors, numbers, strings, lists, dicts) after `step` finished steps."""
        if not writes():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        content = partial.read_bytes()
        partial.unlink()
        write_atomic(path, content)
        write_json(path.with_suffix(".json"), {"sha256": hashlib.sha256(content).hexdigest(), "step": step})
        for old in self._complete()[: -self.keep]:
            old.with_suffix(".json").unlink()
            old.unlink()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint as (step, state); damaged ones are reported and passed over.

        Several processes read the same one, from a folder that all of them see.
        """
        if distributed.is_main():
            found = self._newest()
            distributed.broadcast(None if found is None else found[0])
            return found
        step = distributed.broadcast(-1)
        if step is None:
            return None
        return step, torch.load(self.folder / f"step-{step:08d}.pt", map_location="cpu", weights_only=True)

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        for path in reversed(self._complete()):
            try:
                record = json.loads(path.with_suffix(".json").read_text())
                if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
                    raise ValueError("its bytes are not those that were saved")
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError) as error:
                log.warning("checkpoint %s is damaged and not used: %s", path, error)
                path.with_suffix(".json").unlink(missing_ok=True)  # no longer one of the newest `keep`
                continue
            return int(record["step"]), state
        return None

    def after_step(self, step: int, state_of: Callable[[], dict[str, Any]]) -> None:
        """Saves when it is time. Saves and raises Interrupted when a SIGTERM has come, to one of several processes."""
        due = time.monotonic() - self._saved_at >= self.seconds and writes()
        asked = distributed.all_reduce({"stop": float(StopSignal.requested), "save": float(due)})
        if asked["stop"] or asked["save"]:
            self.save(step, state_of())
            self._saved_at = time.monotonic()
        if asked["stop"]:
            raise Interrupted(f"stopped by SIGTERM after step {step}; run the same command to go on from there")

    def steps(self) -> list[int]:
        """The steps after which there are checkpoints, whole ones as far as their names tell."""
        return [int(path.stem.removeprefix("step-")) for path in self._complete()]

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.pt") if path.with_suffix(".json").exists())
