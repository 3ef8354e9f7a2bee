"""Ends orphans, what a killed server leaves running: MLflow's first process, for one, leaves a child on its port.

    python -m infra.orphans COMMAND [ARGUMENT ...]    ends it, then becomes COMMAND; supervisord starts servers so

An orphan is known by its environment, where supervisord writes its own address and the program's name; children have
both from their parents. A worker's runs have the worker's name, and outlive it.
"""

import os
import signal
import sys
import time
from pathlib import Path

GRACE_SECONDS = 5.0  # from TERM to KILL: time to answer the last request
KILL_SECONDS = 5.0


def end(supervisor: str, *programs: str) -> list[int]:
    """TERM to every process of these programs but this one, KILL to those that stay; returns those there were."""
    orphans = members(supervisor, *programs)
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        for pid in members(supervisor, *programs):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + seconds
        while (left := members(supervisor, *programs)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not left:
            break
    return orphans


def members(supervisor: str, *programs: str) -> list[int]:
    """The living processes of these programs, this one aside; a zombie has no environment."""
    names = {f"SUPERVISOR_PROCESS_NAME={program}".encode() for program in programs}
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or not ours to read
        if f"SUPERVISOR_SERVER_URL={supervisor}".encode() in environment and names.intersection(environment):
            pids.append(int(path.parent.name))
    return [pid for pid in pids if pid != os.getpid()]


def main() -> None:
    name = os.environ["SUPERVISOR_PROCESS_NAME"]
    if ended := end(os.environ["SUPERVISOR_SERVER_URL"], name):
        print(f"orphans: ended what an earlier {name} had left: {' '.join(map(str, ended))}", flush=True)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
