"""Copies a policy into a folder that a vLLM server for PPO's rollouts can be started on (docs/operations.md).

    python -m mlops.tools.vllm_copy models/sft FOLDER

The copy has an output layer of its own where the policy shares it with the embeddings: only so does vLLM take new
weights over right.
"""

import argparse
import sys
from pathlib import Path

from rlhf.errors import UserError


def vllm_copy(model: Path, folder: Path) -> None:
    """Raises UserError where `model` is no model folder, or `folder` holds something already."""
    from rlhf.model.load import load_policy, save_model
    from rlhf.model.tokenizer import load_tokenizer

    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no model folder (it has no config.json)")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty; name a new folder")
    save_model(load_policy(model), load_tokenizer(model), folder, untie=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    try:
        vllm_copy(given.model, given.folder)
    except UserError as error:
        print(f"vllm_copy: {error}", file=sys.stderr)
        raise SystemExit(2) from None
