"""Starts the processes of a stage that trains in several: forks on a CPU, torchrun's on GPUs and on several machines.

    INSTRUCTFLOW_TORCHRUN="--nnodes=2 --node-rank=0 --master-addr=first --master-port=29400"   rank 1 on the second, ...
    python -m tasks.launch        on every machine but the first: joins each stage that the first one starts

The machines share the checkout's folder. What the others need to know stands in scratch/launch.json.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.files import write_json

NOTE = Path("scratch/launch.json")
VARIABLE = "INSTRUCTFLOW_TORCHRUN"
LOOK_SECONDS = 0.5


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def needs_torchrun() -> bool:
    """Whether several processes here are torchrun's: on GPUs, which a fork cannot use, and on several machines."""
    return VARIABLE in os.environ or shutil.which("nvidia-smi") is not None


def count(processes: int) -> int:
    """How many processes a parameter `processes` means here: 0 is one for each GPU, or one."""
    if processes:
        return processes
    import torch

    return max(1, torch.cuda.device_count())


def torchrun(module: str, arguments: Sequence[str], processes: int, name: str) -> None:
    """Runs `python -m module arguments` in `processes` processes on each machine.

    Raises SystemExit with the exit code of the process that failed first.
    """
    run_id = f"{name}-{time.time_ns()}"
    if VARIABLE in os.environ:
        write_json(NOTE, {"id": run_id, "module": module, "arguments": list(arguments), "processes": processes})
    _launch(run_id, module, arguments, processes)


def _launch(run_id: str, module: str, arguments: Sequence[str], processes: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    more = shlex.split(os.environ[VARIABLE]) if VARIABLE in os.environ else ["--standalone"]
    try:
        config, command, rest = config_from_args(parse_args(
            [*more, f"--rdzv-id={run_id}", f"--nproc-per-node={processes}", "--module", module, *arguments]))
    except SystemExit:
        raise UserError(f"{VARIABLE} = {os.environ.get(VARIABLE)!r}: not what torchrun takes") from None
    try:
        elastic_launch(config, command)(*rest)
    except ChildFailedError as error:
        failed = min(error.failures.values(), key=lambda failure: failure.timestamp)
        raise SystemExit(failed.exitcode if failed.exitcode > 0 else 128 - failed.exitcode) from None
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None


def follow() -> None:
    """Joins one launch of the first machine after the other, until it is interrupted."""
    if VARIABLE not in os.environ:
        raise UserError(f"{VARIABLE} is not set: it says where the first machine is (docs/operations.md)")
    done = ""
    while True:
        note: dict[str, Any] = json.loads(NOTE.read_text(encoding="utf-8")) if NOTE.exists() else {}
        if not note or note["id"] == done:
            time.sleep(LOOK_SECONDS)
            continue
        done = note["id"]
        print(f"joins {done}", flush=True)
        try:
            _launch(done, note["module"], note["arguments"], note["processes"])
        except SystemExit as ended:
            print(f"{done}: ended with {ended.code}; waits for the next", file=sys.stderr, flush=True)
            if ended.code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                raise


if __name__ == "__main__":
    try:
        follow()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
