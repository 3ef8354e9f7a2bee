"""Workspaces: copies of the checkout with other parameters, for a changed run, a sweep's point, a second run at once.

A workspace is scratch/workspaces/<what is changed>. It shares DVC's cache with the checkout, so that stages which have
run with the same inputs are checked out, and MLflow's store, so that runs can be compared. The checkout stays as it is,
and a workspace never promotes: the registry is the checkout's.
"""

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlops.config.arms import write_arms
from mlops.config.loader import (
    ONE_ARM,
    PARAMS_FILE,
    PROFILES_DIR,
    as_yaml,
    check_values,
    load_params,
    load_profile,
    read_yaml,
)
from mlops.config.stage_graph import unrolled
from mlops.tracking.own_store import own_store
from mlops.tracking.uploader import end_run_cut_short
from rlhf.errors import UserError
from rlhf.files import write_atomic
from rlhf.params import Profile

FOLDER = Path("scratch/workspaces")
WORKSPACE_OF = Path("scratch/workspace-of.json")  # in a workspace: its checkout, the files that came from there
LABELS = "feedback/"  # what people say of a run's models belongs to that run
LONGEST_NAME = 120  # of a workspace, without the hash of a longer one
OWN = ("dvc.lock", "data.dvc", "metrics/")  # written by a run: a workspace that has run keeps its own


@dataclass(frozen=True)
class Changes:
    """What a run changes of the checkout's parameters. `stages`: section (or arms.NAME) → name → value.

    `label` names them where their values would make no name.
    """

    profile: str | None = None
    seed: int | None = None
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str = ""
    rounds: int = 0  # alternating rounds to unroll; 0: those of the checkout's params.yaml

    def name(self, root: Path) -> str:
        """The same changes have the same name, others another: cpu, cpu,seed=2,kl_goal=1.5, cpu,sft.epochs=3."""
        parts = [self.profile or load_params(root).profile]
        parts += [] if self.seed is None else [f"seed={self.seed}"]
        parts += [f"rounds={self.rounds}"] if self.rounds else []
        short = "rounds" if self.rounds else "ppo"  # whose parameters are named without their section
        parts += [self.label] if self.label else [
            f"{'' if section == short else f'{section}.'}{name}={value}" for section in sorted(self.stages)
            for name, value in sorted(self.stages[section].items())]
        exact = ",".join(parts)
        plain = re.sub(r"[^\w.,=+-]", "_", exact)[:LONGEST_NAME]
        return plain if plain == exact else f"{plain}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"

    def __bool__(self) -> bool:
        return self.seed is not None or any(self.stages.values()) or self.rounds > 0


def changed_by(assignments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"ppo.kl_goal": 1, "arms.ppo_ptx.lr": 1e-4} as `Changes.stages`. Raises UserError for a parameter that does not
    exist, and a value out of range."""
    stages: dict[str, dict[str, Any]] = {}
    for key, value in assignments.items():
        section, _, name = key.rpartition(".")
        if not section:
            raise UserError(f"{key}: must be SECTION.PARAMETER, e.g. ppo.kl_goal")
        stages.setdefault(section, {})[name] = value
    for section, values in stages.items():
        check_values(section, values, Path("--set"))
    return stages


def checkout_of(root: Path) -> Path:
    """The checkout that the workspace `root` belongs to; `root` itself where it is none."""
    try:
        return Path(json.loads((root / WORKSPACE_OF).read_text(encoding="utf-8"))["checkout"])
    except FileNotFoundError:
        return root


def tracking_of(root: Path) -> dict[str, str]:
    """The environment by which a workspace's stages write to the checkout's MLflow store."""
    checkout = checkout_of(root)
    if checkout == root or os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    return {"MLFLOW_TRACKING_URI": own_store(checkout)}


def end_runs_cut_short(root: Path, environment: Mapping[str, str] | None = None) -> None:
    """Lets MLflow say KILLED of the runs of this checkout that were killed with all their processes, in whichever
    workspace; `environment`: of the uploaders, beside this process's own."""
    checkout = checkout_of(root)
    for folder in (checkout, *sorted((checkout / FOLDER).glob("*/"))):
        if folder != root:
            end_run_cut_short(folder, {**tracking_of(folder), **(environment or {})})


def fill_workspace(root: Path, workspace: Path, changes: Changes) -> None:
    """Makes `workspace` the checkout `root` as it is now, with `changes`. What the workspace has produced stays.

    Raises UserError: no git, parameters that cannot be used.
    """
    names = _files_of(root)
    earlier = json.loads((workspace / WORKSPACE_OF).read_text())["files"] if (workspace / WORKSPACE_OF).exists() else []
    for name in sorted(set(earlier) - set(names)):
        (workspace / name).unlink(missing_ok=True)
    changed = {PARAMS_FILE, _profile_of(root, changes)}  # written as a whole below: another run may read them now
    for name in names:
        target = workspace / name
        if name in changed and target.exists():
            continue
        if target.exists() and (name.startswith(OWN) or target.read_bytes() == (root / name).read_bytes()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target)
    _link_raw(root, workspace)
    _share_cache(root, workspace)
    _apply(root, workspace, changes)
    write_atomic(workspace / WORKSPACE_OF, json.dumps({"checkout": str(root), "files": names}).encode())
    load_params(workspace)


def _files_of(root: Path) -> list[str]:
    """What git knows of the checkout, and new files that it does not ignore."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True)
    if listing.returncode:
        raise UserError(f"{root}: a run with other parameters works in a copy of the files that git knows, and git "
                        f"says: {listing.stderr.decode(errors='replace').strip()}")
    return sorted(name for name in listing.stdout.decode().split("\0")
                  if name and not name.startswith(LABELS) and (root / name).is_file())


def _link_raw(root: Path, workspace: Path) -> None:
    """Your own data in raw/, which git ignores: linked, for it may be large."""
    for path in sorted((root / "raw").rglob("*")):
        target = workspace / path.relative_to(root)
        if path.is_dir() or (target.exists() and target.stat().st_mtime_ns == path.stat().st_mtime_ns):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another disk
            shutil.copy2(path, target)


def _share_cache(root: Path, workspace: Path) -> None:
    dvc = Path(sys.executable).with_name("dvc")
    cache = subprocess.run([str(dvc), "cache", "dir"], cwd=root, capture_output=True, text=True)
    if cache.returncode:
        raise UserError(f"{root}: dvc cache dir: {cache.stderr.strip()}")
    config = configparser.ConfigParser(interpolation=None)
    config.read(root / ".dvc" / "config.local", encoding="utf-8")
    for section, name, value in (("cache", "dir", cache.stdout.strip()), ("core", "no_scm", "true")):
        if not config.has_section(section):
            config.add_section(section)
        config.set(section, name, value)
    with (workspace / ".dvc" / "config.local").open("w", encoding="utf-8") as file:
        config.write(file)


def _profile_of(root: Path, changes: Changes) -> str:
    """The profile's file, from the checkout."""
    return f"{PROFILES_DIR}/{changes.profile or read_yaml(root / PARAMS_FILE).get('profile')}.yaml"


def _apply(root: Path, workspace: Path, changes: Changes) -> None:
    """Writes the checkout's params.yaml and profile with the changes into the workspace."""
    top = dict(read_yaml(root / PARAMS_FILE))
    top |= {name: value for name, value in (("profile", changes.profile), ("seed", changes.seed)) if value is not None}
    if changes.rounds:
        top["rounds"] = unrolled(changes.rounds)
    source, path = (folder / PROFILES_DIR / f"{top['profile']}.yaml" for folder in (root, workspace))
    sections = changed_profile(read_yaml(source), changes, source)
    found = load_changed(source, sections)
    for name in ("arms", "promoted"):
        top.pop(name, None)
    arms = f"arms: {as_yaml(list(found.arms))}\npromoted: {found.promoted}\n"  # at once: another run may read them now
    for target, content, more in ((path, sections, ""), (workspace / PARAMS_FILE, top, arms)):
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True) + more
        if target.read_text(encoding="utf-8") != text:
            write_atomic(target, text.encode())
    write_arms(workspace)


def load_changed(path: Path, sections: Mapping[str, Any]) -> Profile:
    """The profile in `path` with other sections. Raises UserError, which names the file only where that is at fault."""
    try:
        return load_profile(path, sections)
    except UserError as error:
        load_profile(path)
        raise UserError(f"with the changes of this run: {str(error).removeprefix(f'{path}: ')}") from None


def changed_profile(profile: Mapping[str, Any], changes: Changes, path: Path) -> dict[str, Any]:
    """The sections of the profile in `path` with the changes, and without a registry: no workspace promotes. Raises
    UserError for an arm that the profile does not have."""
    sections = dict(profile)
    given = {section: values for section, values in changes.stages.items() if not section.startswith("arms.")}
    given["promote"] = {**given.get("promote", {}), "registry": ""}
    for section, values in given.items():
        sections[section] = {**(sections.get(section) or {}), **values}
    _change_arms(sections, changes.stages.get("ppo", {}))
    for section, values in changes.stages.items():
        if arm := section.removeprefix("arms.") if section.startswith("arms.") else "":
            arms = sections.get("arms") or dict(ONE_ARM)
            if arm not in arms:
                raise UserError(f"{section}: no arm {arm}; arms of {path.name}: {', '.join(arms)}")
            sections["arms"] = {**arms, arm: {**(arms[arm] or {}), **values}}
    return sections


def _change_arms(sections: dict[str, Any], ppo: Mapping[str, Any]) -> None:
    """A changed PPO parameter holds for every arm, also for one that names it; of arms that are then equal, one stays:
    the first, which is promoted in the place of another."""
    if not ppo or not isinstance(arms := sections.get("arms"), Mapping):
        return
    kept: dict[str, dict[str, Any]] = {}
    standing = {}
    for arm, values in arms.items():
        own = {name: value for name, value in (values or {}).items() if name not in ppo}
        standing[arm] = next((other for other in kept if kept[other] == own), arm)
        kept.setdefault(standing[arm], own)
    sections["arms"] = kept
    if promoted := sections["promote"].get("arm"):
        sections["promote"]["arm"] = standing.get(promoted, promoted)
