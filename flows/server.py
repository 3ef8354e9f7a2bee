"""The Prefect server of a flow for which none is named: started beside the flow's own imports, ended with the flow.

Prefect would start the same one, on the same database, but later: it imports the whole server into the flow's process
first and then waits for the other to do so too. `python -m flows.server FD` is that other process. It answers this flow
alone: it asks for a password that both have in their environment, and answers no page (flows/gate.py).
"""

import atexit
import http.client
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
STOP_SECONDS = 5.0

_started: list[subprocess.Popen[bytes]] = []


def start_server() -> None:
    """Starts it unless Prefect's settings name a server; from here on they name this one.

    Call it before the other imports of Prefect, `wait_for_server` after them.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    if PREFECT_API_URL.value() or not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        return
    code = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    login = f"flow:{secrets.token_urlsafe(32)}"
    with socket.create_server((HOST, 0)) as listener:  # requests wait here until the server takes them
        _started.append(subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listener.fileno()), str(os.getpid())],
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONPATH": code, "PREFECT_SERVER_API_AUTH_STRING": login}, stdin=subprocess.DEVNULL))
        os.environ["PREFECT_API_URL"] = f"http://{HOST}:{listener.getsockname()[1]}/api"
    os.environ["PREFECT_API_AUTH_STRING"] = login
    os.environ["PREFECT_UI_URL"] = ""  # it has none
    atexit.register(stop_server)
    refresh_global_settings_context()


def wait_for_server() -> None:
    """Returns when the server that `start_server` has started answers; ends the process where it does not."""
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    if not _started:
        return
    seconds = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    address = PREFECT_API_URL.value().split("/")[2]
    connection = http.client.HTTPConnection(address, timeout=seconds)
    try:
        connection.request("GET", "/api/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise SystemExit(f"Prefect's server did not start: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if status != http.HTTPStatus.OK:
        raise SystemExit(f"Prefect's server did not start: it answered {status}")


def server_lasts() -> bool:
    """Whether the flow reports to a server that outlives this process."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value()) and not _started


def stop_server() -> None:
    """Ends the server, once everything is sent that it should know."""
    while _started:
        process = _started.pop()
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def prefect_app(ephemeral: bool = False) -> Any:
    """Prefect's server, whose transactions over SQLite take the write lock when they begin, and wait for it.

    Prefect begins them deferred: SQLite refuses the first write of one at once ("database is locked"), however long it
    might wait, where another was committed after its first read. An automation lost its event that way, and a killed
    run was taken up again after 15 minutes instead of one.
    """
    from prefect.server.api.server import create_app
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction
    AioSqliteConfiguration.begin_transaction = (  # type: ignore[method-assign]
        lambda self, session, with_for_update=False: begin(self, session, with_for_update=True))
    return create_app(ephemeral=ephemeral, final=True)


def main() -> None:
    """Serves on the socket that the flow has opened, until the flow ends."""
    from mlops.processes import die_with_parent

    die_with_parent(int(sys.argv[2]))
    import uvicorn

    from flows.gate import Gate, names_of
    from mlops import imports_done

    listener = socket.socket(fileno=int(sys.argv[1]))
    app = Gate(prefect_app(ephemeral=True), names_of(listener.getsockname()[1]))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    imports_done()
    server.run([listener])


if __name__ == "__main__":
    main()
