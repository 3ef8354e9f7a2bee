"""dvc.lock and data.dvc over a kill: DVC writes them in place, and leaves them empty or cut where it is killed then.

Before each stage they are kept as they are; a run that finds one that is not whole goes on with what was kept. That
lacks at most the stage that was just recorded, which then runs again from its checkpoint, or comes from DVC's cache. A
cut of dvc.lock that DVC takes, between two of its entries, stays: DVC runs again what is no longer recorded whole.
"""

import logging
from pathlib import Path

import yaml

from rlhf.errors import UserError
from rlhf.files import write_atomic

FILES = ("dvc.lock", "data.dvc")
KEPT = Path(".dvc") / "tmp" / "kept"

log = logging.getLogger(__name__)


def whole(name: str, text: str, filled: bool = True) -> bool:
    """Whether DVC takes this as one of the two files; where it is `filled` dvc.lock has stages, and data.dvc the hash
    of its output, which new ones have not."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA, COMPILED_SINGLE_STAGE_SCHEMA
    from voluptuous import Invalid

    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (COMPILED_LOCKFILE_SCHEMA if name == "dvc.lock" else COMPILED_SINGLE_STAGE_SCHEMA)(content)
        if not filled:
            return True
        has_all = (bool(content["stages"]) if name == "dvc.lock" else
                   all("md5" in out and "size" in out for out in content["outs"]))
        return has_all and text.endswith("\n")
    except (yaml.YAMLError, Invalid, ValueError, TypeError, KeyError, AttributeError):
        return False


def keep(root: Path) -> None:
    """Keeps the two files as they are now, unless they are no longer whole."""
    for name in FILES:
        path = root / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        kept = root / KEPT / name
        if text and (not kept.is_file() or kept.read_text(encoding="utf-8") != text) and whole(name, text):
            write_atomic(kept, text.encode())


def mend(root: Path) -> None:
    """Puts back what was kept of a file that is not whole, and says so. Raises UserError where nothing was."""
    for name in FILES:
        path, kept = root / name, root / KEPT / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        if text is None or whole(name, text, filled=kept.is_file()):
            continue
        if not kept.is_file():
            raise UserError(f"{path}: is cut off or damaged; get it back with `git checkout {name}`")
        write_atomic(path, kept.read_bytes())
        log.warning("%s was cut off by a kill; it is again as it was before the last stage, which may run again", path)
