"""Image, compose file and manifests pass their tools' own checks and hold no secret; the servers ask for theirs."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docker.utils.build import exclude_paths

from infra.serve_mlflow import REQUIRED, command
from tests.flows.checkout import REPOSITORY

INFRA = REPOSITORY / "infra"
BIN = Path(sys.executable).parent
MANIFESTS = sorted(path for path in (INFRA / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
SECRETS = {"POSTGRES_PASSWORD", "S3_KEY", "S3_SECRET", "PREFECT_AUTH", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"}


def passes(*arguments: str | Path) -> None:
    done = subprocess.run([str(item) for item in arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_s_linter() -> None:
    passes(BIN / "hadolint", INFRA / "Dockerfile")


def test_the_compose_file_s_schema() -> None:
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_s_schema(path: Path) -> None:
    passes(BIN / "kubernetes-validate", "--strict", path)


def test_the_kustomization_names_every_manifest() -> None:
    listed = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "gpu-job.yaml", "gpu-nodes.yaml"]) == [path.name for path in MANIFESTS]


def test_every_secret_comes_from_outside() -> None:
    text = (INFRA / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) >= SECRETS
    given = dict(line.split("=", 1) for line in (INFRA / "example.env").read_text().splitlines() if "=" in line)
    assert all(given[name] == "" for name in (*SECRETS, "LABELS_PASSWORD", "LABELS_KEY"))
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            found = json.dumps(document)
            assert document["kind"] != "Secret"
            assert not re.search(r'"name": "\w*(PASSWORD|SECRET|AUTH_STRING)\w*", "value"', found), path.name


def test_servers_listen_on_this_machine_unless_told() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    published = {name: item["ports"] for name, item in services.items() if "ports" in item}
    assert set(published) == {"prefect", "mlflow", "labels"}
    assert all(port.startswith("${BIND:-127.0.0.1}:") for ports in published.values() for port in ports)


def test_containers_run_without_root() -> None:
    text = (INFRA / "Dockerfile").read_text()
    for target in ("cpu", "cuda"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER 10001" in stage
        assert "HEALTHCHECK" in stage


def test_mlflow_s_command(tmp_path: Path) -> None:
    environment = {name: f"the-{name.lower()}" for name in REQUIRED}
    arguments, passed = command(environment, ["--port", "5999"], tmp_path)
    assert arguments[1:] == ["server", "--app-name", "basic-auth", "--port", "5999", "--host", "127.0.0.1",
                             "--workers", "1"]
    path = Path(passed["MLFLOW_AUTH_CONFIG_PATH"])
    assert path.stat().st_mode & 0o777 == 0o600
    config = configparser.ConfigParser(interpolation=None)
    config.read(path)
    assert config["mlflow"]["database_uri"] == "the-mlflow_backend_store_uri"
    assert not any("password" in item for item in arguments)


@pytest.mark.parametrize("missing", sorted(REQUIRED))
def test_mlflow_without_a_secret_does_not_start(missing: str, tmp_path: Path) -> None:
    environment = {name: "x" for name in REQUIRED if name != missing}
    with pytest.raises(SystemExit, match=f"serve_mlflow: {missing} is not set"):
        command(environment, [], tmp_path)


KEPT_OUT = (
    "infra/.env", "infra/.env.local", ".env", ".dvc/config.local", ".git/config", ".venv/bin/python", "mlflow.db",
    "scratch/servers/password", "data/sft.jsonl", "raw/feedback/a.jsonl", "models/sft/model.safetensors",
    "rlhf/__pycache__/a.pyc", "instructflow.egg-info/PKG-INFO", "feedback/r1/labels.jsonl", "notes.txt")


def test_the_image_s_context_holds_code_and_nothing_else(tmp_path: Path) -> None:
    """Docker's own reading of .dockerignore, over a checkout with everything in it that must stay out."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, text=True,
                             capture_output=True, check=True).stdout.splitlines()
    for name in (*tracked, *KEPT_OUT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret" if name in KEPT_OUT else "")
    patterns = (REPOSITORY / ".dockerignore").read_text().splitlines()
    context = {name for name in exclude_paths(str(tmp_path), [line for line in patterns if line and line[0] != "#"],
                                              "infra/Dockerfile") if (tmp_path / name).is_file()}
    copied = re.findall(r"(?m)^COPY (.+) \S+$", (REPOSITORY / "infra" / "Dockerfile").read_text())
    sources = {source for line in copied for source in line.split()}
    wanted = {name for name in tracked if name in sources or name.split("/")[0] in sources}
    assert context >= {"rlhf/files.py", "mlops/reporting/report.html.j2", "requirements.lock", "infra/start-worker.sh"}
    assert context - {".dockerignore", "infra/Dockerfile"} == wanted - {"infra/Dockerfile"}
