"""What would stop a run is said in one line before anything starts."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.environment import private_notes
from flows.preflight import check_checkout, check_server
from flows.summary import Summary
from rlhf.errors import UserError
from tests.flows.checkout import Checkout
from tests.infra.test_doctor import closed_port, guarded  # noqa: F401


@pytest.mark.parametrize("name", ["a{b", "a}b", "a\nb"])
def test_a_path_that_dvc_cannot_work_in(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"^'.*': DVC cannot work in a folder whose path has '.*': rename or move it$"):
        check_checkout(Checkout(tmp_path / name).root)


def test_a_path_with_both_kinds_of_quotes(tmp_path: Path) -> None:
    for name in ("it's", 'a"b'):
        (tmp_path / name).mkdir()
        check_checkout(Checkout(tmp_path / name).root)
    (tmp_path / "it's" / 'a"b').mkdir()
    with pytest.raises(UserError, match="MLflow cannot make its database in a folder whose path has both kinds"):
        check_checkout(Checkout(tmp_path / "it's" / 'a"b').root)


@pytest.mark.parametrize("name", ["scratch", "models", ".dvc/tmp", "inputs"])
def test_a_file_in_the_place_of_a_folder(checkout: Checkout, name: str) -> None:
    checkout.write(name, "somebody's")
    with pytest.raises(UserError, match=f"{name}: is a file, and a run needs a folder"):
        check_checkout(checkout.root)


def test_a_link_that_leads_nowhere(checkout: Checkout) -> None:
    (checkout.root / "models").symlink_to("/not/mounted")
    with pytest.raises(UserError, match="models: is a link to /not/mounted, which is not there"):
        check_checkout(checkout.root)


def test_a_folder_of_another_account(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout.root / "metrics").mkdir()
    monkeypatch.setattr("flows.preflight.os.access", lambda path, mode: path.name != "metrics")
    with pytest.raises(UserError, match=f"metrics: cannot be written by user {os.getuid()}"):
        check_checkout(checkout.root)


def test_a_source_archive_and_both_remedies(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout.root
    checkout.write(".dvc/config", "[core]\n    analytics = false\n")
    with pytest.raises(UserError, match="no git repository") as refused:
        check_checkout(root)
    git, no_scm = str(refused.value).split("`")[1::2]
    for name, value in {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
                        "GIT_COMMITTER_EMAIL": "a@b", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
                        }.items():
        monkeypatch.setenv(name, value)
    subprocess.run(no_scm, shell=True, cwd=root, check=True, capture_output=True)
    check_checkout(root)
    checkout.write(".dvc/config.local", "")
    subprocess.run(git, shell=True, cwd=root, check=True, capture_output=True)
    check_checkout(root)


def test_a_command_s_line_and_code(checkout: Checkout) -> None:
    checkout.write("scratch", "somebody's")
    done = checkout.command_line()
    assert (done.returncode, done.stderr.splitlines()) == (
        2, [f"{checkout.root}/scratch: is a file, and a run needs a folder of that name: move the file away"])


def test_a_server_that_is_away(checkout: Checkout, closed_port: int,  # noqa: F811
                               monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{closed_port}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        with pytest.raises(UserError, match=f"^PREFECT_API_URL = {url}: no Prefect server answers there"):
            asyncio.run(check_server())
        done = checkout.command_line()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"PREFECT_API_URL = {url}: no Prefect server")
    assert "Traceback" not in done.stderr
    assert checkout.order() == []


def test_a_server_that_does_not_know_the_login(guarded: str) -> None:  # noqa: F811
    with temporary_settings({PREFECT_API_URL: f"{guarded}/api"}), pytest.raises(
            UserError, match="the server answers 401; set PREFECT_API_AUTH_STRING"):
        asyncio.run(check_server())


def test_what_dvc_remembers_is_kept_where_only_its_owner_may_write(checkout: Checkout,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    folder = checkout.root / ".dvc" / "tmp" / "site-cache"
    folder.mkdir(parents=True, mode=0o777)
    assert isinstance(checkout.run(), Summary)
    assert list(folder.rglob("cache.db"))
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", "/somewhere/else")
    assert private_notes(checkout.root) == {}
