"""Whether files are what dvc.lock and data.dvc record. DVC restores outputs from its cache without reading them, so a
byte that has rotted there would become the next stage's model.

    python -m mlops.config.record        # checks every recorded output that is there; exit code 2 where one is damaged
"""

import configparser
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf.errors import UserError, one_line

Recorded = dict[str, str]  # path of an output: its MD5, that of the listing (".dir") for a folder


def recorded(root: Path) -> Recorded:
    """All outputs that dvc.lock and data.dvc record. Raises UserError where one of them is unreadable."""
    outs: list[dict[str, Any]] = []
    for name in ("dvc.lock", "data.dvc"):
        if not (root / name).is_file():
            continue
        try:
            content = yaml.safe_load((root / name).read_text(encoding="utf-8"))
            outs += [out for stage in content.get("stages", {}).values() for out in stage.get("outs", [])]
            outs += content.get("outs", [])
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise UserError(f"{root / name}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    return {str(out["path"]): str(out["md5"]) for out in outs if out.get("hash") == "md5" and out.get("md5")}


def check(root: Path, paths: Iterable[str]) -> None:
    """Raises UserError for the first file of `paths` (files or folders of the checkout) that is not as recorded; what
    no stage has made is not checked."""
    known = recorded(root)
    for path in paths:
        for out in sorted(known):
            inside = PurePosixPath(path).is_relative_to(out)
            if (inside or PurePosixPath(out).is_relative_to(path)) and (root / out).exists():
                for file in damaged(root, out, known[out], only=path if inside else out):
                    where = "data.dvc" if out == "data" else "dvc.lock"
                    raise UserError(f"{file}: its bytes are not those that {where} records: "
                                    f"{_advice(root, file, out, known[out])}")


def _advice(root: Path, file: str, out: str, md5: str) -> str:
    """Whose fault it is and what to do: the cache's copy is damaged, lost, or sound, and the file was changed."""
    own = (_listing(root, md5) or {}).get(PurePosixPath(file).relative_to(out).as_posix(), md5) if file != out else md5
    cached = _object(root, own)
    name = str(cached.relative_to(root)) if cached.is_relative_to(root) else str(cached)
    if not cached.is_file():
        return f"it was changed, and DVC's cache lacks {name}. Remove {out}, then run `dvc repro`"
    if f"{_md5(cached)}{'.dir' if own.endswith('.dir') else ''}" == own:
        return f"it was changed after its stage ended. `dvc checkout --force {out}` restores it, `dvc commit` keeps it"
    return f"DVC's cache is damaged. Remove {out} and {name}, then run the same command again"


def damaged(root: Path, out: str, md5: str, only: str) -> Iterator[str]:
    """The files of an output, those in `only`, whose content is not the recorded one; a folder whose listing is not in
    the cache is checked as a whole."""
    target = root / out
    if not md5.endswith(".dir"):
        if _md5(target) != md5:
            yield out
        return
    listing = _listing(root, md5)
    files = {path.relative_to(target).as_posix(): path for path in sorted(target.rglob("*")) if path.is_file()}
    if listing is None:
        own = [{"md5": _md5(path), "relpath": name} for name, path in sorted(files.items())]
        if hashlib.md5(json.dumps(own, sort_keys=True).encode()).hexdigest() + ".dir" != md5:
            yield out
        return
    for name, wanted in sorted(listing.items()):
        file = f"{out}/{name}"
        if PurePosixPath(file).is_relative_to(only) and (name not in files or _md5(files[name]) != wanted):
            yield file


def _md5(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "md5").hexdigest()


def _object(root: Path, md5: str) -> Path:
    """Where DVC's cache has the content with this hash."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    folder = root / ".dvc" / config.get("cache", "dir", fallback="cache")
    return folder / "files" / "md5" / md5[:2] / md5[2:]


def _listing(root: Path, md5: str) -> dict[str, str] | None:
    """Name in the folder: MD5; None where the cache lacks the listing or it is damaged itself."""
    path = _object(root, md5)
    if not path.is_file() or f"{_md5(path)}.dir" != md5:
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_text(encoding="utf-8"))}


def main() -> None:
    root = Path.cwd()
    with one_line("record"):
        known = recorded(root)
        check(root, known)
    print(f"record: {sum((root / out).exists() for out in known)} outputs are as recorded")


if __name__ == "__main__":
    main()
