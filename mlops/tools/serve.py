"""Serves a policy over HTTP with MLflow's server, until Ctrl-C.

    python -m mlops.tools.serve [MODEL] [--port 8000]
"""

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path

from mlops import program
from mlops.tools.chat import default_model, folders
from mlops.tools.runs import policy_folder
from rlhf.errors import UserError, one_line
from rlhf.files import hash_paths

SERVED = Path("scratch/served")


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.serve"), description=(
        "Serves a policy over HTTP with MLflow's server."))
    parser.add_argument("model", nargs="?", help=(
        f"{', '.join(folders())}, RUN:MODEL of a workspace, or a folder; without: the newest policy"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="who may ask: it has no password (default: this machine)")
    options = parser.parse_args()
    with one_line("serve"):
        name = options.model or default_model(Path())
        folder = folders().get(name) or policy_folder(Path(), name)
        if folder is None or not (folder / "config.json").is_file():
            raise UserError(f"{name}: no model; `instructflow run` makes them, `instructflow status` lists the runs")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, options.port))
            except (OSError, OverflowError) as error:
                raise UserError(f"--host {options.host} --port {options.port}: {error}; name another port") from None
        from mlops.release.registry import save_served

        target = SERVED / hash_paths([folder], folder.parent)[:16]
        if not (target / "MLmodel").is_file():
            shutil.rmtree(SERVED, ignore_errors=True)
            save_served("policy", folder, target)
    address = f"http://{options.host}:{options.port}/invocations"
    print(f"Serving {name} at {address} until Ctrl-C. Ask it:\n"
          f"curl {address} -H 'Content-Type: application/json' \\\n"
          """     -d '{"dataframe_records": [{"prompt": "..."}], "params": {"temperature": 0.7}}'""", flush=True)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(target), "--env-manager",
                              "local", "-p", str(options.port), "-h", options.host])


if __name__ == "__main__":
    main()
