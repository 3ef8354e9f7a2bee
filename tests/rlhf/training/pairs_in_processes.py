"""Trains a stage once with each of many sets of options, for test_option_pairs.py.

    python -m tests.rlhf.training.pairs_in_processes '{...}'

The JSON is that of train_in_processes.py with `sets`, a list of parameters, instead of params. Writes for each set the
weights and the journal, or the line that refused it, into a folder of its own.
"""

import json
import sys
from pathlib import Path

import torch

from rlhf.errors import UserError
from rlhf.training import distributed
from tests.rlhf.training.train_in_processes import train


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if task["processes"] > 1:
        distributed.fork(task["processes"])
    for number, params in enumerate(task["sets"]):
        folder = Path(task["folder"]) / str(number)
        if distributed.is_main():
            folder.mkdir()
        distributed.barrier()
        try:
            train(task | {"params": params, "folder": str(folder)})
        except UserError as error:
            lines = distributed.all_gather(str(error))
            assert len(set(lines)) == 1, lines
            if distributed.is_main():
                (folder / "refused.txt").write_text(lines[0])
    distributed.leave()


if __name__ == "__main__":
    main()
