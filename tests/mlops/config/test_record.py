"""A rotten byte in DVC's cache is found before a stage reads it, and the message says how to get rid of it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlops.config import record
from rlhf.errors import UserError

GRAPH = """
stages:
  sft:
    cmd: mkdir -p models/sft/deep metrics && echo weights > models/sft/model.safetensors &&
      echo x > models/sft/deep/a && echo 1 > metrics/sft.csv
    deps: [code.py]
    outs: [models/sft, metrics/sft.csv]
"""


def dvc(root: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    (tmp_path / "code.py").write_text("1")
    dvc(tmp_path, "init", "--no-scm", "-q")
    dvc(tmp_path, "repro", "-q")
    return tmp_path


def rot(root: Path, name: str) -> Path:
    """Another byte in the cache's copy of a file, which DVC then restores without a word."""
    [cached] = [path for path in (root / ".dvc" / "cache" / "files").rglob("*") if path.is_file()
                and path.read_bytes() == (root / name).read_bytes()]
    cached.chmod(0o644)
    cached.write_bytes(b"rotten\n")
    cached.chmod(0o444)  # DVC trusts what is read-only
    out = root / ("models/sft" if name.startswith("models") else name)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    dvc(root, "checkout", "-q")
    assert (root / name).read_bytes() == b"rotten\n"
    return cached


def test_outputs_as_recorded_pass(root: Path) -> None:
    assert set(record.recorded(root)) == {"models/sft", "metrics/sft.csv"}
    record.check(root, ["models/sft", "metrics/sft.csv", "metrics", "models/sft/deep/a", "code.py", "elsewhere"])
    shutil.rmtree(root / ".dvc" / "cache")  # no listing: the folder is hashed as DVC does
    record.check(root, ["models/sft"])


@pytest.mark.parametrize(("name", "out"), [("models/sft/model.safetensors", "models/sft"),
                                           ("models/sft/deep/a", "models/sft"), ("metrics/sft.csv", "metrics/sft.csv")])
def test_a_rotten_byte_is_found_and_the_advice_mends_it(root: Path, name: str, out: str) -> None:
    before = (root / name).read_bytes()
    cached = rot(root, name)
    assert "up to date" in dvc(root, "status")  # DVC does not see it
    with pytest.raises(UserError) as found:
        record.check(root, ["metrics/sft.csv", "models/sft"])
    said = str(found.value)
    assert said.startswith(f"{name}: its bytes are not those that dvc.lock records: ")
    assert "\n" not in said
    removed = re.search(r"DVC's cache is damaged\. Remove (\S+) and (\S+), then run the same command again$", said)
    assert removed
    assert removed[1] == out
    assert root / removed[2] == cached
    cached.unlink()
    shutil.rmtree(root / out) if (root / out).is_dir() else (root / out).unlink()
    dvc(root, "repro", "-q")
    assert (root / name).read_bytes() == before
    record.check(root, ["metrics/sft.csv", "models/sft"])


def test_a_file_that_somebody_changed_is_not_blamed_on_the_cache(root: Path) -> None:
    path = root / "models" / "sft" / "model.safetensors"
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_text("other")
    with pytest.raises(UserError, match=r"it was changed after its stage ended\. `dvc checkout --force models/sft`"):
        record.check(root, ["models/sft"])
    dvc(root, "checkout", "-q", "--force", "models/sft")
    assert path.read_bytes() == before


def test_a_folder_whose_listing_is_lost_is_still_checked(root: Path) -> None:
    (root / "models" / "sft" / "model.safetensors").chmod(0o644)
    (root / "models" / "sft" / "model.safetensors").write_text("other")
    shutil.rmtree(root / ".dvc" / "cache")
    with pytest.raises(UserError, match=r"models/sft: its bytes are not those that dvc\.lock records"):
        record.check(root, ["models/sft"])


def test_a_lock_that_is_no_yaml_is_one_line(root: Path) -> None:
    (root / "dvc.lock").write_text("stages: [}")
    with pytest.raises(UserError, match=r"dvc\.lock: cannot be read: "):
        record.check(root, ["models/sft"])
