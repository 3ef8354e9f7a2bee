"""MLflow's server with passwords, on PostgreSQL and an object store: the same command in a container and by hand.

    MLFLOW_BACKEND_STORE_URI=postgresql://… MLFLOW_ARTIFACTS_DESTINATION=s3://… MLFLOW_AUTH_ADMIN_PASSWORD=… \\
        MLFLOW_FLASK_SERVER_SECRET_KEY=… python -m infra.serve_mlflow [--host 127.0.0.1] [--port 5000] [OPTION ...]

Further options go to `mlflow server` as they are. Users' names and passwords are kept in the same database
(MLFLOW_AUTH_DATABASE_URI names another); the file that tells MLflow so is readable by this user only.
"""

import configparser
import os
import sys
import tempfile
from pathlib import Path

import flows.environment  # noqa: F401
from infra.required import require, require_database, require_secret
from mlops.tracking.own_store import with_driver

REQUIRED = {
    "MLFLOW_BACKEND_STORE_URI": "the database, postgresql://USER:PASSWORD@HOST/NAME",
    "MLFLOW_ARTIFACTS_DESTINATION": "where artifacts go, s3://BUCKET/PATH or a folder",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "the first administrator's password, 12 characters at least",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a long random text that signs sessions",
}
DEFAULTS = {"--host": "127.0.0.1", "--port": "5000", "--workers": "1"}


def command(environment: dict[str, str], options: list[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of the server; writes its authentication file into `folder`.

    Raises SystemExit with one line where a secret is missing or weak.
    """
    require("serve_mlflow", environment, REQUIRED)
    for name in ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        require_secret("serve_mlflow", name, environment[name])
    require_database("serve_mlflow", "MLFLOW_BACKEND_STORE_URI", environment["MLFLOW_BACKEND_STORE_URI"])
    config = configparser.ConfigParser(interpolation=None)
    store = with_driver(environment["MLFLOW_BACKEND_STORE_URI"])
    users = with_driver(environment.get("MLFLOW_AUTH_DATABASE_URI", store))
    config["mlflow"] = {"default_permission": "READ", "database_uri": users,
                        "admin_username": environment.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin"),
                        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth"}
    path = folder / "basic_auth.ini"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        config.write(file)
    arguments = [*options]
    for name, value in DEFAULTS.items():
        if name not in arguments:
            arguments += [name, value]
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    return [mlflow, "server", "--app-name", "basic-auth", *arguments], {
        **environment, "MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_AUTH_CONFIG_PATH": str(path),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"}


def main() -> None:
    arguments, environment = command(dict(os.environ), sys.argv[1:], Path(tempfile.mkdtemp(prefix="instructflow-")))
    os.execve(arguments[0], arguments, environment)


if __name__ == "__main__":
    main()
