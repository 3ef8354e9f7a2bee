"""Copies a trained policy to a folder, or uploads it to the Hugging Face hub.

    python -m mlops.tools.push FOLDER                 # a new folder
    python -m mlops.tools.push hub:OWNER/NAME         # the hub, with the login of `hf auth login` or HF_TOKEN; private
"""

import argparse
from pathlib import Path

from mlops import from_caller, program
from mlops.tools.runs import policy_folder
from rlhf.errors import UserError, first_line, one_line
from rlhf.files import publish

PROMOTED = Path("models/promoted")
HUB = "hub:"


def model_folder(root: Path, wanted: str) -> Path:
    """The promoted policy, an arm's, RUN:MODEL of a workspace, or a folder. Raises UserError."""
    if wanted in ("", "promoted"):
        if not (root / PROMOTED / "config.json").is_file():
            raise UserError("no policy is promoted: models/promoted has no weights; name another with --model, e.g. an "
                            "arm")
        return root / PROMOTED
    folder = policy_folder(root, wanted)
    if folder is None:
        raise UserError(f"{wanted}: no model; name an arm of PPO, RUN:MODEL of a workspace, or a folder")
    return folder


def to_folder(source: Path, target: Path) -> None:
    """Copies the model, all or nothing. Raises UserError where the target exists."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    publish(source, target)


def to_hub(source: Path, name: str, public: bool) -> str:
    """Uploads the model; returns its address. Raises UserError for what the hub refuses."""
    from huggingface_hub import HfApi

    if len(name.split("/")) != 2:
        raise UserError(f"hub:{name}: must be hub:OWNER/NAME")
    try:
        api = HfApi()
        repository = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=source, commit_message="instructflow push")
    except Exception as error:  # the hub's, its validation's or the connection's
        raise UserError(f"hub:{name}: {first_line(error)}; is the hub reachable, and are you logged in "
                        "(`hf auth login`)?") from None
    return str(repository)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.push"), description=(
        "Copies a policy to a new folder, or uploads it to the Hugging Face hub."))
    parser.add_argument("target", help="a new folder, or hub:OWNER/NAME")
    parser.add_argument("--model", default="", help=(
        "an arm of PPO, RUN:MODEL of a workspace, or a folder; without: the promoted policy"))
    parser.add_argument("--public", action="store_true", help="a new repository of the hub is public, not private")
    options = parser.parse_args()
    with one_line("push"):
        source = model_folder(Path.cwd(), options.model)
        if not (source / "README.md").is_file():
            print(f"push: {source} has no model card: only the promoted policy has one")
        if options.target.startswith(HUB):
            print(to_hub(source, options.target.removeprefix(HUB), options.public))
        else:
            target = from_caller(Path(options.target))
            to_folder(source, target)
            size = sum(path.stat().st_size for path in target.rglob("*"))
            print(f"{options.target}: {size / 1e6:,.1f} MB, a Hugging Face folder (from {source})")


if __name__ == "__main__":
    main()
