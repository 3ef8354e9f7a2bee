"""What the flow shows while it runs: on a terminal a progress bar below the log lines, elsewhere plain lines.

The bar is drawn here from the stage's own plain lines, so a log, the Prefect UI and the bar show the same figures,
and no stage needs a terminal of its own.
"""

import logging
import re
import sys

import flows.environment  # noqa: F401

# isort: split
from prefect.logging.handlers import PrefectConsoleHandler
from tqdm import tqdm

# What rlhf.training.progress prints.
PROGRESS = re.compile(r"(?P<name>\S.*?)  (?P<done>\d+)/(?P<total>\d+) (?P<unit>\S+)  (?P<rest>.*)")
FORMAT = "{desc:<9}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}"


class BarHandler(PrefectConsoleHandler):
    """Turns progress lines into a bar and prints everything else above it."""

    _bar: "tqdm[None] | None" = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if progress := PROGRESS.fullmatch(message):
            self._show(progress)
            return
        if message.startswith("Finished in state"):
            self._close()
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def _show(self, progress: re.Match[str]) -> None:
        name, total = progress["name"], int(progress["total"])
        if self._bar is None or (self._bar.desc, self._bar.total) != (name, total):
            self._close()
            self._bar = tqdm(total=total, unit=progress["unit"], bar_format=FORMAT, file=self.stream, mininterval=0)
            self._bar.set_description_str(name, refresh=False)
        self._bar.n = int(progress["done"])
        self._bar.set_postfix_str(progress["rest"].strip())

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def show_bars() -> None:
    """Puts `BarHandler` in the place of Prefect's console handler, if stderr is a terminal."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PrefectConsoleHandler) and sys.stderr.isatty():
            bars = BarHandler(stream=handler.stream)
            bars.console = handler.console
            bars.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(bars)


class Tidy(logging.Filter):
    """Leaves out what would hide a stage's own error line.

    Prefect asks for a traceback where a task returned its failure and none exists ("NoneType: None"), and says
    that it stops its temporary server after our last line.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is None:
            record.exc_info = None
        return not str(record.msg).startswith("Stopping temporary server")


for logger_name in ("prefect", "prefect.task_runs"):
    logging.getLogger(logger_name).addFilter(Tidy())
