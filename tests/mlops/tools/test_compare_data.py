"""The report between two versions of the data, and what DVC does with a remote that lost or changed a file."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlops.tools.compare_data import Version, compare, length_distance, main, read_version, total_variation
from mlops.tools.pull import main as main_pull
from rlhf.data.schema import write_rows
from rlhf.errors import UserError

DVC = [sys.executable, "-m", "dvc"]


def sft(number: int, prompt: str = "what?", completion: str = "that.", use_case: str = "chat") -> dict[str, Any]:
    return {"prompt_id": f"sft-{number}", "user_id": f"u{number}", "source": "labeler", "split": "train",
            "use_case": use_case, "prompt": prompt, "completion": completion}


def rm(number: int, ranks: list[int]) -> dict[str, Any]:
    row = sft(number)
    del row["completion"]
    return {**row, "completions": [f"answer {index}" for index in range(len(ranks))], "ranks": ranks}


def version(path: Path, rows: list[dict[str, Any]]) -> Version:
    write_rows(path, rows)
    return read_version(path)


def test_rows_are_matched_by_prompt_id_whatever_their_order(tmp_path: Path) -> None:
    old = version(tmp_path / "old.jsonl", [sft(1), sft(2), sft(3), sft(4)])
    new = version(tmp_path / "new.jsonl", [sft(5), sft(4), sft(2, completion="other."), sft(1)])
    found = compare(old, new)
    assert (found.rows_old, found.rows_new, found.added, found.removed, found.changed) == (4, 4, 1, 1, 1)
    same = compare(old, version(tmp_path / "same.jsonl", [sft(4), sft(3), sft(2), sft(1)]))
    assert (same.added, same.removed, same.changed) == (0, 0, 0)
    assert set(same.drift.values()) == {0}


def test_distances_by_hand() -> None:
    assert total_variation(Counter(a=3, b=1), Counter(a=1, c=1)) == pytest.approx((0.25 + 0.25 + 0.5) / 2)
    assert length_distance([1, 2, 3, 4], [3, 4, 5, 6]) == pytest.approx(0.5)  # at 2: half of the old, none of the new
    assert length_distance([], []) == 0
    assert length_distance([1], []) == 1


def test_drift_of_use_cases_ranks_and_k(tmp_path: Path) -> None:
    found = compare(version(tmp_path / "a.jsonl", [rm(1, [1, 2, 3, 4]), rm(2, [1, 1, 2, 3])]),
                    version(tmp_path / "b.jsonl", [rm(1, [1, 2, 3, 4]), rm(2, [1, 2, 3, 4, 5])]))
    # ranks 1 2 3 4 5 are 3/8 2/8 2/8 1/8 0 of the old completions and 2/9 2/9 2/9 2/9 1/9 of the new
    rank = (3 / 8 - 2 / 9 + 2 * (2 / 8 - 2 / 9) + 2 / 9 - 1 / 8 + 1 / 9) / 2
    assert found.drift == {"completion_chars": 0, "k": 0.5, "prompt_chars": 0, "rank": round(rank, 6), "use_case": 0}


def test_a_folder_that_is_no_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 2: prompt_id sft-1 appears a second time"):
        version(tmp_path / "twice.jsonl", [sft(1), sft(1)])
    with pytest.raises(UserError, match=r"row 1: no prompt_id"):
        version(tmp_path / "none.jsonl", [{"prompt": "?"}])


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "true", "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t.t",
                   "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t.t", "HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=600)


def good(*command: str, cwd: Path) -> None:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with two committed versions of data/ in a remote that verifies: tags v1 and v2."""
    place = tmp_path_factory.mktemp("versions")
    repo = place / "repo"
    repo.mkdir()
    good("git", "init", "-q", cwd=repo)
    good(*DVC, "init", "-q", cwd=repo)
    good(*DVC, "remote", "add", "-q", "-d", "store", str(place / "store"), cwd=repo)
    good(*DVC, "remote", "modify", "-q", "store", "verify", "true", cwd=repo)
    for tag, rows in (("v1", [sft(1), sft(2)]), ("v2", [sft(1), sft(2, completion="newer"), sft(3, use_case="other")])):
        write_rows(repo / "data" / "sft.jsonl", rows)
        good(*DVC, "add", "-q", "data", cwd=repo)
        good(*DVC, "push", "-q", cwd=repo)
        good("git", "add", "-A", cwd=repo)
        good("git", "commit", "-qm", tag, cwd=repo)
        good("git", "tag", tag, cwd=repo)
    return place


@pytest.fixture
def repo(pushed: Path, tmp_path: Path) -> Path:
    """A copy of the repository whose remote a test may damage."""
    shutil.copytree(pushed, tmp_path / "place")
    good(*DVC, "remote", "modify", "-q", "store", "url", str(tmp_path / "place" / "store"), cwd=tmp_path / "place/repo")
    return tmp_path / "place" / "repo"


@pytest.fixture
def inside(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("INSTRUCTFLOW_UPLOADER", "off")
    return repo


def test_two_revisions_are_compared_on_the_command_line(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(inside / ".dvc" / "cache")  # so that both come from the remote
    main(["v1", "v2"])
    said = capsys.readouterr().out
    assert "2 → 3" in said
    assert "use_case 0.333*" in said
    report = json.loads((inside / "reports/data_versions/versions.json").read_text())
    assert report["datasets"]["sft"] == {
        "rows_old": 2, "rows_new": 3, "added": 1, "removed": 0, "changed": 1,
        "drift": {"completion_chars": 0.0, "prompt_chars": 0.0, "use_case": 0.333333}}
    assert (inside / "reports/data_versions/versions.png").stat().st_size > 10_000
    main(["v1"])  # against the checkout's data/, which is v2
    assert json.loads((inside / "reports/data_versions/versions.json").read_text())["datasets"] == report["datasets"]


@pytest.mark.parametrize(("version", "message"), [
    ("v9", "v9: neither a folder nor a git revision"),
    ("v1", "v1: its data is neither in DVC's cache nor in its remote"),
])
def test_a_version_that_cannot_be_read_is_one_line(inside: Path, capsys: pytest.CaptureFixture[str], version: str,
                                                   message: str) -> None:
    shutil.rmtree(inside / ".dvc" / "cache")
    shutil.rmtree(inside.parent / "store")
    with pytest.raises(SystemExit) as stop:
        main([version, "data"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("compare_data: " + message)
    assert said.count("\n") == 1


def test_the_report_is_a_run_in_mlflow(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("INSTRUCTFLOW_UPLOADER")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main(["v1", "v2"])
    client = MlflowClient(f"sqlite:///{inside}/mlflow.db")
    experiment = client.get_experiment_by_name("instructflow")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert [item.info.run_name for item in found] == ["data v1..v2"]
    assert found[0].data.metrics["data/sft_added"] == 1
    assert found[0].data.metrics["data/sft_drift_use_case"] == pytest.approx(0.333333)
    files = {item.path for item in client.list_artifacts(found[0].info.run_id)}
    assert files == {"versions.json", "versions.png"}


@pytest.mark.parametrize(("damage", "verify"), [("corrupted", "true"), ("corrupted", "false"), ("missing", "true")])
def test_a_pull_from_a_damaged_remote_says_so_and_changes_nothing(repo: Path, damage: str, verify: str,
                                                                  monkeypatch: pytest.MonkeyPatch,
                                                                  capfd: pytest.CaptureFixture[str]) -> None:
    """Data and cache are at v1; the remote's object of v2's sft.jsonl is damaged; data.dvc asks for v2."""
    good(*DVC, "remote", "modify", "-q", "store", "verify", verify, cwd=repo)
    good("git", "commit", "-qam", "remote", cwd=repo)
    good("git", "tag", "-f", "v2", cwd=repo)
    wanted = (repo / "data" / "sft.jsonl").read_bytes()
    good("git", "checkout", "-q", "v1", cwd=repo)
    good(*DVC, "checkout", "-q", cwd=repo)
    before = (repo / "data" / "sft.jsonl").read_bytes()
    assert before != wanted
    objects = [path for path in (repo.parent / "store").rglob("*") if path.is_file() and path.read_bytes() == wanted]
    assert len(objects) == 1
    (repo / ".dvc" / "cache" / objects[0].relative_to(repo.parent / "store")).unlink()
    objects[0].chmod(0o644)
    if damage == "missing":
        objects[0].unlink()
    else:
        objects[0].write_bytes(wanted[:-2] + b"!\n")
    good("git", "checkout", "-q", "v2", cwd=repo)
    monkeypatch.chdir(repo)
    with pytest.raises(SystemExit) as stop:
        main_pull(["data.dvc"])
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith("pull: data/sft.jsonl (")
    assert "nothing was changed" in said
    assert said.count("\n") == 1
    assert (repo / "data" / "sft.jsonl").read_bytes() == before
    objects[0].write_bytes(wanted)  # repaired, the same command brings the new version
    main_pull(["data.dvc"])
    assert (repo / "data" / "sft.jsonl").read_bytes() == wanted
