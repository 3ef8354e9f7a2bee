"""Profiles for GPUs on a CPU: the whole flow with promote, a tiny model of their base's kind, comparisons of a file.

    pytest -m slow tests/flows/test_gpu_profiles.py      some four minutes a profile
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlops.config.loader import load_profile
from tests.flows.checkout import REPOSITORY, copy_to
from tests.tiny_model import write_model, write_pairs

PROFILES = sorted(path.stem for path in (REPOSITORY / "profiles").glob("gpu*.yaml"))
SIZES: dict[str, dict[str, object]] = {  # what makes a profile tiny; its options stay as they are
    "sft": {"max_tokens": 96, "batch_size": 16}, "rm": {"max_tokens": 96, "batch_size": 16},
    "ppo": {"episodes": 256, "batch_size": 64, "minibatch_size": 32, "rollout_batch_size": 32, "warmup_iterations": 1,
            "value_warmup_iterations": 1, "max_prompt_tokens": 48, "max_new_tokens": 16, "lr": 1e-3},
    "evaluate": {"prompts": 100, "max_new_tokens": 16, "tax_tasks": "[]", "other_tasks": "[]"},
    "promote": {"kl_band": 100000, "min_win_rate": 0, "max_toxic": 1}, "judge": {"share": 0.5},
    "ingest": {"source": "files", "spec": "team"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_for_gpus_runs_from_rows_to_promote(name: str, tmp_path: Path) -> None:
    root = copy_to(tmp_path / "instructflow")
    model = write_model(tmp_path / "model", "qwen2")
    pairs = write_pairs(tmp_path / "pairs.csv", 1000)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root),
                    "PREFECT_HOME": str(tmp_path / "prefect"), "INSTRUCTFLOW_UPLOADER": "off"}

    def command(*arguments: str) -> str:
        done = subprocess.run(["instructflow", *arguments], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    command("init", "team", "--model", str(model), "--pairs", str(pairs))
    # under another name: one that begins with gpu is refused without a GPU
    (root / "profiles" / f"cards-{name}.yaml").write_text((root / "profiles" / f"{name}.yaml").read_text())
    profile = load_profile(root / "profiles" / f"{name}.yaml")
    values = {f"{section}.{key}": value for section, keys in SIZES.items() for key, value in keys.items()}
    values |= {f"{section}.processes": 2 for section in ("sft", "rm", "ppo", "evaluate")
               if getattr(profile, section).processes > 1} | {"pretrain.base_model": str(model)}
    command("run", "--profile", f"cards-{name}", *(part for key, value in values.items()
                                                   for part in ("--set", f"{key}={value}")))
    workspace, = (root / "scratch" / "workspaces").iterdir()
    promoted = json.loads((workspace / "metrics" / "promote.json").read_text())
    assert promoted["promote/passed"] == 1
    assert (workspace / "models" / "promoted" / "model.safetensors").is_file()
