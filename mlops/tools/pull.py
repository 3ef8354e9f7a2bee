"""Pulls data and models from DVC's remote, all or nothing: with a missing or damaged file, nothing is changed.

    python -m mlops.tools.pull [TARGET ...]      data.dvc, models/policies/ppo, ...; default: everything

`dvc pull` may remove a file before it has the new one. Here everything is fetched into the cache and checked against
its hash first, and only then checked out.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from rlhf.errors import UserError, one_line

SHOWN = 3


def damaged(root: Path, targets: list[str]) -> list[str]:
    """The files whose object in the cache is missing or has another hash; a damaged object is deleted."""
    from dvc.repo import Repo

    wrong = []
    with Repo(str(root)) as repo:
        for objects in repo.used_objs(targets or None).values():
            for item in sorted(objects, key=lambda item: (str(item.obj_name), item.value)):
                path = Path(repo.cache.local.oid_to_path(item.value))
                if not path.exists():
                    wrong.append(f"{item.obj_name} (missing)")
                    continue
                with path.open("rb") as handle:
                    digest = hashlib.file_digest(handle, "md5").hexdigest()
                if digest != item.value.removesuffix(".dir"):
                    path.unlink()
                    wrong.append(f"{item.obj_name} (damaged)")
    return wrong


def dvc(root: Path, *arguments: str) -> str:
    """Runs dvc; returns the first line of its errors, "" on success."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, text=True, stderr=subprocess.PIPE)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return (lines or [f"exit code {done.returncode}"])[0].removeprefix("ERROR: ") if done.returncode else ""


def pull(root: Path, targets: list[str]) -> None:
    """Fetches, verifies, checks out. Raises UserError for a missing or damaged file, with the checkout unchanged."""
    from dvc.exceptions import DvcException

    failure = dvc(root, "fetch", *targets)
    try:
        wrong = damaged(root, targets)
    except DvcException as error:
        raise UserError(f"{' '.join(targets) or 'dvc.lock'}: {str(error).splitlines()[0]}") from None
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(f"{', '.join(wrong[:SHOWN])}{more} in the remote; nothing was changed; run `dvc push` in a "
                        f"checkout that has them" + (f" ({failure})" if failure else ""))
    failure = dvc(root, "checkout", *targets)
    if failure:
        raise UserError(f"fetched and verified, but not checked out: {failure}")


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exit code 2: nothing was pulled."""
    parser = argparse.ArgumentParser(prog="python -m mlops.tools.pull",
                                     description="Pulls from DVC's remote, all or nothing.")
    parser.add_argument("targets", nargs="*", help="stages, outputs or .dvc files (default: all)")
    with one_line("pull"):
        pull(Path.cwd(), parser.parse_args(arguments).targets)


if __name__ == "__main__":
    main()
