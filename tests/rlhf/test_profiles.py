"""Every profile that is not run whole elsewhere: its parameters train on tiny data, sizes and processes aside."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlops.config.loader import load_profile
from rlhf.data.schema import write_rows
from rlhf.params import Profile
from rlhf.ppo.run import train_ppo
from rlhf.reward_model import train_reward_model
from rlhf.sft import sft
from rlhf.training.journal import read_journal
from rlhf.world.corpus import documents
from rlhf.world.datasets import ppo_rows, rm_rows, sft_rows
from rlhf.world.facts import World
from rlhf.world.tax import TASKS
from tests.rlhf.conftest import ARCHITECTURES

PROFILES = Path(__file__).parents[2] / "profiles"
SCALE = 0.003


def tiny(profile: Profile) -> dict[str, Any]:
    """A profile's SFT, reward-model and PPO parameters with small lengths and batches, in one process."""
    one: dict[str, Any] = {"processes": 1, "shard": False, "precision": "fp32", "lora_base": "fp32"}
    arm = profile.arms[profile.promoted]
    ratio = arm.batch_size // arm.minibatch_size
    return {"sft": replace(profile.sft, **one, max_tokens=96, batch_size=8, epochs=min(1, profile.sft.epochs)),
            "rm": replace(profile.rm, **one, max_tokens=96, max_prompts=16, epochs=1),
            "ppo": replace(arm, **one, batch_size=8 * ratio, minibatch_size=8, micro_batch_size=4, episodes=16 * ratio,
                           rollout_batch_size=16, max_prompt_tokens=64, max_new_tokens=6, kl_limit=0.0,
                           value_warmup_iterations=min(1, arm.value_warmup_iterations))}


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_a_profile_trains_on_tiny_data(name: str, model_folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    world, params = World(1), tiny(load_profile(PROFILES / f"{name}.yaml"))
    rows = {key: list(writer(world, SCALE)) for key, writer in (("sft", sft_rows), ("rm", rm_rows), ("ppo", ppo_rows))}
    corpus = tmp_path / "corpus.jsonl"
    write_rows(corpus, ({"text": text} for text in documents(world, 300, {**{task: set() for task in TASKS},
                                                                         "forum": set()})))
    base = model_folders["qwen2" if "x80" in name else ARCHITECTURES[0]][0]  # as the profile's own base
    metrics = sft(params["sft"], rows["sft"], base, 1, tmp_path / "sft", corpus=corpus)
    demonstrations = [row for row in rows["sft"] if row["split"] == "valid"]
    _, more = train_reward_model(params["rm"], rows["rm"], demonstrations, tmp_path / "sft" / "model", 1,
                                 tmp_path / "rm")
    prompts = [row["prompt"] for row in rows["ppo"] if row["split"] == "train"]
    train_ppo(params["ppo"], prompts, tmp_path / "sft" / "model", tmp_path / "rm" / "model", 1, tmp_path / "ppo",
              corpus=corpus)
    journal = read_journal(tmp_path / "ppo" / "journal.csv")
    assert len(journal) == 2
    assert (float(journal[-1]["ppo/ptx_loss"]) > 0) == (params["ppo"].ptx_coef > 0)
    assert (metrics["sft/valid_loss"] == metrics["sft/valid_loss_base"]) == (params["sft"].epochs == 0)
    assert more["rm/train_prompts"] > 0
    assert (tmp_path / "ppo" / "model" / "config.json").is_file()
