"""Copies a policy to a folder from which a vLLM server for PPO's rollouts can start (docs/operations.md).

    python -m mlops.tools.vllm_copy models/sft FOLDER

The copy unties the output layer from the embeddings: only then does vLLM load updated weights correctly.
"""

import argparse
from pathlib import Path

from rlhf.errors import UserError, one_line


def vllm_copy(model: Path, folder: Path) -> None:
    """Writes the copy. Raises UserError where `model` is no model folder, or `folder` is not empty."""
    from rlhf.model.load import load_policy, save_model
    from rlhf.model.tokenizer import load_tokenizer

    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no model folder (no config.json)")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty; name a new folder")
    save_model(load_policy(model), load_tokenizer(model), folder, untie=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.tools.vllm_copy",
                                     description="Copies a policy to a folder from which vLLM can start.")
    parser.add_argument("model", type=Path, help="the policy's folder")
    parser.add_argument("folder", type=Path, help="a new folder")
    options = parser.parse_args()
    with one_line("vllm_copy"):
        vllm_copy(options.model, options.folder)


if __name__ == "__main__":
    main()
