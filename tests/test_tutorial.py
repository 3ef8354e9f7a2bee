"""docs/tutorial.md: its commands, taken from the text, work on a model and comparisons as people have them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.flows.checkout import REPOSITORY, copy_to
from tests.printed import missing_links, missing_paths
from tests.tiny_model import write_model, write_pairs

TEXT = (REPOSITORY / "docs" / "tutorial.md").read_text(encoding="utf-8")
INSTALL = ("git clone", "cd ", "make setup", ". .venv")  # what the test does in its own way


def blocks(kind: str) -> list[str]:
    """The commands in the page's fenced blocks of that kind."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [line for name, block in found if name == kind for line in block.splitlines()]


def test_from_clone_to_comparison_in_eight_commands() -> None:
    commands = blocks("")
    assert commands[:2] == ["git clone https://example.org/instructflow", "cd instructflow"]
    last = next(number for number, line in enumerate(commands) if line.startswith("instructflow compare"))
    assert sum(line != "cd instructflow" for line in commands[:last + 1]) <= 8


def checkout(folder: Path) -> Path:
    """A clone as `git clone` makes it, with the files as they are now."""
    copy_to(folder)
    for command in (["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.mark.tutorial
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_command_of_the_page(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "my-model", kind)
    write_pairs(tmp_path / "pairs.csv", 1000)
    root = checkout(tmp_path / "instructflow")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root),
                    "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_PROFILE": "ephemeral"}
    said = {}
    for command in blocks(""):
        if command.startswith(INSTALL):
            continue
        done = subprocess.run(["bash", "-c", command], cwd=root, env=environment, capture_output=True, text=True,
                              timeout=1800)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said[command] = done.stdout
        told = done.stderr if "instructflow chat" in command else done.stdout + done.stderr  # not a model's own words
        missing = missing_paths(told, root, *root.glob("scratch/workspaces/*"))
        assert not missing, f"{command}: {missing}\n{done.stdout}\n{done.stderr}"
    nexts = [command for command in said if re.match(r"instructflow (init|check|sweep|compare|run|status)", command)]
    for command in nexts:  # each ends in a sentence that says what to do next
        assert "Next: " in said[command].splitlines()[-1], f"{command}\n{said[command][-500:]}"
    compared = next(text for command, text in said.items() if command.startswith("instructflow compare"))
    assert re.search(r"win rate against SFT +│ \d", compared), compared
    assert not missing_links(root / "reports" / "compare.html")
    workspaces = sorted((root / "scratch" / "workspaces").glob("team,*"))
    assert len(workspaces) == 2
    for workspace in workspaces:
        what_the_readme_names_is_there(workspace)
    assert (tmp_path / "my-policy" / "model.safetensors").is_file()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True).stdout
    assert changed.split() == ["??", "profiles/sources/team.yaml", "??", "profiles/team.yaml"]  # else it is as it was
    serves(blocks("background")[0], root, environment)


def what_the_readme_names_is_there(folder: Path) -> None:
    """Each path of its table "What to open", and each page that those pages link."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## What to open"):].partition("\n\nA policy")[0]
    names = [name for name in re.findall(r"`([\w*./]+)`", table) if "/" in name]
    assert len(names) >= 4
    for name in names:
        assert list(folder.glob(name)), f"{folder}: {name}"
    for page in ("report.html", "data_docs/index.html"):
        assert not missing_links(folder / "reports" / page)


def serves(command: str, root: Path, environment: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(["bash", "-c", f"exec {command.replace('8000', str(port))}"], cwd=root, env=environment,
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", headers={"Content-Type": "application/json"},
        data=b'{"dataframe_records": [{"prompt": "Where does the cat live?"}]}')
    try:
        while True:
            assert process.poll() is None, process.stdout and process.stdout.read()
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    assert b'"predictions"' in reply.read()
                return
            except urllib.error.URLError:
                time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.tutorial
def test_every_cell_of_the_notebook(tmp_path: Path) -> None:
    """The notebook's code, cell after cell, as Jupyter runs it."""
    root = checkout(tmp_path / "instructflow")
    cells = json.loads((root / "docs" / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(root), "PREFECT_HOME": str(tmp_path / "prefect"), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", f"{code}\nprint(len(journals), len(tax), plt.get_fignums())"],
                          cwd=root / "docs", env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2 3 [1, 2]"
