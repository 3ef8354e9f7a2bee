"""What would stop a run for sure, said before anything starts: the folder it works in and the server it reports to.

`infra/doctor.py` looks at much more.
"""

import configparser
import os
from pathlib import Path

from mlops.tracking.own_store import damage
from rlhf.errors import UserError

WRITTEN = (".", ".dvc", ".dvc/tmp", ".dvc/cache", "scratch", "build", "data", "models", "metrics", "reports", "inputs")


def check_checkout(root: Path) -> None:
    """Raises UserError where a run in the checkout `root` cannot work: its path, its repository, its folders."""
    if found := next((character for character in str(root) if character in "{}\n\r"), ""):
        raise UserError(f"{str(root)!r}: DVC cannot work in a folder whose path has {found!r}: rename or move it")
    if "'" in str(root) and '"' in str(root):
        raise UserError(f"{root}: MLflow cannot make its database in a folder whose path has both kinds of quotes: "
                        "rename or move it")
    for name in WRITTEN:
        path = root / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, and a run needs a folder of that name: move the file away")
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"{path}: cannot be written by user {os.getuid()}: correct its owner or permissions")
    if problem := damage(root):
        raise UserError(problem)
    if not without_repository(root) and not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise UserError(f"{root}: no git repository (perhaps a source archive), and DVC asks for one: "
                        "`git init && git add -A && git commit -m start`, or, without history and lineage, "
                        "`dvc config --local core.no_scm true`")


def without_repository(root: Path) -> bool:
    """Whether DVC's settings say that there is no repository: core.no_scm."""
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
        return config.getboolean("core", "no_scm", fallback=False)
    except (configparser.Error, ValueError):
        return True  # DVC says what is wrong with them


async def check_server() -> None:
    """Raises UserError where the Prefect server of the settings does not answer or does not know the login."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    try:
        async with get_client() as client:
            await client.hello()
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        advice = "set PREFECT_API_AUTH_STRING to its NAME:PASSWORD" if status in (401, 403) else "is it Prefect's API?"
        raise UserError(f"PREFECT_API_URL = {PREFECT_API_URL.value()}: the server answers {status}; {advice}") from None
    except Exception as error:
        raise UserError(f"PREFECT_API_URL = {PREFECT_API_URL.value()}: no Prefect server answers there "
                        f"({' '.join(str(error).split())[:160] or type(error).__name__}); start it, or unset "
                        "PREFECT_API_URL") from None
