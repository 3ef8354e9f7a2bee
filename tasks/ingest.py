"""Makes the datasets in build/data, which data.dvc then pins as data/.

    python -m tasks.ingest                                 the stage: the source that the profile names
    python -m tasks.ingest --source SPEC.yaml --out DIR    any source description, apart from DVC and parameters
    python -m tasks.ingest --source SPEC.yaml --preview 5  its first rows, as they came in and as they would be kept

docs/sources.md says how to describe a source, docs/data-rules.md what is dropped of it and why.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlops.config.paths import FEEDBACK
from mlops.config.sources import load_source
from mlops.processes import die_with_parent
from rlhf.curation.assemble import DROPPED, QUARANTINE, assemble
from rlhf.curation.preview import preview
from rlhf.curation.rules import RULES
from rlhf.curation.sources.spec import Source
from rlhf.data.schema import KEYS, read_rows, write_rows
from rlhf.errors import UserError, displayed, one_line
from rlhf.files import publish, write_json
from rlhf.params import IngestParams
from rlhf.training.progress import StageProgress
from rlhf.world.embedded import write_embedded
from rlhf.world.gold import SOURCE
from tasks.stage import Stage, run_stage

MAX_PROCESSES = 8
SPECS = Path("profiles/sources")
FLAGS = ("--source", "--out", "--preview", "--seed", "-h", "--help")


def write_described(source: Source, root: Path, seed: int, made: Path) -> dict[str, Any]:
    """The datasets of a source description, its rules applied; returns the metrics. Raises UserError."""
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    with StageProgress("ingest", 0, "rows") as progress:
        report = assemble(source, root, made, seed, processes, partial(die_with_parent, os.getpid()),
                          lambda role, count: progress.step(advance=count) if count else None)
    print(as_table(report), flush=True)
    for role, found in report.items():
        if role != "corpus" and found["kept"] and not found["valid"] and source.rules.valid_share:
            print(f"{role}: no row is in valid, which training needs: too few users or prompts for valid_share = "
                  f"{source.rules.valid_share:g}", flush=True)
    metrics: dict[str, Any] = {}
    for role, found in report.items():
        if role == "corpus":
            metrics["ingest/corpus_documents"] = found["documents"]
            continue
        metrics |= {f"ingest/{role}_rows": found["kept"], f"ingest/{role}_read": found["read"],
                    f"ingest/{role}_quarantined": sum(found["quarantined"].values()),
                    f"ingest/{role}_{'english' if found['language'] == 'en' else 'language'}_share":
                        found["language_share"]}
        metrics |= {f"ingest/{role}_dropped_{rule}": count for rule, count in found["dropped"].items()}
    return metrics


def names_of(source: Source) -> list[str]:
    """The hub's datasets and the files that a description reads, as it names them."""
    return sorted({str(entry.dataset or entry.files) for role in KEYS for entry in getattr(source, role)})


def as_table(report: dict[str, Any]) -> str:
    """What was read, quarantined, dropped by each rule and kept, a column a dataset."""
    roles = [role for role in report if role != "corpus"]
    lines = [("rows", *roles), ("read", *(report[role]["read"] for role in roles))]
    reasons = sorted({reason for role in roles for reason in report[role]["quarantined"]})
    lines += [(f"quarantined: {reason}", *(report[role]["quarantined"].get(reason, 0) for role in roles))
              for reason in reasons]
    lines += [(f"dropped: {rule}", *(report[role]["dropped"][rule] for role in roles)) for rule in RULES
              if any(report[role]["dropped"][rule] for role in roles)]
    lines += [(word, *(report[role][word] for role in roles)) for word in ("kept", "train", "valid", "users")]
    if roles and "language" in report[roles[0]]:  # of the rows read; InstructGPT: more than 96 % [§3.3]
        lines.append((f"in the language {report[roles[0]]['language']}",
                      *(f"{report[role]['language_share_read']:.1%}" for role in roles)))
    cells = [[str(line[0]), *(f"{item:,}" if isinstance(item, int) else str(item) for item in line[1:])]
             for line in lines]
    wide = max(len(line[0]) for line in cells)
    table = [line[0].ljust(wide) + "".join(item.rjust(11) for item in line[1:]) for line in cells]
    if "corpus" in report:
        found = report["corpus"]
        table.append(f"corpus: {found['read']:,} texts read, {found['documents']:,} kept, {found['empty']:,} empty")
    return "\n".join(table)


def ingest(stage: Stage) -> None:
    """Makes the datasets in the scratch folder and publishes them to build/data when they are whole."""
    params = stage.params.stages.ingest
    made = stage.scratch / "data"
    if made.exists():
        shutil.rmtree(made)
    if params.source == "embedded":
        metrics = write_embedded(params, stage.params.seed, made)
    else:
        spec = stage.root / SPECS / f"{params.spec}.yaml"
        if not spec.is_file():
            known = ", ".join(sorted(path.stem for path in (stage.root / SPECS).glob("*.yaml")))
            raise UserError(f"ingest.spec = {params.spec!r}: must be one of {known} (files in {SPECS}/)")
        source = load_source(spec)
        if isinstance(source, IngestParams):
            raise UserError(f"{spec}: describes the embedded source; set ingest.source to embedded instead")
        for role in (*KEYS, "corpus"):
            for entry in getattr(source, role):
                if params.source == "files" and entry.dataset:
                    raise UserError(f"{spec}: {role} reads {entry.dataset} of the hub; set ingest.source to hub")
        missing = [role for role in KEYS if not getattr(source, role)]
        if missing:
            raise UserError(f"{spec}: nothing for {', '.join(missing)}; the pipeline needs all three datasets")
        metrics = write_described(source, spec.parent, stage.params.seed, made)
        write_json(made / SOURCE, {"source": "described", "names": names_of(source)})
        (made / "corpus.jsonl").touch()
        (made / "tax").mkdir()
    metrics |= add_feedback(stage.root / FEEDBACK, made / "rm.jsonl")
    stage.publish("data", "build/data")
    shutil.rmtree(made)
    stage.finish(metrics)


def add_feedback(folder: Path, target: Path) -> dict[str, int]:
    """Appends the rows that people have labeled (`mlops.labeling.to_rows --add` puts them there); returns the metric.

    Raises UserError for a row that has other keys than the dataset's.
    """
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_rows(path), start=1):
            if list(row) != KEYS["rm"]:
                raise UserError(f"{path}: row {number}: expected the keys {', '.join(KEYS['rm'])}, in this order")
            rows.append(row)
    if not rows:
        return {}
    write_rows(target, [*read_rows(target), *rows])
    return {"ingest/feedback_rows": len(rows)}


def folder_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.ingest", description=(
        "turns a source description into a folder with sft.jsonl, rm.jsonl, ppo.jsonl"))
    parser.add_argument("--source", type=Path, required=True, metavar="SPEC.yaml", help="the description")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="DIR", help="where the datasets go")
    target.add_argument("--preview", type=int, metavar="N", help="show N rows of each entry, and write nothing")
    parser.add_argument("--seed", type=int, default=1, help="splits and subsampling")
    return parser


def make_folder(args: argparse.Namespace) -> None:
    """The any-source command: the folder is replaced only when the new one is whole. Raises UserError."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is a file; give a folder")
    foreign = [path.name for path in args.out.iterdir() if not _ours(path)] if args.out.is_dir() else []
    if foreign:
        raise UserError(f"{args.out}: holds {sorted(foreign)[0]}, which is no dataset; give a folder of its own")
    source = load_source(args.source)
    made = args.out.with_name(args.out.name + ".making")
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        if isinstance(source, IngestParams):
            metrics = write_embedded(source, args.seed, made)
        else:
            metrics = write_described(source, args.source.parent, args.seed, made)
        publish(made, args.out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    rows = ", ".join(f"{name} {metrics[f'ingest/{name}_rows']:,}" for name in KEYS if f"ingest/{name}_rows" in metrics)
    left = "" if isinstance(source, IngestParams) else f"; what went and why: {QUARANTINE}, {DROPPED}, rules.json"
    print(f"{args.out}: {rows}{left}")


def show_preview(args: argparse.Namespace) -> None:
    """The first rows of a description as they came in and as they would be kept. Raises UserError."""
    if args.preview < 1:
        raise UserError(f"--preview {args.preview}: must be at least 1")
    source = load_source(args.source)
    if isinstance(source, IngestParams):
        raise UserError(f"{args.source}: describes the embedded source, which has no rows to map")
    for line in preview(source, args.source.parent, args.seed, args.preview):
        print(displayed(line))


def _ours(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json") or path.name == "tax"


def main(arguments: Sequence[str]) -> None:
    """The stage without flags of a folder, else the folder."""
    if not any(item.split("=")[0] in FLAGS for item in arguments):
        run_stage("ingest", ingest)
        return
    with one_line("ingest"):
        args = folder_parser().parse_args(list(arguments))
        if not args.source.is_file():
            raise UserError(f"{args.source}: {'is a folder' if args.source.is_dir() else 'no such file'}; "
                            "give the description's YAML file")
        make_folder(args) if args.out else show_preview(args)


if __name__ == "__main__":
    main(sys.argv[1:])
