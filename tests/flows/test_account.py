"""Accounts without a name or a home, odd folders, proxies: a whole run of shell stages in each."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.account import complete_account
from tests.flows.checkout import Checkout


def nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_an_account_that_is_well_keeps_all(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    complete_account(environment, tmp_path / "checkout")
    assert environment == {"HOME": str(tmp_path)}
    assert not (tmp_path / "checkout").exists()


def test_a_number_without_name_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_knows(monkeypatch)
    environment: dict[str, str] = {}
    complete_account(environment, tmp_path)
    assert environment == {"USER": f"uid{os.getuid()}", "HOME": str(tmp_path / "scratch" / "home")}
    assert (tmp_path / "scratch" / "home").stat().st_mode & 0o777 == 0o700
    named = {"LOGNAME": "ada", "HOME": str(tmp_path)}
    complete_account(named, tmp_path)
    assert named == {"LOGNAME": "ada", "HOME": str(tmp_path)}


def test_a_home_that_cannot_be_written_stays_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setattr("flows.account.os.access", lambda path, mode: not str(path).startswith(str(home)))
    environment = {"HOME": str(home), "PREFECT_HOME": "/mine"}
    complete_account(environment, tmp_path)
    assert environment["HOME"] == str(home)
    assert environment["PREFECT_HOME"] == "/mine"
    assert environment["HF_HOME"] == str(home / ".cache" / "huggingface")  # models that are there are found
    assert environment["XDG_CACHE_HOME"] == str(tmp_path / "scratch" / "home" / ".cache")


def test_the_root_as_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.account.os.access", lambda path, mode: str(path) != "/")
    environment = {"HOME": "/"}
    complete_account(environment, tmp_path)
    assert environment["HOME"] == "/"
    assert environment["PREFECT_HOME"] == str(tmp_path / "scratch" / "home" / ".prefect")


def run_whole(checkout: Checkout, *before: str, **environment: str) -> None:
    """The command in the checkout, with a Prefect server of its own, beneath the program `before`."""
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("PREFECT_API_URL", "PREFECT_HOME", "HOME", "USER", "LOGNAME")}
    inherited |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PREFECT_PROFILE": "ephemeral"}
    if not before:  # whoever runs the tests may have a database of Prefect's at home
        inherited["PREFECT_HOME"] = str(checkout.root / "prefect")
    done = subprocess.run([*before, sys.executable, "-m", "flows.pipeline"], cwd=checkout.root, timeout=600,
                          env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert checkout.order() == ["sft", "ppo"]


PROXY = "http://127.0.0.1:9"
SOCKS = "socks5://127.0.0.1:9"


@pytest.mark.parametrize("environment", [
    {"http_proxy": PROXY, "HTTPS_PROXY": PROXY, "ALL_PROXY": SOCKS, "all_proxy": SOCKS},
    {"HTTP_PROXY": PROXY, "NO_PROXY": "example.org", "TZ": "Pacific/Kiritimati", "LC_ALL": "C"},
    {"HOME": "/nonexistent/home"},
    {},
], ids=["proxies", "proxy with exceptions", "no such home", "no HOME"])
def test_a_run_in_an_odd_environment(checkout: Checkout, environment: dict[str, str]) -> None:
    run_whole(checkout, **environment)


@pytest.mark.parametrize("name", ["50% a?b [1] $x", "-n  it's so \u00fc\u00e9 \U0001f600", "#a;b&c \\d * \"e\""])
def test_a_run_in_an_odd_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    checkout = Checkout(tmp_path / name)
    done = checkout.command_line()
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.order() == ["sft", "ppo"]


def test_a_run_of_an_account_without_a_name(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As in a container that runs with `--user 12345` and a home that it cannot write."""
    before = ["unshare", "--user", "--map-user=12345", "--"]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o500)
    run_whole(checkout, *before, HOME=str(home))
