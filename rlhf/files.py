"""Writes files so that no reader and no later run sees a partial one."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_is_writer = True


def leave_writing_to_main() -> None:
    """Turns off writing in this process, for good: of several that train together only the main one writes."""
    global _is_writer
    _is_writer = False


def is_writer() -> bool:
    """Whether this process writes files and logs progress."""
    return _is_writer


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable: a rename is atomic, but survives a power failure only after fsync."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary file next to `path`, fsyncs and renames it.

    Of several processes only the main one does.
    """
    if not _is_writer:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would take the last bytes
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes sorted, indented JSON with a final newline, so that equal content gives equal bytes."""
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with equal keys as CSV with a header; numbers as `str` gives them."""
    lines = [",".join(rows[0])] if rows else []
    lines += [",".join(str(value) for value in row.values()) for row in rows]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def publish(source: Path, target: Path) -> None:
    """Replaces `target` with a finished file or folder; the old `target` stays until the copy is complete.

    Of several processes only the main one does.
    """
    if not _is_writer:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    try:
        if source.is_dir():
            shutil.copytree(source, partial)
        else:
            shutil.copyfile(source, partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        raise
    if partial.is_dir() and target.exists():
        shutil.rmtree(target)
    partial.replace(target)


def hash_paths(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 of the names (relative to `root`) and contents of files and folders, in sorted order."""
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text (`object_pairs_hook`). Raises ValueError for a key that stands twice in it."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has a key twice: {next(key for key in found if keys.count(key) > 1)}")
    return found
