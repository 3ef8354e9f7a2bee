"""What dvc.yaml declares, stage by stage, with arms and rounds unrolled as DVC does it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlops.config.loader import ONE_ARM, PARAMS_FILE, read_yaml
from rlhf.errors import UserError
from rlhf.files import write_atomic

PIN = "data.dvc"  # not in dvc.yaml: the import that pins what ingest makes
OF_A_ROUND = "round_"  # how the names of a round's stages begin


def declared_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The pipeline's stages in their order, ppo@arm for each arm, then those of each round, named stage@round.

    Raises UserError.
    """
    path = root / "dvc.yaml"
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        over = {name: stage["foreach"] for name, stage in declared.items() if "foreach" in stage}
        templates = {name: stage["do"] if name in over else stage for name, stage in declared.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no stages found: {' '.join(str(error).split())}") from None
    top = read_yaml(root / PARAMS_FILE) if over else {}
    arms = top.get("arms") or list(ONE_ARM)
    plain = {"promoted": top.get("promoted", arms[0]), "profile": top.get("profile", "")}
    found: dict[str, dict[str, Any]] = {}
    for name, stage in templates.items():
        if name not in over:
            found[name] = _filled(stage, plain)
        elif over[name] == "${arms}":
            found |= {f"{name}@{arm}": _filled(stage, plain | {"item": arm}) for arm in arms}
    for key, item in (top.get("rounds") or {}).items():
        names = plain | {"key": key, **{f"item.{field}": value for field, value in item.items()}}
        found |= {f"{name}@{key}": _filled(templates[name], names) for name in over if over[name] == "${rounds}"}
    return found


def pipeline_stages(root: Path) -> list[str]:
    """The stages of the pipeline in order, and data.dvc after ingest, whose output it pins."""
    stages = [name for name in declared_stages(root) if not name.startswith(OF_A_ROUND)]
    if "ingest" in stages:
        stages.insert(stages.index("ingest") + 1, PIN)
    return stages


def unrolled(count: int) -> dict[str, dict[str, Any]]:
    """params.yaml's `rounds`: each starts from what the one before has made, the first from SFT."""
    found = {}
    for number in range(1, count + 1):
        before = f"models/rounds/r{number - 1}"
        first = number == 1
        found[f"r{number}"] = {
            "number": number, "policy": "models/sft" if first else f"{before}/ppo",
            "reward_model": "models/sft" if first else f"{before}/rm",
            "ensemble": "models/sft" if first else f"{before}/ensemble",
            "rows": "data/rm.jsonl" if first else f"feedback/r{number - 1}/rm.jsonl"}
    return found


def write_rounds(root: Path, count: int) -> None:
    """Writes that many rounds into params.yaml, whose other lines stay as they are."""
    path = root / PARAMS_FILE
    if read_yaml(path).get("rounds") == unrolled(count):
        return
    kept = re.sub(r"(?ms)^rounds:.*?(?=^\S|\Z)", "", path.read_text(encoding="utf-8")).rstrip("\n")
    text = yaml.safe_dump({"rounds": unrolled(count)}, sort_keys=False)
    write_atomic(path, f"{kept}\n{text}".encode())


def paths(entries: Iterable[str | Mapping[str, Any]]) -> list[str]:
    """Of a stage's deps, outs or metrics, with or without options."""
    return [entry if isinstance(entry, str) else str(next(iter(entry))) for entry in entries]


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """`value` with the placeholders ${NAME} of `names` filled in its texts; others stay."""
    if isinstance(value, str):
        return re.sub(r"\$\{([\w.]+)\}", lambda found: str(names.get(found[1], found[0])), value)
    if isinstance(value, list):
        return [_filled(item, names) for item in value]
    if isinstance(value, dict):
        return {_filled(name, names): _filled(item, names) for name, item in value.items()}
    return value
