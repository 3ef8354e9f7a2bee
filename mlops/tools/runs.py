"""The runs of a checkout by name: the checkout itself, and its workspaces, where runs with other parameters work."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlops.config.loader import PARAMS_FILE, load_params, read_yaml
from mlops.config.paths import MODELS, PARAMETERS, POLICIES
from rlhf.errors import UserError

WORKSPACES = Path("scratch/workspaces")
CHECKOUT = "checkout"  # the name of the run in the checkout itself
MADE_WITH = {"evaluate": "reports/report.html", "promote": "models/promoted"}  # what git does not have


@dataclass(frozen=True)
class Run:
    """A folder that a run works in. `name`: the workspace's, or CHECKOUT."""

    name: str
    folder: Path

    def parameters(self) -> dict[str, Any]:
        """section.name → value of what was run (build/parameters.yaml), seed and data version among them."""
        path = self.folder / PARAMETERS
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = {f"{section}.{name}": value for section, values in sections.items() if section not in ("arms", "source")
                 for name, value in values.items()}
        found |= {f"arms.{arm}.{name}": value for arm, values in (sections.get("arms") or {}).items()
                  for name, value in values.items() if value != sections["ppo"].get(name)}
        top = read_yaml(self.folder / PARAMS_FILE)
        return {"profile": top.get("profile"), "seed": top.get("seed"), "data": data_version(self.folder), **found}

    def metrics(self, name: str) -> dict[str, Any]:
        """The content of metrics/NAME.json; empty where this run has not made it: git has that of the reference run."""
        made = self.folder / MADE_WITH[name]
        return read_json(self.folder / "metrics" / f"{name}.json") if made.exists() and self.arms() else {}

    def arms(self) -> list[str]:
        """Its policies that have been trained, in the profile's order."""
        return [arm for arm in load_params(self.folder).stages.arms
                if (self.folder / POLICIES / arm / "config.json").is_file()]

    def label(self, arm: str) -> str:
        """The arm's name in tables of several runs."""
        return f"{self.name} · {arm}" if len(self.arms()) > 1 else self.name


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def data_version(folder: Path) -> str:
    """The hash of the datasets that data.dvc pins; empty where it pins none."""
    path = folder / "data.dvc"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(((content or {}).get("outs") or [{}])[0].get("md5", ""))[:8]


def runs_of(root: Path) -> list[Run]:
    """The checkout, then its workspaces by name."""
    folders = sorted(path.parent for path in (root / WORKSPACES).glob(f"*/{PARAMS_FILE}"))
    return [Run(CHECKOUT, root), *(Run(folder.name, folder) for folder in folders)]


def find_run(root: Path, wanted: str) -> Run:
    """The run of that name, or whose name alone contains it, or a folder. Raises UserError."""
    runs = runs_of(root)
    if wanted == ".":
        return runs[0]
    exact = [run for run in runs if run.name == wanted]
    if exact:
        return exact[0]
    if (Path(wanted) / PARAMS_FILE).is_file():
        folder = Path(wanted).resolve()
        return next((run for run in runs if run.folder.resolve() == folder), Run(wanted, folder))
    close = [run for run in runs if wanted in run.name.split(",")] or [run for run in runs if wanted in run.name]
    if len(close) == 1:
        return close[0]
    names = ", ".join(run.name for run in close or runs)
    raise UserError(f"{wanted}: {'several runs are called so' if close else 'no such run'}: {names}")


def policy_folder(root: Path, wanted: str) -> Path | None:
    """The model folder that RUN:MODEL, an arm of the checkout or a path names; MODEL is an arm, base or sft. None where
    there is none. Raises UserError for an unknown run."""
    run, colon, name = wanted.rpartition(":")
    if colon and not Path(wanted).exists():
        folders = [find_run(root, run).folder / MODELS.get(name, POLICIES / name)]
    else:
        folders = [root / POLICIES / wanted, Path(wanted)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def newest_policy(root: Path) -> tuple[Run, str] | None:
    """The run and the arm of the policy that was trained last; None where there is none."""
    found = [((run.folder / POLICIES / arm / "config.json").stat().st_mtime, run, arm)
             for run in runs_of(root) for arm in run.arms()]
    return max(found, key=lambda item: item[0])[1:] if found else None


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Parameter → its value in each run, where they differ; what no run measured with, the registry, is left out."""
    every: list[Mapping[str, Any]] = [run.parameters() for run in runs]
    names = dict.fromkeys(name for values in every for name in values)
    rows = {name: [values.get(name) for values in every] for name in names if name != "promote.registry"}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}
