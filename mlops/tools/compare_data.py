"""Compares two versions of the datasets: rows added, removed and changed, and drift of the distributions.

    python -m mlops.tools.compare_data OLD [NEW]

OLD and NEW: a git revision, or a folder with sft.jsonl, rm.jsonl and ppo.jsonl; NEW defaults to the checkout's data/. A
revision's files come from DVC's cache or remote. Writes versions.json and versions.png to --out, and a run
"data OLD..NEW" to MLflow unless INSTRUCTFLOW_UPLOADER=off.
"""

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.data.prompts import prompt_problem, prompt_text
from rlhf.data.schema import KEYS, read_rows
from rlhf.errors import UserError, one_line
from rlhf.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = "reports/data_versions"
NOTABLE = 0.1  # distances from here on are marked in the table


@dataclass
class Version:
    """Summary of one dataset: a hash of each row by prompt_id, lengths in characters, counts by value."""

    rows: dict[str, bytes] = field(default_factory=dict)
    prompt_chars: list[int] = field(default_factory=list)
    completion_chars: list[int] = field(default_factory=list)
    use_case: Counter[str] = field(default_factory=Counter)
    rank: Counter[str] = field(default_factory=Counter)
    k: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Change:
    """The change between two versions of a dataset. `drift`: distance by quantity, 0 (equal) to 1 (disjoint).

    Lengths: the two-sample Kolmogorov-Smirnov statistic. Use cases, ranks and K: total variation distance.
    """

    rows_old: int
    rows_new: int
    added: int
    removed: int
    changed: int
    drift: dict[str, float]


def read_version(path: Path) -> Version:
    """Reads a dataset. Raises UserError for a row without prompt_id or with a repeated one."""
    version = Version()
    for number, row in enumerate(read_rows(path), start=1):
        name = row.get("prompt_id")
        if not isinstance(name, str) or name in version.rows:
            problem = "no prompt_id" if not isinstance(name, str) else f"prompt_id {name} appears a second time"
            raise UserError(f"{path}: row {number}: {problem}; check the folder with `python -m tasks.validate`")
        text = json.dumps(row, sort_keys=True, ensure_ascii=True)
        version.rows[name] = hashlib.blake2b(text.encode(), digest_size=16).digest()
        completions = row.get("completions") or ([row["completion"]] if "completion" in row else [])
        version.prompt_chars.append(len(prompt_text(row["prompt"])) if not prompt_problem(row.get("prompt")) else 0)
        version.completion_chars += [len(str(item)) for item in completions]
        version.use_case[str(row.get("use_case"))] += 1
        if "ranks" in row:
            version.rank.update(map(str, row["ranks"]))
            version.k[str(len(row["ranks"]))] += 1
    return version


def total_variation(old: Counter[str], new: Counter[str]) -> float:
    """Total variation distance of the shares: half the sum of their absolute differences, 0 to 1."""
    a, b = max(1, old.total()), max(1, new.total())
    return sum(abs(old[key] / a - new[key] / b) for key in sorted(old.keys() | new.keys())) / 2


def length_distance(old: list[int], new: list[int]) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the largest gap between the cumulative distributions."""
    from scipy.stats import ks_2samp

    if not old or not new:
        return float(bool(old) != bool(new))
    return float(ks_2samp(old, new, method="asymp").statistic)


def compare(old: Version, new: Version) -> Change:
    """Compares rows by prompt_id and measures the drift."""
    both = old.rows.keys() & new.rows.keys()
    drift = {"prompt_chars": length_distance(old.prompt_chars, new.prompt_chars),
             "use_case": total_variation(old.use_case, new.use_case)}
    if old.completion_chars or new.completion_chars:
        drift["completion_chars"] = length_distance(old.completion_chars, new.completion_chars)
    if old.rank or new.rank:
        drift |= {"rank": total_variation(old.rank, new.rank), "k": total_variation(old.k, new.k)}
    return Change(len(old.rows), len(new.rows), len(new.rows) - len(both), len(old.rows) - len(both),
                  sum(old.rows[name] != new.rows[name] for name in both),
                  {name: round(value, 6) for name, value in sorted(drift.items())})


@contextmanager
def folder_of(version: str, root: Path) -> Iterator[Path]:
    """A folder with the files of a version: the folder itself, or a temporary copy of a git revision's data/.

    Raises UserError if `version` is neither, and if its data is neither in DVC's cache nor in its remote.
    """
    if Path(version).is_dir():
        yield Path(version)
        return
    revision = subprocess.run(["git", "rev-parse", "--verify", "--quiet", f"{version}^{{commit}}"], cwd=root,
                              capture_output=True)
    if revision.returncode:
        raise UserError(f"{version}: neither a folder nor a git revision of this checkout")
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="instructflow-data-") as copy:
        try:
            files = DVCFileSystem(str(root), rev=version)
            for name in KEYS:
                with suppress(FileNotFoundError, DataIndexDirError):
                    files.get_file(f"data/{name}.jsonl", f"{copy}/{name}.jsonl")
        except (DvcException, OSError) as error:
            raise UserError(f"{version}: {str(error).strip().splitlines()[0]}") from None
        if not any(Path(copy).iterdir()):
            raise UserError(f"{version}: its data is neither in DVC's cache nor in its remote; "
                            "run `dvc push --all-commits data.dvc` in a checkout that has it")
        yield Path(copy)


def read_folder(folder: Path, version: str) -> dict[str, Version]:
    """The datasets in a folder. Raises UserError where there is none."""
    datasets = {name: read_version(folder / f"{name}.jsonl") for name in KEYS if (folder / f"{name}.jsonl").exists()}
    if not datasets:
        raise UserError(f"{version}: none of {', '.join(f'{name}.jsonl' for name in KEYS)} in it")
    return datasets


def table(changes: dict[str, Change]) -> list[str]:
    """The report as lines of text; a distance of NOTABLE or more is marked with *."""
    lines = [f"{'dataset':<8}{'rows':>18}{'added':>9}{'removed':>9}{'changed':>9}  drift (0 equal, 1 disjoint)"]
    for name, change in changes.items():
        drift = "  ".join(f"{key} {value:.3f}{'*' if value >= NOTABLE else ''}" for key, value in change.drift.items())
        rows = f"{change.rows_old:,} → {change.rows_new:,}"
        lines.append(f"{name:<8}{rows:>18}{change.added:>9,}{change.removed:>9,}{change.changed:>9,}  {drift}")
    return lines


def draw(old: dict[str, Version], new: dict[str, Version], labels: tuple[str, str], path: Path) -> None:
    """A row of plots per dataset: lengths, use cases and ranks, old beside new."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(old.keys() | new.keys())
    names.sort(key=list(KEYS).index)
    figure = Figure(figsize=(13, 3.2 * len(names)), dpi=100, layout="constrained")
    with rc_context({"text.parse_math": False}):  # a $ in a use case or a revision is a $
        _draw(figure, names, old, new, labels)
        figure.savefig(path, metadata={"Software": None})


def _draw(figure: "Figure", names: list[str], old: dict[str, Version], new: dict[str, Version], labels: tuple[str, str]
          ) -> None:
    grid = figure.subplots(len(names), 4, squeeze=False)
    for row, name in zip(grid, names, strict=True):
        pair = [versions.get(name, Version()) for versions in (old, new)]
        for axes, (title, key) in zip(row, (("prompt length", "prompt_chars"), ("completion length",
                                      "completion_chars"), ("use case", "use_case"), ("rank", "rank")), strict=True):
            values = [getattr(version, key) for version in pair]
            if not any(values):
                axes.axis("off")
                continue
            axes.set_title(f"{name}: {title}", fontsize=10)
            if isinstance(values[0], Counter):
                keys = sorted(values[0].keys() | values[1].keys())
                for offset, count, label in zip((-0.2, 0.2), values, labels, strict=True):
                    shares = [100 * count[item] / max(1, count.total()) for item in keys]
                    axes.bar([place + offset for place in range(len(keys))], shares, 0.4, label=label)
                axes.set_xticks(range(len(keys)), keys, rotation=60 if key == "use_case" else 0, fontsize=8)
                axes.set_ylabel("% of rows" if key == "use_case" else "% of completions")
            else:
                top = max(map(max, filter(None, values))) + 1
                for lengths, label in zip(values, labels, strict=True):
                    axes.hist(lengths, bins=40, range=(0, top), density=True, histtype="step", label=label)
                axes.set_xlabel("characters")
                axes.set_yticks([])
        row[0].legend(fontsize=8)


def log_to_mlflow(name: str, changes: dict[str, Change], out: Path, root: Path) -> None:
    """Adds a run to the project's experiment: counts and drift as metrics, the report files as artifacts."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from mlops.tracking.mlflow_client import experiment_id, tracking_uri

    client = MlflowClient(tracking_uri(root))
    run = client.create_run(experiment_id(client, root), run_name=name, tags={"instructflow.kind": "data versions"})
    counts = {f"data/{dataset}_{key}": float(getattr(change, key)) for dataset, change in changes.items()
              for key in ("rows_old", "rows_new", "added", "removed", "changed")}
    drift = {f"data/{dataset}_drift_{key}": value for dataset, change in changes.items()
             for key, value in change.drift.items()}
    client.log_batch(run.info.run_id, [Metric(key, value, run.info.start_time, 0)
                                       for key, value in sorted((counts | drift).items())])
    for file in sorted(out.iterdir()):
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id)


def report(old: str, new: str, out: Path, root: Path) -> dict[str, Change]:
    """Compares two versions, prints the table, writes versions.json and versions.png to `out`."""
    with folder_of(old, root) as old_folder, folder_of(new, root) as new_folder:
        before, after = read_folder(old_folder, old), read_folder(new_folder, new)
    names = [name for name in KEYS if name in before or name in after]
    changes = {name: compare(before.get(name, Version()), after.get(name, Version())) for name in names}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "versions.json", {"old": old, "new": new,
                                       "datasets": {name: asdict(change) for name, change in changes.items()}})
    draw(before, after, (old, new), out / "versions.png")
    print("\n".join(table(changes)))
    print(f"written: {out}/versions.json, {out}/versions.png")
    return changes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.tools.compare_data",
                                     description="Compares two versions of the data.")
    parser.add_argument("old", help="git revision or folder")
    parser.add_argument("new", nargs="?", default="data", help="git revision or folder (default: data)")
    parser.add_argument("--out", type=Path, default=Path(OUT), help=f"folder for the report (default: {OUT})")
    options = parser.parse_args(arguments)
    root = Path.cwd()
    with one_line("compare_data"):
        changes = report(options.old, options.new, options.out, root)
    if os.environ.get("INSTRUCTFLOW_UPLOADER") != "off":
        try:
            log_to_mlflow(f"data {options.old}..{options.new}", changes, options.out, root)
        except Exception as error:  # the report is written; an unavailable MLflow must not fail the command
            first = str(error).strip().splitlines()[0]
            print(f"compare_data: not logged to MLflow: {first}", file=sys.stderr)


if __name__ == "__main__":
    main()
