"""The command `instructflow`: every name that it shows leads to a module, from any folder of a checkout."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import instructflow
from tests.flows.checkout import REPOSITORY

SOURCE = REPOSITORY / "instructflow.py"


def test_every_command_starts_a_module_that_exists() -> None:
    started = [node.args[0].value for node in ast.walk(ast.parse(SOURCE.read_text()))
               if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "start"
               and isinstance(node.args[0], ast.Constant)]
    assert len(started) == len(instructflow.app.registered_commands)
    for module in started:
        assert importlib.util.find_spec(str(module)), module


def test_help_shows_every_command_with_its_sentence() -> None:
    shown = CliRunner().invoke(instructflow.app, ["--help"]).output
    for command in instructflow.app.registered_commands:
        assert command.callback is not None
        assert f"  {command.callback.__name__} " in shown
        assert command.callback.__doc__


def test_options_become_a_command_line() -> None:
    assert instructflow.options(seed=0, stage_hours=0.0) == ["--seed", "0", "--stage-hours", "0.0"]
    line = instructflow.options(profile="cpu", set=["a=1", "b=2"], seed=None, until="", stage_hours=1.5, force=True)
    assert line == ["--profile", "cpu", "--set", "a=1", "--set", "b=2", "--stage-hours", "1.5", "--force"]


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SOURCE), *arguments], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})


@pytest.mark.parametrize("folder", [".", "docs", "rlhf/ppo"])
def test_it_works_in_the_checkout_that_it_is_called_in(folder: str) -> None:
    done = run(REPOSITORY / folder, "params", "ppo.kl_goal")
    assert done.returncode == 0, done.stderr
    assert "target of the mean" in done.stdout


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "status")
    assert done.returncode == 2
    assert done.stderr.startswith(f"instructflow: {tmp_path} is in no checkout of instructflow")


def test_new_paths_are_those_of_the_folder_it_is_called_in(tmp_path: Path) -> None:
    """`cd docs; instructflow push ../x` wrote beside the checkout's parent."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    target = os.path.relpath(tmp_path / "copy", REPOSITORY / "docs")
    done = run(REPOSITORY / "docs", "push", target, "--model", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / "config.json").is_file()


@pytest.mark.parametrize(("arguments", "said"), [
    (["push", "hub:foo", "--model", "tests"], "tests: no model"),
    (["params", "poo"], "poo: no such section; did you mean ppo?"),
    (["params", "ppo.kl_gaol"], "ppo.kl_gaol: no such parameter; did you mean kl_goal?"),
    (["compare", "checkout"], "name two runs or more"),
    (["compare", "a", "b"], "a: no such run"),
    (["run", "--until", "nothing"], "--until nothing: no such stage; stages: parameters, ingest"),
    (["run", "--profile", "smoke", "--until", "nothing"], "judge, ppo, evaluate, promote"),  # arms are the profile's
    (["check", "--profile", "smoke", "--set", "sft.max_tokens=400"],
     "check: with the changes of this run: pretrain.context = 128: must be >= 400"),
    (["run", "--seed", "-1"], "--seed -1: must be an int >= 0"),
    (["run", "--stage-hours", "0"], "--stage-hours 0: must be a number > 0"),
    (["sweep", "--set", "seed=1,x"], "sweep: seed = 'x': must be an int >= 0"),
    (["sweep", "--set", "ppo.kl_goal=0.5,0.5"], "sweep: ppo.kl_goal = 0.5 stands twice"),
    (["chat", "sft", "--temperature", "-1"], "chat: --temperature -1"),
    (["compare", "smoke"], "name two runs or more"),
    (["compare", ".", "."], "checkout: is named twice; name two different runs"),
    (["label", "nowhere", "--labeler", "ada"], "label: nowhere: is no batch, it has no items.jsonl"),
    (["run", "--set", "kl_goal=1"], "kl_goal: must be SECTION.PARAMETER"),
    (["run", "--set", "ppo.kl_goal"], "must be SECTION.PARAMETER=VALUE"),
    (["sweep", "--set", "ppo.kl_goal=1,-2"], "ppo.kl_goal = -2: must be float > 0"),
    (["push", "somewhere", "--model", "nothing"], "nothing: no model"),
    (["serve", "nothing"], "nothing: no model"),
])
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    done = run(REPOSITORY, *arguments)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr
