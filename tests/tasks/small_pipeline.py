"""A small pipeline of real stages, each a process as DVC starts it."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from mlops.config import inputs
from mlops.config.paths import POLICIES, POLICY_METRICS, metrics_of

Undisturbed = dict[str, dict[str, str]]  # stage: {output: MD5} of a run that nothing interrupts
REPO = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft", "rm", "judge", "ppo")
PROFILE = """
ingest: {scale: 0.01, corpus_documents: 1200, tax_items: 10}
validate: {}
pretrain: {vocab_size: 400, n_layer: 1, n_head: 2, n_embd: 32, steps: 120, warmup_steps: 5}
sft: {epochs: 8, batch_size: 8, dropout: 0.1}
rm: {max_prompts: 120, max_valid_prompts: 40, batch_size: 4, epochs: 3, processes: 2}
ppo: {episodes: 320, batch_size: 16, minibatch_size: 8, ptx_coef: 0.5, ptx_batch_size: 4, ema_decay: 0.9,
      samples_per_prompt: 2, max_new_tokens: 12}
evaluate: {prompts: 20, tax_items: 10, bootstrap: 100, best_of: 4, best_of_prompts: 10}
promote: {}
"""


def named(stage: str) -> str:
    """A stage's name for DVC: the only arm's for PPO."""
    return "ppo@ppo" if stage == "ppo" else stage


class SmallPipeline:
    """A checkout of links to the code, with small data and models, where single stages run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("rlhf", "mlops", "tasks", "dvc.yaml", "raw"):
            (root / name).symlink_to(REPO / name)
        for stage in inputs.STAGES:
            (root / inputs.FOLDER / stage).mkdir(parents=True)
        (root / "profiles" / "sources").mkdir(parents=True)
        (root / "profiles" / "benchmarks").symlink_to(REPO / "profiles" / "benchmarks")
        (root / "profiles" / "mini.yaml").write_text(PROFILE)
        (root / "params.yaml").write_text("seed: 1\nprofile: mini\n")
        outside = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        self.environment = {**outside, "INSTRUCTFLOW_UPLOADER": "off", "INSTRUCTFLOW_CHECKPOINT_SECONDS": "0",
                            "OMP_NUM_THREADS": "1"}

    def start(self, stage: str, *flags: str) -> "subprocess.Popen[str]":
        """Starts a stage; an arm of PPO is named by flags, and may be left out where there is one."""
        return subprocess.Popen([sys.executable, "-m", f"tasks.{stage}", *flags], cwd=self.root, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def finish(self, stage: str, *flags: str) -> str:
        process = self.start(stage, *flags)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out

    def files(self, stage: str) -> dict[str, str]:
        """MD5 of each output."""
        folder, metrics = (POLICIES / "ppo", POLICY_METRICS) if stage == "ppo" else (Path("models") / stage,
                                                                                     Path("metrics"))
        paths = [*(self.root / folder).rglob("*"), *(self.root / metrics).glob(f"{stage}*")]
        return {str(path.relative_to(self.root)): hashlib.md5(path.read_bytes()).hexdigest()
                for path in sorted(paths) if path.is_file()}

    def steps(self, stage: str) -> int:
        """Steps of a finished run, by its journal."""
        return len((self.root / f"{metrics_of(named(stage))}.csv").read_text().splitlines()) - 1

    def saved_step(self, stage: str) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return max((int(path.stem.removeprefix("step-"))
                    for path in self.root.glob(f"scratch/{named(stage)}/*/checkpoints/step-*.json")), default=0)

    def wait_for_step(self, stage: str, step: int, process: "subprocess.Popen[str]") -> None:
        """Returns when the checkpoint of `step` is saved or the process has ended."""
        while self.saved_step(stage) < step and process.poll() is None:
            time.sleep(0.02)
