"""Time of validation: the three full embedded datasets, and time per row from 10,000 to 500,000 rows.

    python bench/validate.py full | rows [COUNT ...]      # writes only to a temporary folder

`full`: `python -m tasks.validate --data`, including imports and Data Docs. `rows`: COUNT rows, a quarter rankings and
the rest prompts, through the same checks in one process after a warm-up, without imports.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from data_rules import prompts, tree_rss


def full(folder: Path) -> None:
    (folder / "spec.yaml").write_text("embedded: {}\n")
    subprocess.run([sys.executable, "-m", "tasks.ingest", "--source", str(folder / "spec.yaml"), "--out",
                    str(folder / "data")], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "tasks.validate", "--data", str(folder / "data"), "--report",
                              str(folder / "findings.json"), "--docs", str(folder / "docs")])
    peak = 0
    while child.poll() is None:
        peak = max(peak, tree_rss(child.pid))
        time.sleep(0.2)
    print(json.dumps({"rows": 112_801, "exit": child.returncode, "seconds": round(time.monotonic() - before, 1),
                      "peak_gb": round(peak / 2**20, 2)}))


def write(folder: Path, count: int) -> None:
    """Writes clean rankings and prompts: 50 prompts per user, every fifth user in valid."""
    rng = random.Random(2)
    texts = prompts(count, 2, personal=False)
    for name, own in (("rm", texts[:count // 4]), ("ppo", texts[count // 4:])):
        with (folder / f"{name}.jsonl").open("w") as out:
            for number, prompt in enumerate(own):
                row: dict[str, Any] = {"prompt_id": f"{name}-{number}", "user_id": f"{name}-{number // 50}"}
                row |= {"labeler_id": "l1"} if name == "rm" else {}
                row |= {"source": "customer", "split": "valid" if number // 50 % 5 == 0 else "train",
                        "use_case": "generation", "prompt": prompt}
                row |= {"completions": rng.sample(texts, 4), "ranks": [1, 2, 2, 3]} if name == "rm" else {}
                out.write(json.dumps(row) + "\n")


def rows(folder: Path, count: int) -> float:
    """Seconds of the checks of `count` rows, including reading."""
    from mlops.validation.docs import make_context
    from mlops.validation.run import files_in, validate_files
    from rlhf.params import ValidateParams

    write(folder, count)
    limits = ValidateParams(counts="none", max_prompt_chars=10**6, max_completion_chars=10**6)
    before = time.monotonic()
    validate_files(make_context(folder / "docs"), files_in(folder), 1.0, limits, say=lambda line: None)
    return time.monotonic() - before


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if sys.argv[1:2] == ["full"]:
            full(Path(scratch))
        else:
            sizes = [int(item) for item in sys.argv[2:]] or [10_000, 100_000, 500_000]
            rows(Path(scratch), 1000)
            each = []
            for size in sizes:
                each.append(1e6 * rows(Path(scratch), size) / size)
                print(json.dumps({"rows": size, "microseconds_per_row": round(each[-1])}), flush=True)
            print(json.dumps({"ratio_largest_to_smallest": round(each[-1] / each[0], 2)}))
