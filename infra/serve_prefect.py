"""Prefect's server with a password, on PostgreSQL: the same command in a container and by hand.

    PREFECT_API_DATABASE_CONNECTION_URL=postgresql+asyncpg://… PREFECT_SERVER_API_AUTH_STRING=NAME:PASSWORD \\
        python -m infra.serve_prefect [--host 127.0.0.1] [--port 4200] [OPTION ...]

Further options go to `prefect server start` as they are. A server without a password would have its workers run what
anybody sends it, so it does not start. Browsers may call it from its own pages only (PREFECT_UI_URL), unless
PREFECT_SERVER_CORS_ALLOWED_ORIGINS names other origins.
"""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import flows.environment  # noqa: F401
from infra.required import require, require_database, require_secret

REQUIRED = {
    "PREFECT_API_DATABASE_CONNECTION_URL": "the database, postgresql+asyncpg://USER:PASSWORD@HOST/NAME",
    "PREFECT_SERVER_API_AUTH_STRING": "NAME:PASSWORD that clients must know",
}
LEASES = "prefect.server.concurrency.lease_storage.filesystem"  # the other keeps them in memory: docs/reliability.md


def command(environment: dict[str, str], options: list[str]) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment. Raises SystemExit with one line where a secret is missing or weak."""
    require("serve_prefect", environment, REQUIRED)
    login = environment["PREFECT_SERVER_API_AUTH_STRING"]
    require_secret("serve_prefect", "the password in PREFECT_SERVER_API_AUTH_STRING", login.partition(":")[2])
    require_database("serve_prefect", "PREFECT_API_DATABASE_CONNECTION_URL",
                     environment["PREFECT_API_DATABASE_CONNECTION_URL"])
    origins = own_origins(environment.get("PREFECT_UI_URL") or "http://127.0.0.1:4200")
    prefect = str(Path(sys.executable).with_name("prefect"))
    return [prefect, "server", "start", *options], {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES, **environment}


def own_origins(page: str) -> list[str]:
    """What browsers call the origin of the server's own pages; this machine goes by two names."""
    address = urlsplit(page)
    names = {"127.0.0.1", "localhost"}
    port = f":{address.port}" if address.port else ""
    return [f"{address.scheme}://{host}{port}"
            for host in sorted(names if address.hostname in names else {str(address.hostname)})]


def main() -> None:
    arguments, environment = command(dict(os.environ), sys.argv[1:])
    os.execve(arguments[0], arguments, environment)


if __name__ == "__main__":
    main()
