"""The versions of the libraries that decide a model's bytes, recorded beside every model that a stage makes."""

import json
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "tokenizers")
RECORD = "versions.json"  # in a model's folder


def installed() -> dict[str, str]:
    """Library: installed version."""
    return {library: version(library) for library in LIBRARIES}


def other_versions(folder: Path) -> list[str]:
    """How the versions that made the model in `folder` differ from those installed, one text each; none where the
    folder says nothing."""
    if not (folder / RECORD).is_file():
        return []
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        return [f"unknown versions ({RECORD} is damaged)"]
    return [f"{library} {recorded[library]} (installed: {ours})" for library, ours in installed().items()
            if recorded.get(library, ours) != ours]
