"""Settings that Prefect, DVC, MLflow and Great Expectations read when imported: no telemetry, time to start.

Imported before Prefect; the stages get them too. What the user's environment says goes first. Where `make ui` has
started servers in this checkout, a run started by hand shows there.
"""

import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

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

SERVERS = Path("scratch/servers/servers.json")  # infra/servers.py: where Prefect and MLflow are


def local_prefect(root: Path) -> str:
    """The API of the checkout's own Prefect server; empty where none listens."""
    try:
        url = json.loads((root / SERVERS).read_text(encoding="utf-8"))["prefect"]
        parts = urlsplit(url)
        socket.create_connection((parts.hostname, parts.port), timeout=1).close()
    except (OSError, ValueError, KeyError):
        return ""
    return f"{url}/api"


if "PREFECT_API_URL" not in os.environ and (api := local_prefect(Path())):
    os.environ["PREFECT_API_URL"] = api
