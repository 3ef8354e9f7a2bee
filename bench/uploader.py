"""What the MLflow mirror costs a training: the SFT stage with it and without it, in turn, in a copy of a finished line.

    python bench/uploader.py [PAIRS]     in the checkout of a finished line; about two minutes a pair

Prints each run's seconds and the ratio of the medians (stage process from start to end, imports included).
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = ("rlhf", "tasks", "profiles", "params.yaml", "dvc.yaml", "data.dvc")


def run(copy: Path, mirror: bool) -> float:
    """Seconds of one SFT from scratch."""
    environment = {**os.environ, "INSTRUCTFLOW_RUN_NAME": "bench"} | ({} if mirror else {"INSTRUCTFLOW_UPLOADER": "off"})
    before = time.monotonic()
    subprocess.run([sys.executable, "-m", "tasks.sft", "--fresh"], cwd=copy, env=environment, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - before


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in CODE:
            (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, copy / name)
        (copy / "data").symlink_to(Path("data").resolve())
        (copy / "models").mkdir()
        (copy / "models" / "pretrain").symlink_to(Path("models/pretrain").resolve())
        for pair in range(pairs):
            for mirror in ((True, False) if pair % 2 else (False, True)):
                seconds[mirror].append(run(copy, mirror))
                print(f"mirror {'on' if mirror else 'off'}: {seconds[mirror][-1]:.1f} s", flush=True)
                time.sleep(25 if mirror else 0)  # the mirror ends 20 s after its last news
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    print(f"with / without: {ratio:.3f}")


if __name__ == "__main__":
    main()
