"""Writing files so that a reader, or the next run, never sees half of one."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_hands_off = False


def hands_off() -> None:
    """From now on this process writes nothing: another one does, which does the same work (rlhf/training/distributed.py)."""
    global _hands_off
    _hands_off = True


def writes() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return not _hands_off


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable (rename is atomic, but only fsync makes it survive a power cut)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary name beside `path`, fsyncs and renames.

    Only the first process of several does.
    """
    if _hands_off:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Sorted, indented JSON with a final newline, so that equal content is equal bytes."""
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV with a header; numbers as Python writes them."""
    lines = [",".join(rows[0])] if rows else []
    lines += [",".join(str(value) for value in row.values()) for row in rows]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def publish(source: Path, target: Path) -> None:
    """Puts a finished file or folder in the place of `target`, which stays whole until the copy is complete.

    Only the first process of several does.
    """
    if _hands_off:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    if source.is_dir():
        shutil.copytree(source, partial)
        if target.exists():
            shutil.rmtree(target)
    else:
        shutil.copyfile(source, partial)
    partial.replace(target)


def hash_paths(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to `root`) and contents of files and folders, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
        for file in files:
            if "__pycache__" in file.parts:
                continue
            with file.open("rb") as handle:
                digest.update(str(file.relative_to(root)).encode() + b"\0")
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
