"""Checks the datasets with Great Expectations before anything is trained on them.

    python -m tasks.validate                                     the stage: data/, with the profile's limits
    python -m tasks.validate --data DIR --report OUT.json        any folder, apart from DVC and parameters

The rules are in `mlops.validation.suites`, and in docs/validation.md. The stage writes Data Docs to
reports/data_docs/ and rows that break a rule to reports/quarantine.jsonl, also where a rule fails.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlops.validation.docs import DOCS, build_docs, make_context
from mlops.validation.run import Finding, Outcome, TokenCounter, files_in, row_entries, validate_files
from rlhf.curation.characters import SPECIAL_TOKENS
from rlhf.data.prompts import Prompt
from rlhf.data.schema import KEYS
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic
from rlhf.params import ValidateParams
from tasks.stage import Stage, run_stage

QUARANTINE = "quarantine.jsonl"
NO_LIMIT = 10_000_000
SOURCE = "source.json"  # which ingest writes beside the embedded source's datasets
CLEAN, FOUND, UNUSABLE = 0, 1, 2
NOT_OF_EMBEDDED = ("truncated",)  # rules that the embedded source breaks on purpose: its labelers err as people do


def report(findings: list[Finding]) -> None:
    """Prints warnings; raises UserError where a rule failed that stops the run, after one line for each if several."""
    stops = [finding for finding in findings if finding.stops]
    for finding in findings:
        if not finding.stops:
            print(f"validate: warning: {finding}", file=sys.stderr)
    if len(stops) == 1:
        raise UserError(str(stops[0]))
    for finding in stops:
        print(f"validate: {finding}", file=sys.stderr)
    if stops:
        files = ", ".join(dict.fromkeys(str(finding.file) for finding in stops))
        raise UserError(f"{files}: {len(stops)} rules failed; first: {stops[0]}")


def quarantine(entries: list[dict[str, Any]], files: dict[str, Path], target: Path) -> int:
    """Writes the rows that break a rule, each with why and its raw line; returns how many rows."""
    by_row: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["row"] is not None:
            by_row.setdefault((entry["dataset"], entry["row"]), []).append(entry)
    wanted = {name: {row for dataset, row in by_row if dataset == name} for name in files}
    lines = []
    for name, file in files.items():
        if not wanted[name] or file.suffix == ".gz":
            continue
        with file.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                if number in wanted[name]:
                    found = by_row[name, number]
                    lines.append({"dataset": name, "row": number, "rules": [item["rule"] for item in found],
                                  "messages": [item["message"] for item in found],
                                  "line": raw[:NO_LIMIT].decode("utf-8", "backslashreplace").rstrip("\n")})
    text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, text.encode())
    return len(lines)


def token_counter(name: str) -> tuple[TokenCounter, list[str]]:
    """A counter for a tokenizer (a folder, or a name of the hub), and its own special tokens. Raises UserError."""
    from rlhf.model.chat_format import codec_with_pad

    try:
        codec = codec_with_pad(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name}: cannot be used: {str(error).strip().splitlines()[0]}") from None

    def count(prompts: list[Prompt], completions: list[str]) -> list[int]:
        before, after = codec.prompts(prompts), codec.completions(completions)
        return [len(prompt) + len(completion) for prompt, completion in zip(before, after, strict=True)]

    if codec.asks_with:
        print(f"{name}: its chat template ends a prompt with {codec.asks_with!r}, after which answers are trained: "
              "those of the data should go on from there, or begin with it", flush=True)
    return count, codec.marks


def validate(stage: Stage) -> None:
    """Checks every dataset, publishes Data Docs and the quarantine, and finishes only where all rules hold."""
    stages = stage.params.stages
    site = stage.scratch / DOCS
    shutil.rmtree(site, ignore_errors=True)
    context = make_context(site)
    files = {name: Path(os.path.relpath(stage.root / "data" / f"{name}.jsonl")) for name in KEYS}
    base = stages.pretrain.base_model
    options: dict[str, Any] = {}
    if base:  # the embedded profile's tokenizer does not exist yet; its texts are held by their characters
        counter, own = token_counter(base)
        options = {"count_tokens": counter, "max_tokens": max(stages.rm.max_tokens, stages.sft.max_tokens),
                   "tokens": (*SPECIAL_TOKENS, *own)}
    if stages.ingest.source == "embedded":
        options["leave_out"] = NOT_OF_EMBEDDED
    outcome = validate_files(context, files, stages.ingest.scale, stages.validate,
                             say=lambda line: print(line, flush=True), **options)
    entries = row_entries(outcome.findings, files)
    publish(stage, context, site, outcome, entries, files)
    report(outcome.findings)
    metrics = outcome.metrics | {"validate/success": 1, "validate/warnings": sum(1 for entry in entries)}
    stage.finish(metrics, [f"reports/{DOCS}"])


def publish(stage: Stage, context: Any, site: Path, outcome: Outcome, entries: list[dict[str, Any]],
            files: dict[str, Path]) -> None:
    """Data Docs, the quarantined rows and the list of findings go to reports/."""
    build_docs(context, site, outcome.lines, [str(finding) for finding in outcome.findings])
    stage.publish(DOCS, f"reports/{DOCS}")
    quarantine(entries, files, stage.root / "reports" / QUARANTINE)
    write_atomic(stage.root / "reports" / "validate.json", (json.dumps(entries, indent=1) + "\n").encode())


def folder_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.validate", description=(
        "checks a folder that holds any of sft.jsonl, rm.jsonl, ppo.jsonl; "
        "exit code 0: clean, 1: findings, 2: unusable"))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder")
    parser.add_argument("--report", type=Path, required=True, metavar="OUT.json", help="where the findings go")
    parser.add_argument("--counts", choices=("paper", "none"), default="paper",
                        help="none: any number of rows in any mix of use cases")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the paper's row counts")
    parser.add_argument("--min-k", type=int, default=ValidateParams().min_k, choices=range(2, 10), metavar="K",
                        help="least completions of a ranking; 2 for sets of pairs")
    parser.add_argument("--max-prompt-chars", type=int, default=NO_LIMIT)
    parser.add_argument("--max-completion-chars", type=int, default=NO_LIMIT)
    parser.add_argument("--max-prompts-per-user", type=int, default=ValidateParams().max_prompts_per_user)
    parser.add_argument("--language", default=ValidateParams().language, metavar="CODE",
                        help="language of the prompts, as ISO 639-1 code (default: en)")
    parser.add_argument("--tokenizer", default="", metavar="NAME", help="a tokenizer's folder or name on the hub")
    parser.add_argument("--max-tokens", type=int, default=2048, help="with --tokenizer: most tokens of a row")
    parser.add_argument("--quarantine", type=Path, metavar="FILE", help="write the rows that break a rule there")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write Data Docs there")
    return parser


def is_embedded(folder: Path) -> bool:
    """Whether the datasets of a folder are the embedded source's, as the file says that it writes beside them."""
    try:
        return bool(json.loads((folder / SOURCE).read_text(encoding="utf-8"))["source"] == "embedded")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_folder(args: argparse.Namespace) -> int:
    """The any-folder command: writes the report, prints what failed, returns the exit code. Raises UserError."""
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder")
    files = files_in(args.data)
    if not files:
        raise UserError(f"{args.data}: none of {', '.join(f'{name}.jsonl' for name in KEYS)} in it")
    limits = replace(ValidateParams(), counts=args.counts, min_k=args.min_k, max_prompt_chars=args.max_prompt_chars,
                     max_completion_chars=args.max_completion_chars, max_prompts_per_user=args.max_prompts_per_user,
                     language=args.language)
    options: dict[str, Any] = {}
    if args.tokenizer:
        counter, own = token_counter(args.tokenizer)
        options = {"count_tokens": counter, "max_tokens": args.max_tokens, "tokens": (*SPECIAL_TOKENS, *own)}
    if args.counts == "paper" or is_embedded(args.data):
        options["leave_out"] = NOT_OF_EMBEDDED
    with tempfile.TemporaryDirectory(prefix="instructflow-docs-") as scratch:
        site = args.docs or Path(scratch)
        context = make_context(site)
        outcome = validate_files(context, files, args.scale, limits, **options)
        if args.docs:
            build_docs(context, site, outcome.lines, [str(finding) for finding in outcome.findings])
    entries = row_entries(outcome.findings, files)
    if args.quarantine:
        quarantine(entries, files, args.quarantine)
    try:
        write_atomic(args.report, (json.dumps(entries, indent=1, ensure_ascii=True) + "\n").encode())
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{args.report}: cannot be written: {error.strerror}") from None
    for finding in outcome.findings:
        print(f"{'' if finding.stops else 'warning: '}{finding}", file=sys.stderr)
    rules = Counter(entry["rule"] for entry in entries)
    said = ", ".join(f"{rule} {count:,}" for rule, count in sorted(rules.items()))
    print(f"{len(entries):,} findings ({said}) in {args.report}" if entries else f"clean; {args.report} is empty")
    return FOUND if entries else CLEAN


def main(arguments: Sequence[str]) -> None:
    """The stage without flags of a folder, else the folder."""
    if not any(item.split("=")[0] in ("--data", "--report", "-h", "--help") for item in arguments):
        run_stage("validate", validate)
        return
    with one_line("validate"):
        code = check_folder(folder_parser().parse_args(list(arguments)))
    raise SystemExit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
