"""The command that starts an engine. Engines themselves: tests/rlhf/engines/test_vllm.py."""

import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def engine(*arguments: str, path: str = "/usr/bin:/bin", cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "mlops.tools.engine", *arguments], cwd=cwd, capture_output=True,
                          text=True, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "a model").mkdir()
    (tmp_path / "a model" / "config.json").write_text("{}")
    return tmp_path / "a model"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One whose environment for engines has a vllm that prints how it is called."""
    for name in ("params.yaml", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    program = tmp_path / ".venv-engines" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nfor item; do echo "$item"; done; echo "dev mode $VLLM_SERVER_DEV_MODE"\n')
    program.chmod(0o755)
    return tmp_path


def test_it_starts_vllm_with_what_the_connection_needs(model: Path, checkout: Path) -> None:
    done = engine(str(model), "--port", "8123", "--", "--tensor-parallel-size", "2", cwd=checkout)
    assert done.returncode == 0, done.stderr
    said, *arguments = done.stdout.splitlines()
    assert f" vllm serve '{model}' --host 127.0.0.1 --port 8123 " in said
    assert shlex.split(said.removeprefix("engine: "))[-len(arguments) + 1:] == arguments[:-1]  # it can be pasted
    assert "VLLM_SERVER_DEV_MODE=1" in said
    options = dict(itertools.pairwise(arguments))
    assert arguments[:2] == ["serve", str(model)]
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "instructflow"}
    assert json.loads(options["--hf-overrides"]) == {"tie_word_embeddings": False}
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert options["--load-format"] == "dummy"
    assert options["--max-model-len"].isdigit()
    assert arguments[-3:] == ["--tensor-parallel-size", "2", "dev mode 1"]


def test_what_is_missing_is_said_in_one_line(model: Path, tmp_path: Path, checkout: Path) -> None:
    assert engine(str(tmp_path / "none"), cwd=checkout).stderr == (
        f"engine: {tmp_path / 'none'}: no model folder (no config.json)\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert engine(str(model), "--port", port, cwd=checkout).stderr == (
            f"engine: --host 127.0.0.1 --port {port}: Address already in use\n")
    (model / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    assert "a reward model (LlamaForSequenceClassification)" in engine(str(model), cwd=checkout).stderr
    (model / "config.json").write_text("{}")
    (checkout / ".venv-engines" / "bin" / "vllm").unlink()
    done = engine(str(model), cwd=checkout)
    assert (done.returncode, done.stderr) == (2, "engine: no vllm here: make engines\n")
