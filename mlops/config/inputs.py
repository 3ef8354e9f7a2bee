"""What stages read from outside the checkout, linked file by file into inputs/<stage>/.

    python -m mlops.config.inputs        # makes the links that params.yaml and its profile ask for, and lists them

dvc.yaml declares inputs/<stage>, so DVC and the key of a checkpoint know these files by their content: another base
model, judge or benchmark file at the same path reruns what reads it. A stage makes its links when it starts, a flow
before its first stage; by hand they are needed after a file was added or removed outside. Of a hub's model the link is
the cache's note of the commit that its name stands for.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from mlops.config.loader import Params, load_params, read_yaml
from rlhf.errors import UserError

FOLDER = Path("inputs")
KEEP = ".gitignore"  # the one file of a folder that git knows
IGNORED = ("__pycache__", ".git", ".cache")
IN_TREE = ("raw", "profiles", "data")  # dvc.yaml declares these themselves

Linked = tuple[str, Path]  # name below inputs/<stage>/, file


def outside_paths(stage: str, params: Params, root: Path) -> Iterator[tuple[str, str]]:
    """(parameter, path or hub name) of all that a stage reads and no stage makes."""
    profile = params.stages
    if stage == "ingest":
        yield from _source_files(params, root)
    elif stage in ("validate", "pretrain"):
        yield "pretrain.base_model", profile.pretrain.base_model
    elif stage == "sft":
        yield "sft.reward_model", profile.sft.reward_model
    elif stage == "evaluate":
        yield "evaluate.judge_model", profile.evaluate.judge_model
        for section, paths in (("others", profile.evaluate.others), ("task_data", profile.evaluate.task_data)):
            for name, path in sorted(paths.items()):
                yield f"evaluate.{section}.{name}", path


STAGES = ("ingest", "validate", "pretrain", "sft", "evaluate")


def _source_files(params: Params, root: Path) -> Iterator[tuple[str, str]]:
    """Files, folders and the tokenizer that the profile's source description names; what is wrong with the description
    is said by the stage."""
    spec = root / "profiles" / "sources" / f"{params.stages.ingest.spec}.yaml"
    if not params.stages.ingest.spec or not spec.is_file():
        return
    content = read_yaml(spec)
    for role, entries in sorted(content.items()):
        for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
            files = str(entry.get("files") or "") if isinstance(entry, dict) else ""
            dataset = str(entry.get("dataset") or "") if isinstance(entry, dict) else ""
            for file in sorted(glob(str(spec.parent / files), recursive=True)) if files else []:
                yield f"{role}[{number}].files", file
            if dataset and (spec.parent / dataset).is_dir():
                yield f"{role}[{number}].dataset", str(spec.parent / dataset)
    rules = content.get("rules")
    yield "rules.tokenizer", str(rules.get("tokenizer") or "") if isinstance(rules, dict) else ""


def linked_files(stage: str, params: Params, root: Path) -> list[Linked]:
    """The links that a stage's folder must hold. Raises UserError for a folder that does not exist."""
    links: list[Linked] = []
    for parameter, path in outside_paths(stage, params, root):
        if not path:
            continue
        target = root / path  # an absolute path stays one
        if any(target.resolve().is_relative_to((root / folder).resolve()) for folder in IN_TREE):
            continue
        if target.is_dir():
            files = (file for file in sorted(target.rglob("*")) if file.is_file())
            links += [(f"{parameter}/{name}", file) for file in files
                      if not set((name := file.relative_to(target)).parts) & set(IGNORED)]
        elif target.is_file():
            links.append((f"{parameter}/{target.name}", target))
        elif (commit := hub_commit(path)) is not None:
            links.append((f"{parameter}/commit", commit))
        elif Path(path).is_absolute() or path.startswith((".", "~")):
            raise UserError(f"{parameter} = {path!r}: no such file or folder")
    return links


def hub_commit(name: str) -> Path | None:
    """The file in the Hugging Face cache that holds the commit of a hub name's main branch; None where it is not cached
    and cannot be fetched."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if name.count("/") > 1:
        return None
    ref = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
    if not ref.is_file():
        try:
            hf_hub_download(name, "config.json")
        except (OSError, HfHubHTTPError, HFValidationError, ValueError):
            return None
    return ref if ref.is_file() else None


def link_inputs(stage: str, params: Params, root: Path) -> list[Linked]:
    """Makes inputs/<stage>/ hold exactly the links that the parameters ask for; returns them. Raises UserError."""
    stage = stage.partition("@")[0]
    if stage not in STAGES:
        return []
    folder = root / FOLDER / stage
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {folder / name: Path(os.path.abspath(file)) for name, file in linked_files(stage, params, root)}
    present = {path for path in folder.rglob("*") if path.is_symlink() or path.is_file()} - {folder / KEEP}
    for path in sorted(present - wanted.keys()):
        path.unlink()
    for path, file in wanted.items():
        if path.is_symlink() and Path(os.readlink(path)) == file:
            continue
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(file)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not any(item.is_symlink() for item in path.rglob("*")):
            shutil.rmtree(path)
    return sorted((str(path.relative_to(root)), file) for path, file in wanted.items())


def link_all(params: Params, root: Path) -> list[Linked]:
    """Of every stage."""
    return [link for stage in STAGES for link in link_inputs(stage, params, root)]


def main() -> None:
    try:
        links = link_all(load_params(), Path.cwd())
    except UserError as error:
        print(f"inputs: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, file in links:
        print(f"{name} -> {file}")
    if not links:
        print("inputs: params.yaml and its profile name nothing outside the checkout")


if __name__ == "__main__":
    main()
