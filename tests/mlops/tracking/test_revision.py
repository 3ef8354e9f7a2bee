"""The commit of a checkout, or why there is none."""

import os
import subprocess
from pathlib import Path

import pytest

from mlops.tracking.revision import revision


def repository(root: Path) -> str:
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*me, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True).strip()


def test_the_commit(tmp_path: Path) -> None:
    commit = repository(tmp_path)
    assert revision(tmp_path) == {"git_commit": commit}


def test_a_folder_of_another_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = repository(tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True)
    assert "dubious ownership" in done.stderr
    assert revision(tmp_path) == {"git_commit": commit}


def test_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in revision(tmp_path)["git_commit_unknown"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert revision(tmp_path) == {"git_commit_unknown": "no commit yet"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision(tmp_path) == {"git_commit_unknown": f"git: {os.strerror(2)}"}
