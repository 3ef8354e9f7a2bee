"""Progress of a long loop: a progress bar on a terminal, a line of text every few seconds in a log."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

from rlhf.files import is_writer

LOG_SECONDS = 5.0


class StageProgress:
    """`with StageProgress("ppo", total=60, unit="iterations") as progress: progress.step({"kl": 1.9})`.

    `total` 0: unknown; the remaining time is then not shown.
    """

    def __init__(self, name: str, total: int, unit: str = "steps", done: int = 0) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._first = done
        self._start = self._last_line = time.monotonic()
        shown = sys.stderr.isatty() and is_writer()
        self._bar = tqdm(total=total or None, initial=done, desc=name, unit=unit) if shown else None

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, values: Mapping[str, float] | None = None, advance: int = 1) -> None:
        """Counts `advance` finished units and shows the newest values."""
        self.done += advance
        shown = "  ".join(f"{key} {value:.4g}" for key, value in (values or {}).items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(advance)
            return
        now = time.monotonic()
        if not is_writer():
            return
        if now - self._last_line >= LOG_SECONDS or self.done == self.total:
            self._last_line = now
            rate = (self.done - self._first) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            of = f"/{self.total} {self.unit}  {rate:.2f}/s  {left:.0f} s left" if self.total else \
                f" {self.unit}  {rate:.2f}/s"
            print(f"{self.name}  {self.done}{of}  {shown}", file=sys.stderr, flush=True)
