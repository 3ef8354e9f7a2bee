"""Checks what a run needs on this machine and says how to fix what is missing: `make doctor`.

    python -m infra.doctor

Exit code 1 where something would stop a run; a warning stops nothing.
"""

import base64
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import flows.environment  # noqa: F401

# isort: split
from packaging.requirements import Requirement

from flows.environment import local_prefect
from infra.servers import Servers
from mlops.config.loader import load_params
from mlops.printing import show_findings, terminal
from mlops.tracking.own_store import DATABASE, champion_lost, damage
from rlhf.errors import UserError, first_line, without_secrets

MARKS = {"ok": "[green]ok[/]", "unused": "[dim]–[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
FREE_GB = 5  # the cpu profile's data, cache and models
MEMORY_GB = 4
ANSWER_SECONDS = 5
SET_UP = "rm .venv/.installed; make setup"


@dataclass(frozen=True)
class Finding:
    """One check: what it looks at, what it sees and, unless that is ok, how to fix it. `unused`: the checkout does not
    use it as it is set up now, so nothing was looked at."""

    what: str
    state: Literal["ok", "unused", "warn", "fail"]
    detail: str
    fix: str = ""


Check = Callable[[Path], Finding]


def python(root: Path) -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def packages(root: Path) -> Finding:
    """Installed versions against requirements.lock."""
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if re.match(r"\w", line)]
    wanted = [item for item in wanted if item.marker is None or item.marker.evaluate()]
    missing, other = [], []
    for item in wanted:
        try:
            if not item.specifier.contains(version := importlib.metadata.version(item.name), prereleases=True):
                other.append(f"{item.name} {version} (lock: {item.specifier})")
        except importlib.metadata.PackageNotFoundError:
            missing.append(item.name)
    if missing:
        return Finding("packages", "fail", f"not installed: {', '.join(missing[:5])}", SET_UP)
    if other:
        return Finding("packages", "warn", "; ".join(other[:5]), SET_UP)
    return Finding("packages", "ok", f"{len(wanted)} as in requirements.lock")


def parameters(root: Path) -> Finding:
    try:
        params = load_params(root)
    except UserError as error:
        return Finding("parameters", "fail", str(error), "fix the file")
    return Finding("parameters", "ok", f"profile {params.profile}, seed {params.seed}")


def programs(root: Path) -> Finding:
    missing = [name for name in ("git", "setpriv") if not shutil.which(name)]
    if missing:
        return Finding("programs", "fail", f"not found: {', '.join(missing)}", "install git and util-linux")
    return Finding("programs", "ok", "git, setpriv")


def repository(root: Path) -> Finding:
    done = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        return Finding("git", "warn", done.stderr.strip(), "lineage and workspaces need git")
    changed = len(done.stdout.splitlines())
    if changed:
        return Finding("git", "warn", f"{changed} uncommitted files", "commit: a version's lineage names the commit")
    return Finding("git", "ok", "nothing uncommitted")


def disk(root: Path) -> Finding:
    usage = shutil.disk_usage(root)
    free = usage.free / 1e9
    state: Literal["ok", "fail"] = "ok" if free >= FREE_GB else "fail"
    return Finding("disk", state, f"{free:.0f} GB free at {root}", f"a run of the cpu profile needs {FREE_GB} GB; "
                   "`dvc gc -w` removes old versions from the cache")


def writable(root: Path) -> Finding:
    blocked = [name for name in (".", "scratch", ".dvc", "models", "metrics", "reports")
               if (root / name).exists() and not os.access(root / name, os.W_OK)]
    if blocked:
        return Finding("folders", "fail", f"read-only: {', '.join(blocked)}", f"chown -R $(id -un) {blocked[0]}")
    return Finding("folders", "ok", "writable")


def memory(root: Path) -> Finding:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    state: Literal["ok", "warn"] = "ok" if size >= MEMORY_GB else "warn"
    return Finding("memory", state, f"{size:.0f} GB, {os.cpu_count()} cores", f"{MEMORY_GB} GB for the cpu profile")


def gpu(root: Path) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        return Finding("GPU", "fail", f"there is one, and torch {torch.__version__} does not see it",
                       'make setup TORCH="torch==2.13.0 --index-url ..." with the build for your CUDA')
    try:
        wanted = load_params(root).profile.startswith("gpu")
    except UserError:
        wanted = False
    if wanted:
        return Finding("GPU", "fail", "none, and the profile is gpu", "make run PROFILE=cpu, or a machine with a GPU")
    return Finding("GPU", "unused", "torch sees none; the cpu profile needs none")


def prefect(root: Path) -> Finding:
    url = os.environ.get("PREFECT_API_URL") or local_prefect(root)
    if not url:
        return Finding("Prefect", "unused", "no server is running or named: each run starts one of its own")
    problem = _answers(f"{url}/health")
    if problem:
        return Finding("Prefect", "fail", f"{url}: {problem}", "start it (make ui), or unset PREFECT_API_URL")
    return Finding("Prefect", "ok", url)


def worker(root: Path) -> Finding:
    url = os.environ.get("PREFECT_API_URL") or local_prefect(root)
    if not url or _answers(f"{url}/health"):
        return Finding("worker", "unused", "none is needed without a server")
    import asyncio

    from prefect.client.orchestration import get_client

    async def pools() -> dict[str, list[str]]:
        async with get_client() as client:
            return {pool.name: [item.name for item in await client.read_workers_for_work_pool(pool.name)
                                if str(item.status).endswith("ONLINE")]
                    for pool in await client.read_work_pools()}

    try:
        online = asyncio.run(pools())
    except Exception as error:
        return Finding("worker", "fail", first_line(error), "check the server's credentials")
    if "cpu" not in online:
        return Finding("worker", "fail", "the server has no pool cpu", "python -m infra.setup")
    if not any(online.values()):
        return Finding("worker", "warn", "no worker is online: scheduled runs wait", "make ui, or python -m "
                       "infra.worker cpu")
    return Finding("worker", "ok", ", ".join(name for names in online.values() for name in names))


def mlflow(root: Path) -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        return Finding("MLflow", "unused", f"no server over HTTP: {uri or 'mlflow.db in the checkout'}")
    problem = _answers(f"{uri.rstrip('/')}/health")
    if problem:
        return Finding("MLflow", "warn", f"{uri}: {problem}", "start it; journals are kept and sent later")
    refused = _answers(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1", mlflow_login())
    if refused:
        return Finding("MLflow", "fail", f"{uri}: {refused}", "set MLFLOW_TRACKING_USERNAME and "
                       "MLFLOW_TRACKING_PASSWORD")
    return Finding("MLflow", "ok", uri)


def store(root: Path) -> Finding:
    """MLflow's database of the checkout, and whether its registry has what metrics/promote.json records."""
    if problem := damage(root):
        return Finding("MLflow's store", "fail", problem.split(": `")[0],
                       "mv mlflow.db mlflow.db.damaged, then make run")
    try:
        registry = load_params(root).stages.promote.registry
    except UserError:
        registry = ""
    if champion_lost(root, registry):
        return Finding("MLflow's store", "warn", "the registry lacks the champion that metrics/promote.json names",
                       "make run registers it again")
    if not (root / DATABASE).exists():
        return Finding("MLflow's store", "unused", "no mlflow.db yet, or a server has it")
    return Finding("MLflow's store", "ok", "whole")


def notes(root: Path) -> Finding:
    """Where `dvc` by hand keeps what it remembers of files, and unpickles it from."""
    folder = Path(os.environ.get("DVC_SITE_CACHE_DIR") or "/var/tmp/dvc")
    owner = folder.stat().st_uid if folder.exists() else os.getuid()
    if owner != os.getuid():
        return Finding("DVC's notes", "warn", f"{folder} belongs to user {owner}, and DVC unpickles what is in it",
                       "export DVC_SITE_CACHE_DIR=$PWD/.dvc/tmp/site-cache before dvc; flows do")
    return Finding("DVC's notes", "ok", str(folder))


def remote(root: Path) -> Finding:
    """Configured, its program part installed, and whether it lets us list."""
    dvc = str(Path(sys.executable).with_name("dvc"))

    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([dvc, *command], cwd=root, capture_output=True, text=True)

    name = ask("config", "core.remote").stdout.strip()
    if not name:
        return Finding("DVC remote", "warn", "none: everything is on this disk alone", "dvc remote add -d NAME URL")
    url = ask("config", f"remote.{name}.url").stdout.strip()
    done = ask("status", "--cloud", "--remote", name, "data.dvc")
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1]
        return Finding("DVC remote", "fail", f"{name} {url}: {reason}",
                       "check its URL and credentials (dvc remote modify --local)")
    return Finding("DVC remote", "ok", f"{name} {url}")


def ports(root: Path) -> Finding:
    if Servers(root).running():
        return Finding("servers", "ok", "running; `make down` stops them")
    taken = []
    for port in (4200, 5000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken.append(str(port))
    if taken:
        return Finding("ports", "warn", f"in use: {', '.join(taken)}", "`make ui` takes the next free ones")
    return Finding("ports", "ok", "4200 and 5000 are free")


def labels(root: Path) -> Finding:
    """Label Studio, where rounds are to use it: its SDK's environment, an answer, the key."""
    url, key = os.environ.get("LABEL_STUDIO_URL", ""), os.environ.get("LABEL_STUDIO_API_KEY", "")
    if not url:
        return Finding("Label Studio", "unused", "LABEL_STUDIO_URL is not set: people label on the terminal")
    sdk = Path(os.environ.get("LABEL_STUDIO_PYTHON") or root / ".venv-labels" / "bin" / "python")
    if not sdk.exists():
        return Finding("Label Studio", "fail", f"{sdk} is not there", "make labels, or set LABEL_STUDIO_PYTHON")
    if refused := _answers(f"{url.rstrip('/')}/api/projects/?page_size=1", f"Token {key}"):
        return Finding("Label Studio", "fail", f"{url}: {refused}", "start it; check LABEL_STUDIO_URL and "
                       "LABEL_STUDIO_API_KEY")
    return Finding("Label Studio", "ok", url)


def webhook(root: Path) -> Finding:
    url = os.environ.get("INSTRUCTFLOW_WEBHOOK", "")
    if not url:
        return Finding("notices", "warn", "nobody is notified when a run fails", "set INSTRUCTFLOW_WEBHOOK, then "
                       "python -m infra.setup")
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)),
                                 timeout=ANSWER_SECONDS).close()
    except OSError as error:
        return Finding("notices", "fail", f"{parts.hostname}: {error}", "check INSTRUCTFLOW_WEBHOOK")
    return Finding("notices", "ok", f"{parts.scheme}://{parts.netloc}/…")


CHECKS: tuple[Check, ...] = (python, packages, programs, parameters, repository, disk, writable, memory, gpu, ports,
                             prefect, worker, mlflow, store, labels, remote, notes,
                             webhook)


def mlflow_login() -> str:
    """The header that MLflow's user and password make; empty without a user."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode() if user else ""


def _answers(url: str, authorization: str = "") -> str:
    """Empty where the address answers with success, else what is wrong."""
    request = urllib.request.Request(url)
    if authorization:
        request.add_header("Authorization", authorization)
    try:
        urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return f"no answer ({getattr(error, 'reason', error)})"
    return ""


def run_checks(root: Path, checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Every check's finding, without logins; a check that breaks is a finding too."""
    findings = []
    for check in checks:
        try:
            findings.append(check(root))
        except Exception as error:
            findings.append(Finding(check.__name__, "fail", f"{type(error).__name__}: {error}", "report this"))
    return [replace(item, detail=without_secrets(item.detail)) for item in findings]


def main() -> None:
    findings = run_checks(Path.cwd())
    show_findings(((MARKS[item.state], item.what, item.detail, "" if item.state in ("ok", "unused") else item.fix)
                   for item in findings), terminal())
    print("\n–: not used now, so not looked at. Your profile, data and model: instructflow check")
    if any(item.state == "fail" for item in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
