"""Progress of a long loop: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 5.0


class StageProgress:
    """`with StageProgress("ppo", total=60, unit="iterations") as progress: progress.step({"kl": 1.9})`."""

    def __init__(self, name: str, total: int, unit: str = "steps", done: int = 0) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._first = done
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
                                 TextColumn("{task.fields[values]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=done, rate="", values="")

    def __enter__(self) -> "StageProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, values: Mapping[str, float], advance: int = 1) -> None:
        """Counts finished units and shows the newest values."""
        self.done += advance
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._bar:
            self._bar.update(self._task, completed=self.done, rate=f"{rate:.2f} {self.unit}/s", values=shown)
        elif now - self._last_line >= LOG_SECONDS or self.done == self.total:
            self._last_line = now
            left = (self.total - self.done) / max(rate, 1e-9)
            print(f"{self.name}  {self.done}/{self.total} {self.unit}  {rate:.2f}/s  {left:.0f} s left  {shown}",
                  file=sys.stderr, flush=True)
