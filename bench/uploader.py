"""What the MLflow uploader costs a training: the SFT stage with it and without it, in turn, in a copied checkout.

    python bench/uploader.py [PAIRS]     in the checkout of a finished run; about two minutes a pair

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

CODE = ("rlhf", "mlops", "tasks", "profiles", "params.yaml", "dvc.yaml", "data.dvc")


def run(checkout: Path, uploader: bool) -> float:
    """Seconds of one SFT from scratch."""
    environment = {**os.environ, "INSTRUCTFLOW_RUN_NAME": "bench"}
    if not uploader:
        environment["INSTRUCTFLOW_UPLOADER"] = "off"
    before = time.monotonic()
    subprocess.run([sys.executable, "-m", "tasks.sft", "--fresh"], cwd=checkout, env=environment, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - before


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        for name in CODE:
            (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, checkout / name)
        (checkout / "data").symlink_to(Path("data").resolve())
        (checkout / "models").mkdir()
        (checkout / "models" / "pretrain").symlink_to(Path("models/pretrain").resolve())
        for pair in range(pairs):
            for uploader in ((True, False) if pair % 2 else (False, True)):
                seconds[uploader].append(run(checkout, uploader))
                print(f"uploader {'on' if uploader else 'off'}: {seconds[uploader][-1]:.1f} s", flush=True)
                time.sleep(25 if uploader else 0)  # the uploader ends 20 s after its last news
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    print(f"with / without: {ratio:.3f}")


if __name__ == "__main__":
    main()
