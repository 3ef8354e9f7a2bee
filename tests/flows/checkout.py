"""A checkout whose stages are shell scripts: what the flows' tests run the pipeline in."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_API_URL

from flows.pipeline import pipeline

REPOSITORY = Path(__file__).parents[2]
SFT_AND_PPO = """
  sft:
    cmd: echo sft >> order.log && sh sft.sh
    deps: [sft.sh]
    outs: [models/sft]
  ppo:
    cmd: echo ppo >> order.log && cp models/sft models/ppo
    deps: [models/sft]
    outs: [models/ppo]
"""
INGEST = """
  ingest:
    cmd: echo ingest >> order.log && mkdir -p build/data && echo $INSTRUCTFLOW_RUN_NAME > build/data/run_name
    outs: [build/data]
"""
FILES = {
    ".dvc/config": "[core]\n    no_scm = true\n    analytics = false\n",
    "params.yaml": "# the seed\nseed: 1\nprofile: small  # which\n",
    "profiles/small.yaml": "ingest: {}\n",
    "profiles/large.yaml": "ingest: {}\n",
    "data.dvc": "deps:\n- path: build/data\nouts:\n- path: data\n",
    "dvc.yaml": "stages:" + SFT_AND_PPO,
    "sft.sh": "mkdir -p models metrics; echo 1 > models/sft; echo '{\"sft/valid_loss\": 0.5}' > metrics/sft.json\n",
}


def copy_to(root: Path) -> Path:
    """The files of this checkout that git knows, as a repository of its own."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, check=True,
                           capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Checkout:
    """A checkout of shell stages. `run()` runs the flow there and returns its summary or its error."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, content in FILES.items():
            self.write(name, content)

    def write(self, name: str, content: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    async def start(self, profile: str | None = None, **parameters: Any) -> Any:
        state = await pipeline(profile=profile, **parameters, root=self.root, return_state=True)
        return await state.aresult(raise_on_failure=False)

    def run(self, profile: str | None = None, **parameters: Any) -> Any:
        return asyncio.run(self.start(profile, **parameters))

    def git(self) -> None:
        """Makes it a git repository with everything committed."""
        self.write(".gitignore", "/scratch/\n/models/\n/data\n/build/\norder.log\n/raw/*\n")
        me = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "-A"], [*me, "commit", "-qm", "a"]):
            subprocess.run(["git", *command], cwd=self.root, check=True)

    def command_line(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start_command_line(*arguments)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start_command_line(self, *arguments: str, server: bool = True) -> "subprocess.Popen[str]":
        """Without `server` it starts one of its own, whose database is in the checkout."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": str(PREFECT_API_URL.value())}
        if not server:
            del environment["PREFECT_API_URL"]
            environment |= {"PREFECT_HOME": str(self.root / "prefect"), "PREFECT_PROFILE": "ephemeral"}
        return subprocess.Popen([sys.executable, "-m", "flows.pipeline", *arguments], cwd=self.root, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def order(self) -> list[str]:
        """The stages that ran, in order."""
        log = self.root / "order.log"
        return log.read_text().split() if log.exists() else []
