"""Runs a container of the manifests on this machine, without a container engine: namespaces of its own for mounts and
processes, the manifest's user, no capabilities, a read-only root, the manifest's volumes as the only places to write.

It needs root. The project's environment stands in for the image: `python` is this one, the code is this checkout.
Reading is not restricted as in a container (CAP_DAC_READ_SEARCH): this Python may be in a folder that only root enters.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.flows.checkout import REPOSITORY
from tests.infra.cluster import FOLDER, containers, templates
from tests.infra.site import wait
from tests.infra.stores import POSTGRES, TOOLS

SECRETS = {"POSTGRES_PASSWORD": "5c2f8e1b9d7a34", "S3_KEY": "sandbox", "S3_SECRET": "8f0c2e6d4b1a97", "WEBHOOK": "",
           "PREFECT_AUTH": "ada:7d3b9f2c5e8a16", "MLFLOW_PASSWORD": "1e9c4b7f2d8a56",
           "MLFLOW_SECRET_KEY": "b6d8f0a2c4e197"}
# Folders of a container that may be something else here.
PLACES = {"/work": "/srv/work", "/data": "/srv/data", "/docker-entrypoint-initdb.d": "/srv/initdb"}
DIES = ("setpriv", "--pdeathsig", "KILL")  # with the tests, whatever ends them
CLOSED = """set -e
mount --make-rprivate /
mount -t tmpfs none /media
hold=0
keep() { hold=$((hold + 1)); mkdir /media/$hold; mount --rbind "$1" /media/$hold; kept="$kept $hold:$1"; }
for path in $KEEP; do keep "$path"; done
for pair in $VOLUMES; do mkdir -p "/media/v${pair%%=*}"; mount --bind "${pair#*=}" "/media/v${pair%%=*}"; done
mount --bind "$ETC/hosts" /etc/hosts; mount --bind "$ETC/passwd" /etc/passwd
mount -t tmpfs none /srv; mount -t tmpfs none /home
for pair in $VOLUMES; do mkdir -p "${pair%%=*}"; mount --rbind "/media/v${pair%%=*}" "${pair%%=*}"; done
for pair in $kept; do
    mkdir -p "${pair#*:}"; mount --rbind "/media/${pair%%:*}" "${pair#*:}"; mount -o remount,bind,ro "${pair#*:}"
done
for path in /srv /home /; do mount -o remount,bind,ro $path; done
umount -l /media
cd "$DIRECTORY"
read="-all,+dac_read_search"
exec setpriv --pdeathsig KILL --reuid "$RUN_AS" --regid "$RUN_AS" --clear-groups --no-new-privs \\
    --inh-caps="$read" --ambient-caps="$read" --bounding-set="$read" -- "$@"
"""


def possible() -> bool:
    """Whether this user may make namespaces and mounts here."""
    tools = all(shutil.which(name) for name in ("unshare", "nsenter", "setpriv", "ip"))
    return tools and subprocess.run(["unshare", "-mnpf", "mount", "-t", "tmpfs", "none", "/media"],
                                    capture_output=True).returncode == 0


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets."""
    text = (REPOSITORY / "infra" / "Dockerfile").read_text().replace("\\\n", " ")
    base = text.split(" AS base\n")[1].split("\nFROM ")[0]
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"(?m)^ENV (.*)$", base))))


class Machine:
    """A network of its own for all containers, in which each has the name of its service."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repository = folder, folder / "repository.git"
        self.running: list[subprocess.Popen[bytes]] = []
        subprocess.run(["git", "clone", "-q", "--bare", "--depth=1", f"file://{REPOSITORY}", self.repository],
                       check=True)
        subprocess.run(["chown", "-R", "10001:10001", self.repository], check=True)
        (folder / "etc").mkdir()
        (folder / "etc" / "hosts").write_text("127.0.0.1 localhost postgres s3 prefect mlflow\n")
        users = "instructflow:x:10001:10001::/home/instructflow:/bin/sh\npostgres:x:999:999::/nowhere:/bin/sh\n"
        (folder / "etc" / "passwd").write_text(f"root:x:0:0:root:/root:/bin/sh\n{users}")
        os.chmod(folder, 0o755)
        self.network = subprocess.Popen([*DIES, "unshare", "-n", "sh", "-c", "ip link set lo up; exec sleep infinity"],
                                        start_new_session=True)
        ours = os.readlink("/proc/self/ns/net")
        wait(lambda: os.readlink(f"/proc/{self.network.pid}/ns/net") != ours, "a network", 60)

    def container(self, pod: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        spec = templates()[pod]["spec"]
        return spec, next(item for item in containers(templates()[pod]) if item["name"] == name)

    def start(self, pod: str, name: str = "", command: list[str] | None = None) -> "subprocess.Popen[bytes]":
        """Starts a pod's container with its command, again where it fails, or another command in its place."""
        spec, container = self.container(pod, name or pod)
        user = spec["securityContext"]["runAsUser"]
        volumes = [f"{place}={self.volume(pod, volume, user)}" for place, volume in places(container)]
        kept = {str(REPOSITORY), str(Path(sys.prefix).resolve()), str(self.repository)}
        environment = self.environment(container, {
            "KEEP": " ".join(sorted(kept)), "VOLUMES": " ".join(volumes),
            "ETC": str(self.folder / "etc"), "RUN_AS": str(user),
            "DIRECTORY": "/srv/work" if container.get("workingDir") else "/"})
        again = ["sh", "-c", 'until "$@"; do sleep 1; done', "again"] if not name else []
        said = command or [*again, *(here(item) for item in (*container["command"], *container.get("args", [])))]
        with (self.folder / f"{pod}-{name or pod}.log").open("ab") as log:
            process = subprocess.Popen(
                [*DIES, "nsenter", f"--net=/proc/{self.network.pid}/ns/net", "unshare", "-m", "-p", "-f",
                 "--kill-child", "--mount-proc", "bash", "-c", CLOSED, "container", *said],
                env=environment, stdout=log, stderr=log, start_new_session=True)
        self.running.append(process)
        return process

    def volume(self, pod: str, name: str, user: int) -> Path:
        path = self.folder / "volumes" / pod / name
        if not path.exists():
            path.mkdir(parents=True)
            os.chown(path, user, user)
        return path

    def environment(self, container: dict[str, Any], more: dict[str, str]) -> dict[str, str]:
        programs = [str(Path(sys.executable).parent), str(TOOLS), str(POSTGRES), os.environ["PATH"]]
        found = {"PATH": os.pathsep.join(programs), "HOME": "/home/instructflow", "PYTHONPATH": str(REPOSITORY),
                 "LANG": "C.UTF-8", **image_environment()}
        if container.get("envFrom"):
            settings = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
            (clients,) = (item["literals"] for item in settings if item["name"] == "clients")
            found |= dict(line.split("=", 1) for line in clients)
        for item in container.get("env", []):
            source = item.get("valueFrom", {})
            value = item.get("value") or {**SECRETS, "REPOSITORY": str(self.repository)}.get(
                source.get("secretKeyRef", {}).get("key", ""), "2")
            found[item["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
        return {**found, **more}

    def log(self, pod: str, name: str = "") -> str:
        return (self.folder / f"{pod}-{name or pod}.log").read_text(errors="replace")

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of this user in the containers' network."""
        return subprocess.run(["nsenter", f"--net=/proc/{self.network.pid}/ns/net", *command], capture_output=True,
                              text=True)

    def stop(self) -> None:
        for process in (*reversed(self.running), self.network):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def here(argument: str) -> str:
    """A command's word as this machine has it."""
    if argument == "python":
        return sys.executable
    return PLACES.get(argument, argument.replace("/app/", f"{REPOSITORY}/"))


def places(container: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the container may write, outermost first."""
    return sorted((PLACES.get(item["mountPath"], item["mountPath"]), item["name"]) for item in container["volumeMounts"]
                  if item["mountPath"] != "/dev/shm")


def postgres_command() -> list[str]:
    """What the image's start script does, as far as writing goes: PostgreSQL's own first start, then the server."""
    data = "/var/lib/postgresql/data/pgdata"
    script = (f"[ -d {data} ] || {{ umask 077; printf %s \"$POSTGRES_PASSWORD\" >/tmp/password; "
              f"initdb -D {data} -U instructflow -A scram-sha-256 --pwfile=/tmp/password; }}; exec postgres -D {data}")
    return ["sh", "-c", script]


