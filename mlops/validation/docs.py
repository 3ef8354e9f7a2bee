"""Great Expectations in memory, and its Data Docs as a static site that works offline."""

import html
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.validation.reader import short

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when GX is imported

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.data_context import EphemeralDataContext

DOCS = "data_docs"
NO_TIME = datetime(2000, 1, 1, tzinfo=UTC)  # of a run: the same data give the same pages

# Data Docs load styles and scripts from six public servers. This removes remote resources and scripts, and a content
# security policy forbids the browser to load anything, so that the pages look the same offline.
# What differs from one run to the next on the same data: random ids of sections, when the data was read.
VARYING = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|(?<!/)\b\d{8}T\d{6}\.\d{6}Z|2000-01-01T00:00:00Z")
REMOTE = re.compile(r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer>.*?</footer>", re.DOTALL)
HEAD = """<head><meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body {font-family: sans-serif; margin: 2em} table {border-collapse: collapse} th {text-align: left}
td, th {padding: .3em .8em; border-bottom: 1px solid #ccc; vertical-align: top}
.fa-check-circle::before {content: "✓"; color: green} .fa-times::before {content: "✗"; color: #b00}
.text-danger {color: #b00} [data-toggle=collapse], .card:has([type=radio]) {display: none}</style>"""


def make_context(site: Path) -> "EphemeralDataContext":
    """GX in memory, with its Data Docs in `site`."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    folder = str(site.absolute()).replace("$", r"\$")  # GX takes $NAME for a variable
    return gx.get_context(mode="ephemeral", project_config=DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),  # else a second site in /tmp
        analytics_enabled=False, progress_bars=ProgressBarsConfig(globally=False),
        data_docs_sites={DOCS: {
            "class_name": "SiteBuilder", "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": folder}}}))


def keep_for_docs(context: "EphemeralDataContext", suite: Any, result: "ExpectationSuiteValidationResult") -> None:
    """Stores suite and result with shortened and escaped values, since GX does not escape them."""
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
        details["unexpected_index_list"] = rows[: len(details["unexpected_list"])]  # GX stores 200 values, but all rows
    context.suites.add(suite)
    result.meta["run_id"] = run = RunIdentifier("validate", NO_TIME)
    context.validation_results_store.set(
        ValidationResultIdentifier(ExpectationSuiteIdentifier(suite.name), run, suite.name), result)


@contextmanager
def _no_error_is_lost() -> Iterator[None]:
    """GX logs an error with its traceback and goes on to the next page; this raises RuntimeError with it."""
    logger, errors = logging.getLogger("great_expectations"), _Errors(logging.ERROR)
    logger.addHandler(errors)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(errors)
    if errors.messages:
        raise RuntimeError(f"Data Docs: {' '.join(errors.messages[0].split())[-300:]}")


class _Errors(logging.Handler):
    """Keeps the messages."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def build_docs(context: "EphemeralDataContext", site: Path, lines: list[str], failed: list[str]) -> None:
    """Builds the site, makes it work offline, and replaces GX's index page, which needs scripts."""
    with _no_error_is_lost():
        context.build_data_docs()
    shutil.rmtree(site / "static", ignore_errors=True)
    for page in site.rglob("*.html"):
        text = VARYING.sub("not-recorded", REMOTE.sub("", page.read_text("utf-8")))
        page.write_text(text.replace("<head>", HEAD, 1), "utf-8")
    links = [f'<li><a href="{page}">{Path(page).stem}: {kind}</a>' for kind, folder in
             (("results", "validations"), ("rules", "expectations"))
             for page in sorted(str(path.relative_to(site)) for path in (site / folder).rglob("*.html"))]
    items = [f"<li>{html.escape(message)}" for message in failed]
    (site / "index.html").write_text(
        f'<!DOCTYPE html><html lang="en">{HEAD}<meta charset="UTF-8"><title>Data Docs</title></head><body>'
        f"<h1>Data Docs</h1><pre>{html.escape(chr(10).join(lines))}</pre><ul>{''.join(links)}</ul>"
        f"<h2>{len(items) or 'No'} failed rules</h2><ul>{''.join(items)}</ul></body></html>\n", "utf-8")
