"""`--show N` of sft, rm and ppo: what training makes of a dataset's first rows, as JSON Lines."""

import json
import os
import sys
from itertools import islice
from pathlib import Path

from rlhf.data.schema import read_rows
from rlhf.errors import UserError
from rlhf.model.chat_format import ChatFormatError, load_codec
from rlhf.model.show import shown


def show_rows(dataset: str, folder: str, count: int, all_answers: bool = False) -> None:
    """Prints the first rows of data/<dataset>.jsonl in the chat format of a model folder. Raises UserError.

    `all_answers`: the loss is on earlier answers of a conversation too.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no model yet; run `dvc repro {Path(folder).name}`")
    try:
        codec = load_codec(folder)
        for number, row in enumerate(islice(read_rows(Path(f"data/{dataset}.jsonl")), count), start=1):
            texts = row.get("completions", [row["completion"]] if "completion" in row else [])
            for item in shown(codec, row["prompt"], texts, all_answers):
                print(json.dumps({"row": number} | item, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ChatFormatError as error:
        raise UserError(f"{folder}: {error}") from None
