"""Whether a server or worker is well, by exit code: health checks of images and clusters, and waiting for a server.

    python -m infra.healthy server [SECONDS]    waits until the server at PREFECT_API_URL answers, 120 s at most
    python -m infra.healthy mlflow              MLflow at MLFLOW_TRACKING_URI answers
    python -m infra.healthy s3                  the object store on this machine answers
    python -m infra.healthy worker              this machine's worker has been heard of by the server lately
"""

import asyncio
import os
import socket
import sys
import time
import urllib.request

import flows.environment  # noqa: F401

# isort: split
from rlhf.errors import without_secrets


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(url: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not answers(url):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


async def worker_online() -> bool:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        for pool in await client.read_work_pools():
            for worker in await client.read_workers_for_work_pool(pool.name):
                if worker.name.endswith(f"@{socket.gethostname()}") and worker.status.value == "ONLINE":
                    return True
    return False


def main() -> None:
    what, *rest = sys.argv[1:] or [""]
    if what == "server":
        url = f"{os.environ['PREFECT_API_URL'].rstrip('/')}/health"
        well = wait_for(url, float(rest[0]) if rest else 120)
    elif what == "mlflow":
        url = f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/health"
        well = answers(url)
    elif what == "s3":
        url = "http://127.0.0.1:8333/status"
        well = answers(url)
    elif what == "worker":
        url = os.environ["PREFECT_API_URL"]
        well = asyncio.run(worker_online())
    else:
        raise SystemExit(f"healthy: server, mlflow, s3 or worker, not {what!r}")
    if not well:
        url = without_secrets(url)
        raise SystemExit(f"healthy: {what}: no answer from {url}" if what != "worker" else "healthy: no worker online")


if __name__ == "__main__":
    main()
