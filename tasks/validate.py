"""Checks the three datasets with Great Expectations before anything is trained on them.

    python -m tasks.validate

The rules are in `tasks.expectations`. Data Docs go to reports/data_docs/, also where a rule fails.
"""

import html
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.schema import KEYS, read_rows
from rlhf.errors import UserError
from tasks.stage import Stage, run_stage

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when GX is imported

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.data_context import EphemeralDataContext

DOCS = "data_docs"
SHOWN_ROWS = 3
SHOWN_CHARS = 60
RESULT_FORMAT = {"result_format": "COMPLETE", "return_unexpected_index_query": False}
LIST_ITEMS = {"completions": str, "ranks": int}  # the keys that hold lists; all others hold text
JSON_NAMES = {str: "text", int: "an integer", float: "a number", bool: "a boolean", list: "a list", dict: "an object",
              type(None): "null"}

# Data Docs load their style and scripts from six public servers, and put values into the page as they are. This
# drops what is remote or runs, and forbids the browser to load anything, so that the pages read the same offline.
REMOTE = re.compile(r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer>.*?</footer>", re.DOTALL)
HEAD = """<head><meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body {font-family: sans-serif; margin: 2em} table {border-collapse: collapse} th {text-align: left}
td, th {padding: .3em .8em; border-bottom: 1px solid #ccc; vertical-align: top}
.fa-check-circle::before {content: "✓"; color: green} .fa-times::before {content: "✗"; color: #b00}
.text-danger {color: #b00} [data-toggle=collapse], .card:has([type=radio]) {display: none}</style>"""


@dataclass(frozen=True)
class Finding:
    """A rule that failed: the rows that break it (1-based, the line in the file), or what is wrong as a whole."""

    file: Path
    rule: str
    rows: list[int]
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def short(value: Any) -> str:
    """A value on one line, cut to a readable length."""
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


def key_problem(row: dict[str, Any], keys: list[str]) -> str:
    """What is wrong with the keys of a row; empty where nothing is."""
    if list(row) == keys:
        return ""
    wrong = [f"{key} is missing" for key in keys if key not in row]
    wrong += [f"{short(key)} is unknown" for key in row if key not in keys]
    return ", ".join(wrong) or "in another order: " + ", ".join(row)


def type_problem(row: dict[str, Any]) -> str:
    """What is wrong with the types of a row's values; empty where nothing is."""
    for key, value in row.items():
        wanted = list if key in LIST_ITEMS else str
        if type(value) is not wanted:
            return f"{key} is {JSON_NAMES[type(value)]}, not {JSON_NAMES[wanted]}"
        items = value if key in LIST_ITEMS else [value]
        item_type = LIST_ITEMS.get(key, str)
        for item in items:
            if type(item) is not item_type:
                return f"{key} holds {JSON_NAMES[type(item)]}, not only {JSON_NAMES[item_type]}"
        try:
            "".join(map(str, items)).encode()
        except UnicodeEncodeError:
            return f"{key} holds half of a surrogate pair, which is not text"
    return ""


def read_frame(dataset: str, file: Path) -> "pd.DataFrame":
    """The file as a frame whose index is the line number; what `tasks.expectations` needs is in further columns.

    A row with wrong keys or types is null but for `keys`, `types` and `split_source`. Raises UserError.
    """
    import pandas as pd

    from tasks.expectations import AS_DECLARED

    names = KEYS[dataset]
    nothing = dict.fromkeys(names)
    rows: list[dict[str, Any]] = []
    keys: list[str] = []
    types: list[str | None] = []
    for row in read_rows(file):
        keys.append(key_problem(row, names) or AS_DECLARED)
        types.append((type_problem(row) or AS_DECLARED) if keys[-1] == AS_DECLARED else None)
        rows.append(row if types[-1] == AS_DECLARED else nothing)
    lines = range(1, len(rows) + 1)
    text: dict[str, list[Any]] = {"keys": keys, "types": types}
    text |= {name: [row[name] for row in rows] for name in names if name not in LIST_ITEMS}
    text["split_source"] = [f"{row['split']}/{row['source']}" for row in rows]
    frame = pd.DataFrame({name: pd.Series(values, lines, dtype="str") for name, values in text.items()})
    if dataset == "rm":
        _add_rankings(frame, rows)
    return frame


def _add_rankings(frame: "pd.DataFrame", rows: list[dict[str, Any]]) -> None:
    """The lists as tuples, their lengths, and the two completions of each row that the rules on text look at."""
    import pandas as pd

    from tasks.expectations import is_visible

    def column(values: list[Any], dtype: str) -> "pd.Series":
        return pd.Series(values, frame.index, dtype=dtype)

    for name, length in (("completions", "k"), ("ranks", "rank_count")):
        lists = [None if row[name] is None else tuple(row[name]) for row in rows]
        frame[name] = column(lists, "object")
        frame[length] = column([None if items is None else len(items) for items in lists], "float")
    texts = [row["completions"] or [] for row in rows]
    frame["longest_completion"] = column([max(row, key=len, default=None) for row in texts], "str")
    blank_first = [sorted(row, key=is_visible) for row in texts]
    frame["blankest_completion"] = column([row[0] if row else None for row in blank_first], "str")


def statistics(dataset: str, frame: "pd.DataFrame") -> dict[str, float]:
    """What is worth following from one version of a valid dataset to the next."""
    found: dict[str, float] = {"rows": len(frame), "users": frame["user_id"].nunique(),
                               "mean_prompt_chars": round(float(frame["prompt"].str.len().mean()), 2)}
    if dataset == "sft":
        found["mean_completion_chars"] = round(float(frame["completion"].str.len().mean()), 2)
    if dataset == "rm":
        pairs = sum(k * (k - 1) // 2 for k in map(len, frame["ranks"]))
        tied = sum(count * (count - 1) // 2 for ranks in frame["ranks"] for count in Counter(ranks).values())
        found |= {"labelers": frame["labeler_id"].nunique(), "mean_k": round(float(frame["k"].mean()), 4),
                  "tied_pairs": round(tied / pairs, 4)}
    return found


def finding_of(file: Path, frame: "pd.DataFrame", result: "ExpectationValidationResult") -> Finding:
    """Names the rows and their values. Raises RuntimeError where the expectation itself broke: that is our mistake."""
    config = result.expectation_config
    assert config is not None
    meta, details = config.meta, result.result
    if "observed_value" in details:
        message = f"{config.description}; found {details['observed_value']}; {meta['fix']}"
        return Finding(file, meta["rule"], [], message)
    if "unexpected_index_list" not in details:
        raise RuntimeError(f"{file}: {meta['rule']}: {result.exception_info}")
    rows = [int(row) for row in details["unexpected_index_list"]]
    columns = [config.kwargs[key] for key in ("column", "column_A", "column_B") if key in config.kwargs]
    shown = []
    for row in rows[:SHOWN_ROWS]:
        values = [(name, frame.at[row, name] if name in ("keys", "types") else short(frame.at[row, name]))
                  for name in columns]
        shown.append(f"row {row} ({', '.join(f'{name} {value}' if values[1:] else value for name, value in values)})")
    more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
    count = "1 row breaks it" if len(rows) == 1 else f"{len(rows):,} rows break it"
    return Finding(file, meta["rule"], rows, f"{config.description}; {count}: {', '.join(shown)}{more}; {meta['fix']}")


def make_context(site: Path) -> "EphemeralDataContext":
    """GX in memory, its Data Docs in `site`."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    return gx.get_context(mode="ephemeral", project_config=DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),  # else a second site in /tmp
        analytics_enabled=False, progress_bars=ProgressBarsConfig(globally=False),
        data_docs_sites={DOCS: {
            "class_name": "SiteBuilder", "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.absolute())}}}))


def check(context: "EphemeralDataContext", suite: Any, file: Path, frame: "pd.DataFrame") -> tuple[int, list[Finding]]:
    """Runs a suite on a frame, keeps the result for Data Docs; returns the number of rules and what failed."""
    asset = context.data_sources.add_pandas(suite.name).add_dataframe_asset(file.name)
    batch = asset.add_batch_definition_whole_dataframe("file").get_batch({"dataframe": frame})
    result = batch.validate(suite, result_format=RESULT_FORMAT)
    findings = [finding_of(file, frame, item) for item in result.results if not item.success]
    keep_for_docs(context, suite, result)
    return len(result.results), findings


def keep_for_docs(context: "EphemeralDataContext", suite: Any, result: "ExpectationSuiteValidationResult") -> None:
    """Stores suite and result, the values shortened and escaped: GX writes them into the page as they are."""
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )

    for item in result.results:
        details = item.result
        for name in ("partial_unexpected_list", "unexpected_list"):
            details[name] = [html.escape(short(value)) for value in details.get(name, [])]
        for count in details.get("partial_unexpected_counts", []):
            count["value"] = html.escape(short(count["value"]))
        rows = details.get("unexpected_index_list", [])
        details["unexpected_index_list"] = rows[: len(details["unexpected_list"])]  # GX keeps 200 values, but all rows
    context.suites.add(suite)
    result.meta["run_id"] = run = RunIdentifier("validate", datetime.now(UTC))
    context.validation_results_store.set(
        ValidationResultIdentifier(ExpectationSuiteIdentifier(suite.name), run, suite.name), result)


def publish_docs(stage: Stage, context: "EphemeralDataContext", lines: list[str], findings: list[Finding]) -> None:
    """Builds the site, makes it work offline and puts it in reports/data_docs. GX's index needs scripts: not ours."""
    context.build_data_docs()
    site = stage.scratch / DOCS
    shutil.rmtree(site / "static", ignore_errors=True)
    for page in site.rglob("*.html"):
        page.write_text(REMOTE.sub("", page.read_text("utf-8")).replace("<head>", HEAD, 1), "utf-8")
    links = [f'<li><a href="{page}">{Path(page).stem}: {kind}</a>' for kind, folder in
             (("results", "validations"), ("rules", "expectations"))
             for page in sorted(str(path.relative_to(site)) for path in (site / folder).rglob("*.html"))]
    failed = [f"<li>{html.escape(str(finding))}" for finding in findings]
    (site / "index.html").write_text(
        f'<!DOCTYPE html><html lang="en">{HEAD}<meta charset="UTF-8"><title>Data Docs</title></head><body>'
        f"<h1>Data Docs</h1><pre>{chr(10).join(lines)}</pre><ul>{''.join(links)}</ul>"
        f"<h2>{len(failed) or 'No'} failed rules</h2><ul>{''.join(failed)}</ul></body></html>\n", "utf-8")
    stage.publish(DOCS, f"reports/{DOCS}")


def report(findings: list[Finding]) -> None:
    """Raises UserError where a rule failed; several get a line each on stderr first."""
    if len(findings) == 1:
        raise UserError(str(findings[0]))
    for finding in findings:
        print(f"validate: {finding}", file=sys.stderr)
    if findings:
        files = ", ".join(dict.fromkeys(str(finding.file) for finding in findings))
        raise UserError(f"{files}: {len(findings)} rules failed; first: {findings[0]}")


def validate(stage: Stage) -> None:
    """Checks every dataset, publishes Data Docs, and finishes only where all rules hold."""
    from tasks.expectations import SUITES

    scale, limits = stage.params.stages.ingest.scale, stage.params.stages.validate
    shutil.rmtree(stage.scratch / DOCS, ignore_errors=True)
    context = make_context(stage.scratch / DOCS)
    metrics: dict[str, float] = {"validate/success": 1, "validate/expectations": 0}
    lines, findings = [], []
    for dataset, suite_of in SUITES.items():
        file = Path(os.path.relpath(stage.root / "data" / f"{dataset}.jsonl"))
        frame = read_frame(dataset, file)
        rules, failed = check(context, suite_of(scale, limits), file, frame)
        findings += failed
        metrics["validate/expectations"] += rules
        lines.append(f"{file!s:<16} {len(frame):>7,} rows  {rules:>3} rules  "
                     + (f"{len(failed)} failed" if failed else "passed"))
        print(lines[-1], flush=True)
        if not findings:
            metrics |= {f"validate/{dataset}_{name}": value for name, value in statistics(dataset, frame).items()}
    publish_docs(stage, context, lines, findings)
    report(findings)
    stage.finish(metrics, [f"reports/{DOCS}"])


if __name__ == "__main__":
    run_stage("validate", validate)
