"""Runs the suites on the dataset files of a folder and reports the findings row by row."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.validation.docs import keep_for_docs
from mlops.validation.reader import TEXT_COLUMNS, TokenCounter, read_frame, short
from rlhf.curation.characters import SPECIAL_TOKENS
from rlhf.curation.language import languages
from rlhf.data.schema import KEYS
from rlhf.errors import UserError
from rlhf.params import ValidateParams

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.data_context import EphemeralDataContext

SHOWN_ROWS = 3
SHOWN_WHOLE = ("problem", "chat_template", *TEXT_COLUMNS)
SHOWN_INSTEAD = {"line": "problem", "user": "user_id"}  # columns that a finding shows for another
RESULT_FORMAT = {"result_format": "COMPLETE", "return_unexpected_index_query": False}
CROSS = "cross"


@dataclass(frozen=True)
class Finding:
    """A failed rule: the rows that break it (1-based line numbers) with the problem of each, or no rows and one
    message on the whole file. `tolerated`: the rows are few enough for the rule's `mostly`.
    """

    file: Path
    rule: str
    rows: list[int]
    message: str
    details: list[str] = field(default_factory=list)
    severity: str = "stop"
    tolerated: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"

    @property
    def stops(self) -> bool:
        return self.severity == "stop" and not self.tolerated


def finding_of(files: dict[str, Path], frame: "pd.DataFrame", result: "ExpectationValidationResult") -> list[Finding]:
    """The findings of a result, one per file. Raises RuntimeError where the expectation itself raised an error."""
    config = result.expectation_config
    assert config is not None
    meta, details = config.meta, result.result
    default = next(iter(files))
    if "observed_value" in details and not result.success:
        message = f"{config.description}; found {details['observed_value']}; {meta['fix']}"
        return [Finding(files[default], meta["rule"], [], message, severity=meta["severity"])]
    if "unexpected_index_list" not in details:
        if result.success:
            return []
        raise RuntimeError(f"{files[default]}: {meta['rule']}: {result.exception_info}")
    columns = [config.kwargs[key] for key in ("column", "column_A", "column_B") if key in config.kwargs]
    columns = [SHOWN_INSTEAD.get(name, name) for name in columns]
    by_file: dict[str, list[int]] = {}
    for index in details["unexpected_index_list"]:
        by_file.setdefault(frame.at[index, "dataset"] if "dataset" in frame else default, []).append(index)
    findings = []
    for dataset, indices in sorted(by_file.items()):
        rows = [int(frame.at[index, "row"]) if "row" in frame else int(index) for index in indices]
        problems = []
        for index in indices:
            cells = ((name, frame.at[index, name]) for name in columns)
            values = [(name, cell if name in SHOWN_WHOLE else short(cell)) for name, cell in cells]
            problems.append(", ".join(f"{name} {value}" if values[1:] else value for name, value in values))
        shown = [f"row {row} ({text})" for row, text in zip(rows[:SHOWN_ROWS], problems, strict=False)]
        more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
        count = "1 row breaks it" if len(rows) == 1 else f"{len(rows):,} rows break it"
        message = f"{config.description}; {count}: {', '.join(shown)}{more}; {meta['fix']}"
        findings.append(Finding(files[dataset], meta["rule"], rows, message, problems, meta["severity"],
                                bool(result.success)))
    return findings


def check(context: "EphemeralDataContext", suite: Any, files: dict[str, Path],
          frame: "pd.DataFrame") -> tuple[int, list[Finding]]:
    """Runs a suite on a frame and stores the result for Data Docs; returns (number of rules, findings)."""
    asset = context.data_sources.add_pandas(suite.name).add_dataframe_asset(suite.name)
    batch = asset.add_batch_definition_whole_dataframe("file").get_batch({"dataframe": frame})
    result = batch.validate(suite, result_format=RESULT_FORMAT)
    findings = [finding for item in result.results for finding in finding_of(files, frame, item)]
    keep_for_docs(context, suite, result)
    return len(result.results), findings


@dataclass
class Outcome:
    """The result of checking several files: lines for the terminal, findings, metrics."""

    lines: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=lambda: {"validate/expectations": 0})


def validate_files(context: "EphemeralDataContext", files: dict[str, Path], scale: float, limits: ValidateParams, *,
                   tokens: Sequence[str] = SPECIAL_TOKENS, count_tokens: TokenCounter | None = None,
                   max_tokens: int = 0, leave_out: Sequence[str] = (), say: Callable[[str], None] = print) -> Outcome:
    """Checks each dataset file, then all of them together. Raises UserError for a file that cannot be read, an unknown
    rule or language. `leave_out`: rules that are not checked."""
    import pandas as pd

    from mlops.validation.suites import RULES, check_names, cross_rules, model_rules, name_of, rule_names, suite_of

    if limits.language not in languages():
        raise UserError(f"validate.language: {limits.language!r} is no ISO 639-1 code of {', '.join(languages())}")
    across = cross_rules(limits)
    check_names(limits, rule_names())
    rules = {name: [*(item for item in RULES[name](scale, limits) if name_of(item) not in leave_out),
                    *(model_rules(max_tokens) if count_tokens else [])] for name in files}
    outcome = Outcome()
    parts = []

    def run(name: str, some: list[Any], own: dict[str, Path], frame: "pd.DataFrame", rows: str) -> list[Finding]:
        count, failed = check(context, suite_of(name, some, limits), own, frame)
        outcome.findings += failed
        outcome.metrics["validate/expectations"] += count
        stops, warns = sum(item.stops for item in failed), sum(not item.stops for item in failed)
        words = [f"{stops} failed"] * bool(stops) + [f"{warns} warned"] * bool(warns)
        outcome.lines.append(f"{rows}  {count:>3} rules  {', '.join(words) or 'passed'}")
        say(outcome.lines[-1])
        return failed

    for dataset, file in files.items():
        frame = read_frame(dataset, file, tokens, count_tokens, limits.language)
        run(dataset, rules[dataset], {dataset: file}, frame, f"{file!s:<16} {len(frame):>7,} rows")
        if not any(item.stops for item in outcome.findings):
            outcome.metrics |= {f"validate/{dataset}_{name}": value
                                for name, value in statistics(dataset, frame).items()}
        parts.append(pd.DataFrame({"prompt": frame["prompt"], "user_id": frame["user_id"],
                                   "user": frame["user"],
                                   "row": frame.index, "place": dataset + "/" + frame["side"], "dataset": dataset}))
    both = pd.concat(parts, ignore_index=True)
    run(CROSS, across, files, both, f"{'all datasets':<16} {len(both):>7,} rows")
    return outcome


def statistics(dataset: str, frame: "pd.DataFrame") -> dict[str, float]:
    """Metrics of a valid dataset, to compare its versions."""
    values: dict[str, float] = {"rows": len(frame), "users": frame["user_id"].nunique(),
                               "mean_prompt_chars": round(float(frame["prompt"].str.len().mean()), 2)}
    if dataset == "sft":
        values["mean_completion_chars"] = round(float(frame["completion"].str.len().mean()), 2)
    if dataset == "rm":
        rankings = frame["ranks"].dropna()
        pairs = sum(k * (k - 1) // 2 for k in map(len, rankings))
        tied = sum(count * (count - 1) // 2 for ranks in rankings for count in Counter(ranks).values())
        values |= {"labelers": frame["labeler_id"].nunique(), "mean_k": round(float(frame["k"].mean()), 4),
                  "tied_pairs": round(tied / max(1, pairs), 4)}
    return {name: value for name, value in values.items() if value == value}  # the means of an empty file are NaN


def files_in(folder: Path) -> dict[str, Path]:
    """The dataset files of a folder, plain or compressed."""
    files = {}
    for name in KEYS:
        for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
            if file.is_file():
                files[name] = file
                break
    return files


def row_entries(findings: Sequence[Finding], files: dict[str, Path]) -> list[dict[str, Any]]:
    """{"dataset", "row", "rule", "message"} per finding and row (row None: the whole file), sorted."""
    names = {file: name for name, file in files.items()}
    entries: list[dict[str, Any]] = []
    for finding in findings:
        if not finding.rows:
            entries.append({"dataset": names[finding.file], "row": None, "rule": finding.rule,
                            "message": finding.message})
        sentence = finding.message.split(";")[0].split(": ", 1)[-1]
        for row, detail in zip(finding.rows, finding.details, strict=True):
            entries.append({"dataset": names[finding.file], "row": row, "rule": finding.rule,
                            "message": f"{sentence}: {detail}"})
    return sorted(entries, key=lambda entry: (list(KEYS).index(entry["dataset"]), entry["row"] or 0, entry["rule"]))
