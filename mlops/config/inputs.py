"""What stages read from outside the checkout, linked file by file into inputs/<stage>/.

    python -m mlops.config.inputs        # makes the links that params.yaml and its profile ask for, and lists them

dvc.yaml declares inputs/<stage>, so DVC and the key of a checkpoint know these files by their content: another base
model, judge or benchmark file at the same path reruns what reads it. A stage makes its links when it starts, a flow
before its first stage; by hand they are needed after a file was added or removed outside. Of a hub's model the link is
the cache's note of the commit that its name stands for; it is made when the cache has the model.

The links stand two folders deep, inputs/<stage>/<parameter>/<file>. Nothing else is ever removed.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from urllib.parse import quote

from mlops.config.loader import Params, load_params, read_yaml
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic

FOLDER = Path("inputs")
STAGES = ("ingest", "validate", "pretrain", "sft", "evaluate")
KEEP = ".gitignore"  # the one file of a folder that git knows
IGNORE = "# Links to files outside the checkout, made by mlops/config/inputs.py.\n*\n!.gitignore\n"
IGNORED = ("__pycache__", ".git", ".cache")
INGEST_DECLARES = "raw"  # in dvc.yaml, so its files need no links

Linked = tuple[str, Path]  # name below inputs/<stage>/, file


@dataclass(frozen=True)
class Outside:
    """What a parameter names: a path, or where `hub` is set perhaps a model of the hub."""

    parameter: str
    path: str
    hub: bool = False


def outside(stage: str, params: Params, root: Path) -> Iterator[Outside]:
    """All that a stage reads and no stage makes."""
    profile = params.stages
    if stage == "ingest":
        yield from _source_files(params, root)
    elif stage in ("validate", "pretrain"):
        yield Outside("pretrain.base_model", profile.pretrain.base_model, hub=True)
    elif stage == "sft":
        yield Outside("sft.reward_model", profile.sft.reward_model)
    elif stage == "evaluate":
        yield Outside("evaluate.judge_model", profile.evaluate.judge_model, hub=True)
        for section, paths in (("others", profile.evaluate.others), ("task_data", profile.evaluate.task_data)):
            for name, path in sorted(paths.items()):
                yield Outside(f"evaluate.{section}.{quote(name, safe='')}", path)


def tokenizer_of(name: str, folder: Path) -> str:
    """`rules.tokenizer` of a description in `folder`: its path where the folder has it, else the name as it is."""
    return str(folder / name) if name and (folder / name).is_dir() else name


def _source_files(params: Params, root: Path) -> Iterator[Outside]:
    """Files, folders and the tokenizer that the profile's source description names; what is wrong with the description
    is said by the stage."""
    spec = root / "profiles" / "sources" / f"{params.stages.ingest.spec}.yaml"
    if not params.stages.ingest.spec or not spec.is_file():
        return
    content = read_yaml(spec)
    for role, entries in sorted(content.items()):
        for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
            pattern = str(entry.get("files") or "") if isinstance(entry, dict) else ""
            dataset = str(entry.get("dataset") or "") if isinstance(entry, dict) else ""
            names = [pattern] if (spec.parent / pattern).is_file() else glob(pattern, root_dir=spec.parent,
                                                                             recursive=True)
            files = sorted(str(spec.parent / name) for name in names) if pattern else []
            common = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
            for file in files:  # files of one name lie in different folders
                below = os.path.relpath(os.path.dirname(file), common)
                yield Outside(os.path.normpath(f"{role}[{number}].files/{below}"), file)
            if dataset and (spec.parent / dataset).is_dir():
                yield Outside(f"{role}[{number}].dataset", str(spec.parent / dataset))
    rules = content.get("rules")
    tokenizer = str(rules.get("tokenizer") or "") if isinstance(rules, dict) else ""
    yield Outside("rules.tokenizer", tokenizer_of(tokenizer, spec.parent), hub=True)


def linked_files(stage: str, params: Params, root: Path) -> list[Linked]:
    """The links that a stage's folder must hold. Raises UserError for a path that does not exist."""
    links: list[Linked] = []
    for item in outside(stage, params, root):
        if not item.path:
            continue
        target = Path(os.path.abspath(root / item.path))  # an absolute path stays one
        if stage == "ingest" and target.is_relative_to(root / INGEST_DECLARES):
            continue
        if target.is_dir():
            files = (file for file in sorted(target.rglob("*")) if file.is_file())
            links += [(f"{item.parameter}/{name}", file) for file in files
                      if not set((name := file.relative_to(target)).parts) & set(IGNORED)]
        elif target.is_file():
            links.append((f"{item.parameter}/{target.name}", target))
        elif not _may_be_hub_name(item, root):
            hint = " (~ is not expanded)" if item.path.startswith("~") else ""
            raise UserError(f"{item.parameter} = {item.path!r}: no such file or folder{hint}")
        elif (commit := hub_commit(item.path)).is_file():
            links.append((f"{item.parameter}/commit", commit))
    return links


def _may_be_hub_name(item: Outside, root: Path) -> bool:
    """NAME or OWNER/NAME where no folder of the checkout has the owner's name."""
    parts = item.path.split("/")
    return (item.hub and len(parts) < 3 and not item.path.startswith((".", "~", "/"))
            and not (len(parts) == 2 and (root / parts[0]).is_dir()))


def hub_commit(name: str) -> Path:
    """The file in the Hugging Face cache that holds the commit of a hub name's main branch; it may not be there yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"


def link_inputs(stage: str, params: Params, root: Path) -> list[Linked]:
    """Makes inputs/<stage>/ hold exactly the links that the parameters ask for; returns them.

    Raises UserError for a path that does not exist, and for anything in the folder that is no link of this kind: it is
    somebody's, and stays.
    """
    stage = stage.partition("@")[0]
    if stage not in STAGES:
        return []
    folder = root / FOLDER / stage
    wanted = {folder / name: file for name, file in linked_files(stage, params, root)}
    present = _own_links(root, folder)
    if not (folder / KEEP).is_file():
        write_atomic(folder / KEEP, IGNORE.encode())
    for path in sorted(present - wanted.keys()):
        path.unlink()
    for path, file in wanted.items():
        if path.is_symlink() and Path(os.readlink(path)) == file:
            continue
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(file)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    return sorted((str(path.relative_to(root)), file) for path, file in wanted.items())


def link_fetched(stage: str, params: Params, root: Path) -> None:
    """Adds the commits of the hub's models that the stage has fetched. Its work is done and published: what happened to
    other files outside meanwhile does not fail it now."""
    stage = stage.partition("@")[0]
    for item in outside(stage, params, root) if stage in STAGES else ():
        path = root / FOLDER / stage / item.parameter / "commit"
        if (item.path and not (root / item.path).exists() and _may_be_hub_name(item, root)
                and hub_commit(item.path).is_file() and not path.is_symlink()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(hub_commit(item.path))


def _own_links(root: Path, folder: Path) -> set[Path]:
    """The links of earlier calls. Raises UserError where the folder is a link or holds something else."""
    for path in (folder.parent, folder):
        if path.is_symlink():
            raise UserError(f"{path.relative_to(root)}: is a link, not a folder of the checkout: remove the link")
    links = set()
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder).parts
        if path.is_symlink() and len(below) > 1:
            links.add(path)
        elif path.is_symlink() or (not path.is_dir() and below != (KEEP,)):
            raise UserError(f"{path.relative_to(root)}: is no link of mlops.config.inputs; move it: your own files "
                            "belong into raw/")
    return links


def link_all(params: Params, root: Path) -> list[Linked]:
    """Of every stage."""
    return [link for stage in STAGES for link in link_inputs(stage, params, root)]


def not_cached(params: Params, root: Path) -> list[Outside]:
    """Models of the hub whose commit is not known yet."""
    named = {item for stage in STAGES for item in outside(stage, params, root)
             if item.path and not (root / item.path).exists() and _may_be_hub_name(item, root)}
    return sorted((item for item in named if not hub_commit(item.path).is_file()), key=lambda item: item.parameter)


def main() -> None:
    argparse.ArgumentParser(prog="python -m mlops.config.inputs", description=(
        "Links what params.yaml and its profile name outside the checkout into inputs/<stage>/.")).parse_args()
    root = Path.cwd()
    with one_line("inputs"):
        params = load_params()
        links = link_all(params, root)
    for name, file in links:
        print(f"{name} -> {file}")
    waiting = not_cached(params, root)
    for item in waiting:
        print(f"{item.parameter} = {item.path!r}: no such path; taken for a model of the hub that is not cached yet; "
              "the stage that loads it records its commit")
    if not links and not waiting:
        print("inputs: params.yaml and its profile name nothing outside the checkout")


if __name__ == "__main__":
    main()
