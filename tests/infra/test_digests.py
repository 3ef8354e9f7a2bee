"""`python -m infra.digests` with a docker of our own, which answers as a registry would."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from infra.digests import OWN, images, main, write
from tests.flows.checkout import REPOSITORY

THIRD = {"chrislusf/seaweedfs:4.48", "heartexlabs/label-studio:1.23.0", "postgres:17.6-bookworm",
         "python:3.11.14-slim-bookworm"}


@pytest.fixture
def infra(tmp_path: Path) -> Path:
    folder = tmp_path / "infra"
    shutil.copytree(REPOSITORY / "infra", folder, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    return folder


def docker(folder: Path, script: str) -> None:
    program = folder / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_all_images_of_registries_are_found(infra: Path) -> None:
    assert {tag for tag in images(infra) if not tag.startswith("registry.example.com/")} == THIRD
    assert not set(OWN) & images(infra).keys()


def test_each_image_gets_its_own_digest(infra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    docker(tmp_path, 'printf "sha256:%s\\n" "$(printf %s "$4" | sha256sum | cut -d" " -f1)"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["digests"])
    main(infra)
    written = "".join(path.read_text() for path in infra.rglob("*") if path.suffix in (".yaml", "") and path.is_file())
    for tag in THIRD:
        assert set(re.findall(rf"{re.escape(tag)}(\S*)", written)) != {""}, tag
        assert images(infra)[tag], tag
    assert "registry.example.com/instructflow:cuda is an example" in capsys.readouterr().err
    before = {path: path.read_text() for path in infra.rglob("*.yaml")}
    main(infra)  # again: nothing changes
    assert before == {path: path.read_text() for path in infra.rglob("*.yaml")}
    for path in before:
        list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize(("script", "said"), [
    ("echo 'ERROR: no such host' >&2; exit 1", "digests: chrislusf/seaweedfs:4.48: ERROR: no such host"),
    ("echo hello", "digests: chrislusf/seaweedfs:4.48: hello"),
    ("exit 0", "digests: chrislusf/seaweedfs:4.48: no answer")])
def test_without_an_answer_nothing_is_written(infra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str,
                                              said: str) -> None:
    docker(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["digests"])
    before = (infra / "Dockerfile").read_text()
    with pytest.raises(SystemExit, match=re.escape(said)):
        main(infra)
    assert (infra / "Dockerfile").read_text() == before


def test_images_without_a_digest_are_named(infra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(infra, {tag: f"sha256:{'0' * 64}" for tag in images(infra) if tag != "postgres:17.6-bookworm"})
    monkeypatch.setattr(sys, "argv", ["digests", "--check"])
    with pytest.raises(SystemExit, match=r"^digests: without a digest: postgres:17\.6-bookworm$"):
        main(infra)
    write(infra, {"postgres:17.6-bookworm": f"sha256:{'0' * 64}"})
    main(infra)
