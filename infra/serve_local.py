"""Prefect's or MLflow's server on this machine, behind the gate of flows/gate.py: what `make ui` starts.

    python -m infra.serve_local prefect PORT
    python -m infra.serve_local mlflow PORT

The environment says the rest: INSTRUCTFLOW_LOGIN (NAME:PASSWORD), and for MLflow INSTRUCTFLOW_STORE and
INSTRUCTFLOW_ARTIFACTS. No secret is in a command line, which every account of the machine can read.

The page `/enter#NAME:PASSWORD` logs a browser in and goes on to the UI. A browser keeps what follows # to itself, so it
is in no request. Prefect's UI keeps the login in its storage, for MLflow the browser itself does: either is for this
port alone. A cookie would be sent to every port of this machine, and other accounts may listen on those.
"""

import os
import sys
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401

# isort: split
from flows.gate import ENTER, Gate, names_of
from flows.server import prefect_app
from infra.forms import Forms

HOST = "127.0.0.1"
PAGE = """<!doctype html><meta charset="utf-8"><title>instructflow</title><p id="text">logging in ...</p>
<script>
const login = decodeURIComponent(location.hash.slice(1)), colon = login.indexOf(":");
const fail = () => document.getElementById("text").textContent = "This link is not valid (any more). "
  + "`python -m infra.servers links`, in the checkout, prints the one that is.";
const request = new XMLHttpRequest();
history.replaceState(null, "", location.pathname);
CHECK
request.onload = () => { if (request.status == 200) { DONE; location.replace("TARGET"); } else fail(); };
request.onerror = fail;
request.send();
</script>"""
CHECKS = {  # how the page asks whether the login is right, what it does then, where it goes on
    "prefect": ("""request.open("GET", "/api/admin/version");
request.setRequestHeader("Authorization", "Basic " + btoa(login));""",
                'localStorage.setItem("prefect-password", btoa(login))', "/deployments"),
    "mlflow": ('request.open("GET", "/version", true, login.slice(0, colon), login.slice(colon + 1));', "", "/"),
}


def page(kind: str) -> str:
    """The page at `ENTER` of a server of this kind."""
    check, done, target = CHECKS[kind]
    return PAGE.replace("CHECK", check).replace("DONE", done).replace("TARGET", target)


def link(server: str, login: str) -> str:
    """The link that logs a person in."""
    return f"{server}{ENTER}#{login}"


def mlflow_app(store: str, artifacts: str) -> Any:
    """MLflow's server as `mlflow server` starts it, in this process."""
    import uvicorn  # noqa: F401  # by this MLflow sees that it is a server
    from mlflow import server

    os.environ.update({
        server.BACKEND_STORE_URI_ENV_VAR: store, server.REGISTRY_STORE_URI_ENV_VAR: store,
        server.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/", server.SERVE_ARTIFACTS_ENV_VAR: "true",
        server.ARTIFACTS_DESTINATION_ENV_VAR: artifacts, "_MLFLOW_SGI_NAME": "uvicorn"})
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(store, store, "mlflow-artifacts:/")
    from mlflow.server.fastapi_app import app

    return app


def gated(kind: str, port: int) -> Gate:
    """The server behind its gate. Prefect's asks for the login itself, sockets included; its health and its UI's files
    are open."""
    login = os.environ["INSTRUCTFLOW_LOGIN"]
    if kind == "prefect":
        os.environ["PREFECT_SERVER_API_AUTH_STRING"] = login
        return Gate(Forms(prefect_app(), Path.cwd(), login), names_of(port), enter=page(kind))
    app = mlflow_app(os.environ["INSTRUCTFLOW_STORE"], os.environ["INSTRUCTFLOW_ARTIFACTS"])
    return Gate(app, names_of(port), login, open_paths={"/health"}, enter=page(kind))


def main() -> None:
    kind, port = sys.argv[1], int(sys.argv[2])
    import uvicorn

    from mlops import imports_done

    app = gated(kind, port)
    imports_done()
    uvicorn.run(app, host=HOST, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
