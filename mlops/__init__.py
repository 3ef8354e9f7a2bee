"""What serves the stages: configuration, validation, tracking, reports, release, labeling, tools."""

import atexit
import gc
import os
from pathlib import Path

# Before torch and transformers are imported: no telemetry, no bars and retries of theirs between our lines, and
# threads that spin only briefly, so that a stage shares its cores with the tracker instead of fighting it (with one
# core taken by another process a training step takes 2.1 times as long instead of 3 to 6 times).
for _name, _value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                      "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_VERBOSITY": "error", "DO_NOT_TRACK": "1",
                      "TOKENIZERS_PARALLELISM": "true",
                      "GOMP_SPINCOUNT": "2000", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}.items():
    os.environ.setdefault(_name, _value)

# Imports make half a million objects, and all of them stay. Looking for garbage among them again and again, and once
# more when the process ends, takes over a third of the seconds that a process needs to start and to end.
IMPORTED_OBJECTS = 1_000_000
_usual = gc.get_threshold()


def imports_done(*_: object) -> None:
    """Collects garbage as usual from here on, but never among what is there by now.

    What trains calls it when its work begins; without that it happens by itself at the first collection, which comes
    after `IMPORTED_OBJECTS`.
    """
    if imports_done in gc.callbacks:
        gc.callbacks.remove(imports_done)
        gc.freeze()
        gc.set_threshold(*_usual)


gc.callbacks.append(imports_done)
gc.set_threshold(IMPORTED_OBJECTS)
atexit.register(gc.freeze)


def program(module: str) -> str:
    """How a user has called a module: by `instructflow COMMAND` or by `python -m module`; for its help."""
    return os.environ.get("INSTRUCTFLOW_COMMAND") or f"python -m {module}"


def from_caller(path: Path) -> Path:
    """A path as the user meant it: relative to the folder that `instructflow` was called in."""
    return Path(os.environ.get("INSTRUCTFLOW_FROM", "")) / path
