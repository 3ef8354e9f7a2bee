"""Settings that Prefect, DVC, MLflow and Great Expectations read when imported: no telemetry, time to start.

Imported before Prefect; the stages get them too. What the user's environment says goes first. Where `make ui` has
started servers in this checkout, a run started by hand shows there.
"""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from flows.account import complete_account
from mlops.tracking.credentials import move_logins
from mlops.tracking.proxies import ask_loopback_directly

SETTINGS = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # else "database is locked" in runs without a server
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start makes its database
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
move_logins(os.environ)
ask_loopback_directly(os.environ)
complete_account(os.environ, Path())

SERVERS = Path("scratch/servers/servers.json")  # infra/servers.py: where Prefect and MLflow are
LOGIN = SERVERS.with_name("login")  # NAME:PASSWORD for both; only its owner may read it


def private_notes(root: Path) -> dict[str, str]:
    """The variable by which DVC keeps what it remembers of files in a folder of the checkout that nobody else enters.

    Its usual place is /var/tmp/dvc, where every account may write, and DVC unpickles what it finds there.
    """
    if os.environ.get("DVC_SITE_CACHE_DIR"):
        return {}
    folder = root / ".dvc" / "tmp" / "site-cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError:
        return {}  # DVC, which writes beside it, says what is wrong
    return {"DVC_SITE_CACHE_DIR": str(folder.resolve())}


def local_prefect(root: Path) -> str:
    """The API of the checkout's own Prefect server; empty where none of this account's processes listens there."""
    try:
        url = json.loads((root / SERVERS).read_text(encoding="utf-8"))["prefect"]
        if not listens(urlsplit(url).port or 0):
            return ""
    except (OSError, ValueError, KeyError):
        return ""
    return f"{url}/api"


def listens(port: int) -> bool:
    """Whether it is this account that listens at 127.0.0.1:`port`. Another one would be told the login."""
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, address, _, state, _, _, _, owner, *_ = line.split()
        if address == f"0100007F:{port:04X}" and state == "0A":
            return int(owner) == os.getuid()
    return False


def local_login(root: Path) -> str:
    """NAME:PASSWORD of the checkout's servers; empty where there is none or this account may not read it."""
    try:
        return (root / LOGIN).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


if (api := local_prefect(Path())) and os.environ.setdefault("PREFECT_API_URL", api) == api:
    os.environ["PREFECT_API_AUTH_STRING"] = local_login(Path())
