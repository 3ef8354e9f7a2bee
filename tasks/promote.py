"""Registers policy and reward model, decides by the gates whether they become the champion, writes the model card.

    python -m tasks.promote

The version is always the challenger. A failed gate leaves the champion where it is and says by how much it was missed;
metrics/promote.json has the decision, models/promoted the policy with its card (without a pass, only the card). The
policy is that of the arm that the profile's promote.arm names.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mlops.config.paths import JUDGE, POLICIES, PROMPTS, RM
from mlops.release.gates import Gate, against_champion, gates
from mlops.release.model_card import model_card
from mlops.tracking.revision import revision
from mlops.tracking.upload_record import data_version, run_name_of
from rlhf.errors import UserError
from rlhf.files import hash_paths, write_atomic, write_json
from rlhf.params import Profile
from rlhf.world.gold import gold_labeler
from tasks.stage import Stage, run_stage

PROMOTED = "models/promoted"
DATASETS = ("sft", "rm", "ppo")


def promote(stage: Stage) -> None:
    """Registers, compares with the champion, decides."""
    params = stage.params.stages.promote
    metrics = json.loads(Path("metrics/evaluate.json").read_text(encoding="utf-8"))
    profile = stage.params.stages
    found = gates(metrics, profile.arms[profile.promoted].kl_goal, params)
    judged = any(gate.name.startswith("win rate") for gate in found)
    version = ""
    if params.registry:
        version = register(stage, found)
    missed = [gate for gate in found if not gate.passed]
    reasons = [gate.text() for gate in missed]
    if params.judged and not judged:
        reasons.insert(0, "no independent judge: only the reward model that PPO was trained on preferred anything; set "
                          "evaluate.judge and evaluate.judge_model, a judge.share, or promote.judged to false")
    passed = not reasons
    if version and passed:
        crown(stage, version)
    card = model_card(stage.root, metrics, found, reasons)
    folder = stage.scratch / "promoted"
    shutil.rmtree(folder, ignore_errors=True)
    if passed:
        shutil.copytree(policy_of(profile), folder)
    write_atomic(folder / "README.md", card.encode())
    stage.publish("promoted", PROMOTED)
    for gate in found:
        print(f"promote: {'passed' if gate.passed else 'FAILED'}: {gate.text()}", flush=True)
    what = f"version {version} of {params.registry}-policy" if version else "the policy"
    praise = "is the champion" if version else "passes every gate; there is no registry to promote it in"
    print(f"promote: {what} {praise if passed else 'is not promoted: ' + '; '.join(reasons)}", flush=True)
    stage.finish({"promote/passed": float(passed), "promote/gates": len(found), "promote/missed": len(reasons),
                  "gates": {f"{number:02d} {gate.name}": gate.record() for number, gate in enumerate(found, 1)},
                  "reasons": reasons}, [f"{PROMOTED}/README.md"])


def policy_of(profile: Profile) -> Path:
    """The folder of the arm that the gates and the registry take."""
    return POLICIES / profile.promoted


def register(stage: Stage, found: list[Gate]) -> str:
    """Registers both models, makes them the challenger, adds the gate against the champion; the policy's version."""
    from mlops.release.registry import (  # mlflow: seconds that a decision alone need not wait
        CHALLENGER,
        CONTENT_TAG,
        Registry,
    )

    registry = Registry(stage.params.stages.promote.registry, stage.root)
    run = {"run_name": os.environ.get("INSTRUCTFLOW_RUN_NAME", ""), "profile": stage.params.profile}
    folders = {"policy": policy_of(stage.params.stages), "rm": RM}
    content = {kind: hash_paths([folder], folder) for kind, folder in folders.items()}
    champion = registry.champion()
    numbers = {}
    for kind, folder in folders.items():
        made = registry.register(kind, folder, content[kind], run_name_of(run, stage.root), lineage(stage, run))
        registry.set_alias(kind, CHALLENGER, made.version)
        numbers[kind] = str(made.version)
    write_json(stage.scratch / "versions.json", numbers)
    if champion and champion.tags.get(CONTENT_TAG) != content["policy"]:
        from rlhf.model.chat_format import ChatFormatError  # transformers: seconds, which the comparison needs anyway

        folder = registry.folder_of(champion, stage.scratch / "champion")
        try:
            low = win_rate_low(stage.params.stages, stage.params.seed, folder)
        except ChatFormatError as error:
            raise UserError(f"the champion, {champion.name} version {champion.version}, cannot answer the held-out "
                            f"prompts: {error}; promote.registry may name another registry") from None
        found.append(against_champion(low, stage.params.stages.promote))
    return numbers["policy"]


def crown(stage: Stage, version: str) -> None:
    """The alias champion goes to the new versions of policy and reward model."""
    from mlops.release.registry import CHAMPION, Registry

    registry = Registry(stage.params.stages.promote.registry, stage.root)
    numbers = json.loads((stage.scratch / "versions.json").read_text())
    assert numbers["policy"] == version
    for kind, number in sorted(numbers.items(), reverse=True):  # the reward model first: it serves nobody
        registry.set_alias(kind, CHAMPION, number)


def win_rate_low(profile: Profile, seed: int, champion: Path) -> float:
    """Low end of the interval of the policy's win rate against the champion, on the held-out prompts."""
    from rlhf.evaluation.generate import answer
    from rlhf.evaluation.held_out import HeldOut, held_out_rows, judge_of
    from rlhf.evaluation.statistics import (
        with_interval,  # torch: seconds that a decision without a champion need not wait
    )

    params = profile.evaluate
    held_out = HeldOut(held_out_rows(PROMPTS, params.prompts, seed), gold_labeler(seed))
    texts = [answer(folder, RM, held_out.prompts, params, seed).texts for folder in (policy_of(profile), champion)]
    judge, _ = judge_of(params, held_out.labeler, RM, JUDGE)
    values = judge(held_out.prompts, *texts)
    return with_interval("win", values, params.bootstrap, seed)["win_low"]


def lineage(stage: Stage, run: dict[str, Any]) -> dict[str, str]:
    """Where a version comes from: commit, dvc.lock, datasets, parameters."""
    tags = {"profile": run["profile"], "arm": stage.params.stages.promoted, "seed": str(stage.params.seed),
            "run_name": run_name_of(run, stage.root), "data_version": data_version(stage.root)}
    lock = stage.root / "dvc.lock"
    if lock.is_file():
        tags["dvc_lock_sha256"] = hash_paths([lock], stage.root)
    for name in DATASETS:
        with (stage.root / "data" / f"{name}.jsonl").open("rb") as handle:
            tags[f"data_{name}_md5"] = hashlib.file_digest(handle, "md5").hexdigest()  # DVC's name for it
    return tags | revision(stage.root)


if __name__ == "__main__":
    run_stage("promote", promote)
