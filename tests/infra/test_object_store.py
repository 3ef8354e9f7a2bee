"""The object store as containers start it: one port answers strangers, and that one asks for a key."""

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from infra.serve_s3 import command
from tests.flows.checkout import REPOSITORY
from tests.infra.site import wait
from tests.infra.stores import INNER, MISSING, TOOLS, answer, free_port

SECRET = "8f0c2e6d4b1a97"
OUTSIDE = "127.0.0.2"  # another address of this machine, as a neighbour's pod would have one
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # how a gRPC client opens a connection

needs_weed = pytest.mark.skipif("weed" in MISSING, reason="needs weed: `make scan` installs it")


class Store(NamedTuple):
    url: str
    port: int
    inner: dict[str, int]
    pid: int


def started_by(file: str) -> list[str]:
    """The command of service s3 in the compose file, or in the manifest."""
    if file == "compose.yaml":
        return list(yaml.safe_load((REPOSITORY / "infra" / file).read_text())["services"]["s3"]["command"])
    (made,) = (item for item in yaml.safe_load_all((REPOSITORY / "infra" / file).read_text())
               if item["kind"] == "StatefulSet")
    (container,) = made["spec"]["template"]["spec"]["containers"]
    return list(container["command"])


def run(arguments: list[str], folder: Path) -> Store:
    assert arguments[:4] == ["python", "-m", "infra.serve_s3", "--dir"]
    data = folder / "data"
    data.mkdir()
    port, inner = free_port(), {name: free_port() for name in INNER}
    environment = {**os.environ, "S3_KEY": "somebody", "S3_SECRET": SECRET, "TMPDIR": str(folder),
                   "PATH": os.pathsep.join([str(TOOLS), os.environ["PATH"]])}
    process = subprocess.Popen(
        [sys.executable, *arguments[1:4], str(data), *arguments[5:], "--port", str(port),
         *(f"-{name}={number}" for name, number in inner.items())],
        env=environment, cwd=REPOSITORY, stdout=(folder / "log").open("wb"), stderr=subprocess.STDOUT,
        start_new_session=True)
    url = f"http://{OUTSIDE}:{port}"
    try:
        wait(lambda: answer(f"{url}/status") == 200, "the object store")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Store(url, port, inner, process.pid)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    commands = [started_by(file) for file in ("compose.yaml", "kubernetes/s3.yaml")]
    assert commands[0] == commands[1]
    made = run(commands[0], tmp_path_factory.mktemp("s3"))
    yield made
    os.killpg(made.pid, signal.SIGKILL)
    os.waitpid(made.pid, 0)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports at which the process takes connections."""
    import psutil

    return {(item.laddr.ip, item.laddr.port) for item in psutil.Process(pid).net_connections("tcp")
            if item.status == psutil.CONN_LISTEN}


def client(store: Store, secret: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=store.url, region_name="us-east-1", aws_access_key_id="somebody",
                        aws_secret_access_key=secret)


def put(url: str) -> int:
    """The status of a write without a key; 0 where nobody listens."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"stolen", method="PUT"), timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@needs_weed
def test_only_s3_listens_outside_of_loopback(store: Store) -> None:
    ports, grpc = listening(store.pid), store.inner["s3.port.grpc"]
    assert {port for address, port in ports if address != "127.0.0.1"} == {store.port, grpc}
    assert {port for address, port in ports if address == "127.0.0.1"} == set(store.inner.values()) - {grpc}


@needs_weed
@pytest.mark.parametrize("server", ["master.port", "volume.port", "filer.port"])
def test_strangers_reach_none_of_the_servers_behind_it(store: Store, server: str) -> None:
    assert put(f"http://{OUTSIDE}:{store.inner[server]}/stolen") == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((OUTSIDE, store.inner[f"{server}.grpc"]), 5)


@needs_weed
def test_the_servers_behind_it_would_take_a_write_without_a_key(store: Store) -> None:
    """Why they must listen on loopback only. If this fails, SeaweedFS has become stricter."""
    assert put(f"http://127.0.0.1:{store.inner['filer.port']}/stolen") == 201


@needs_weed
def test_the_grpc_port_does_not_answer_a_client_without_a_certificate(store: Store) -> None:
    """S3's gRPC takes new identities from whoever may call it (SeaweedS3IamCache.PutIdentity)."""
    where = (OUTSIDE, store.inner["s3.port.grpc"])
    with socket.create_connection(where, 5) as plain:
        plain.sendall(HTTP2)
        assert plain.recv(9)[3:4] != b"\4", "it greets in plain text"
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    refused = pytest.raises(ssl.SSLError, match=r"(?i)certificate.required|bad.certificate")
    with socket.create_connection(where, 5) as raw, refused, context.wrap_socket(raw) as anonymous:
        anonymous.sendall(HTTP2)
        anonymous.recv(9)


@needs_weed
def test_s3_asks_for_the_key(store: Store) -> None:
    from botocore.exceptions import ClientError

    right = client(store, SECRET)
    right.create_bucket(Bucket="dvc")
    right.put_object(Bucket="dvc", Key="a", Body=b"ours")
    assert right.get_object(Bucket="dvc", Key="a")["Body"].read() == b"ours"
    assert put(f"{store.url}/dvc/a") == 403
    assert answer(f"{store.url}/dvc/a") == 403
    assert answer(f"{store.url}/") == 403
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(store, "guessed-secret").put_object(Bucket="dvc", Key="a", Body=b"stolen")
    assert right.get_object(Bucket="dvc", Key="a")["Body"].read() == b"ours"


@needs_weed
def test_its_keys_are_nobody_else_s_to_read(store: Store, tmp_path: Path) -> None:
    arguments, passed = command({"S3_KEY": "somebody", "S3_SECRET": SECRET, "PATH": f"{TOOLS}:{os.environ['PATH']}"},
                                ["--dir", "x"], tmp_path)
    assert SECRET not in " ".join([*arguments, *passed.values()])
    assert {path.name for path in tmp_path.iterdir()} == {"s3.json", "authority.pem", "server.pem", "server.key"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())
    with open(f"/proc/{store.pid}/cmdline") as file:
        assert SECRET not in file.read()


@pytest.mark.parametrize(("given", "said"), [
    ({}, "serve_s3: S3_KEY is not set"), ({"S3_KEY": "a"}, "serve_s3: S3_SECRET is not set"),
    ({"S3_KEY": "a", "S3_SECRET": "short"}, "serve_s3: S3_SECRET is too short"),
    ({"S3_KEY": "a", "S3_SECRET": "change-me-please"}, "serve_s3: S3_SECRET is a placeholder")])
def test_without_a_good_secret_it_does_not_start(given: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        command(given, ["--dir", "x"], tmp_path)
    assert not list(tmp_path.iterdir())
