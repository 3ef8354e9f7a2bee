"""Runs a stage of the small pipeline on a file system that fills up, then with room; prints what happened as JSON.

    python on_a_small_disk.py PIPELINE MOUNT SHARE STAGE [FLAGS]      in a mount namespace of its own

The pipeline has run the stage before: what it made is what is expected. The stage runs once with room; SHARE of the
bytes that it left in its scratch folder are free when it starts again from nothing.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SIZE = 256 * 2**20
BLOCK = 4096


def bytes_in(folder: Path) -> int:
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in folder.rglob("*") if path.is_file())


def outputs(root: Path) -> dict[str, str]:
    """MD5 of all that stages have published."""
    return {str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest()
            for name in ("data", "models", "metrics", "build", "reports") for path in sorted((root / name).rglob("*"))
            if path.is_file()}


def run(root: Path, stage: str, flags: list[str]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", f"tasks.{stage}", *flags], cwd=root, capture_output=True, text=True)
    return done.returncode, done.stderr


def main() -> None:
    pipeline, mount, share, stage, *flags = sys.argv[1:]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", mount], check=True)
    root = Path(mount) / "pipeline"
    shutil.copytree(pipeline, root, symlinks=True, ignore=lambda folder, names: {"scratch"} & {*names})
    earlier = outputs(root)
    code, said = run(root, stage, flags)  # with room: what other tests left in the pipeline's scratch says nothing
    if code or outputs(root) != earlier:
        sys.exit(f"{stage} with room: code {code}, {said}")
    added = bytes_in(root / "scratch")
    shutil.rmtree(root / "scratch")
    filler = Path(mount) / "filler"
    free = int(float(share) * added)
    while (left := shutil.disk_usage(mount).free - free) > 0:
        with filler.open("ab") as handle:
            handle.write(bytes(min(left, 2**20)))
    code, said = run(root, stage, flags)
    after = outputs(root)
    filler.unlink()
    again = run(root, stage, flags)
    print(json.dumps({
        "added": added, "code": code, "said": said.replace(str(root), "ROOT"),
        "again": again[0], "again_said": again[1],
        "damaged": [name for name, digest in earlier.items() if after.get(name) != digest],
        "partial": [name for name in after if "partial" in name],
        "different": sorted(name for name in earlier.keys() | outputs(root).keys()
                            if earlier.get(name) != outputs(root).get(name))}))


if __name__ == "__main__":
    os.environ["INSTRUCTFLOW_CHECKPOINT_SECONDS"] = "0"
    main()
