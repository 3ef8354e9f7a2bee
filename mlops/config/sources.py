"""Reads a source description (profiles/sources/<name>.yaml) into the entries of `rlhf.curation.sources`."""

from pathlib import Path
from typing import Any

from mlops.config.loader import check_section, read_yaml, unknown_key
from rlhf.curation.sources.layouts import COMMON_FIELDS, FIELDS, LAYOUT_ROLES
from rlhf.curation.sources.spec import Entry, RulesParams, Source
from rlhf.data.schema import USE_CASE_PERCENT
from rlhf.errors import UserError
from rlhf.params import IngestParams

ROLES = tuple(FIELDS)
KEYS = (*ROLES, "rules", "embedded")


def load_source(path: Path) -> Source | IngestParams:
    """The description in `path`; IngestParams where it describes the embedded source.

    Raises UserError, one line, for unknown keys, values out of range and contradictions.
    """
    content = read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise unknown_key(path, key, list(KEYS))
    if "embedded" in content:
        if len(content) > 1:
            raise UserError(f"{path}: embedded: cannot be combined with other keys; remove them")
        ingest: IngestParams = check_section(IngestParams, content["embedded"] or {}, path, "embedded")
        if ingest.source != "embedded" or ingest.spec:
            raise UserError(f"{path}: embedded: source and spec are not allowed here")
        return ingest
    entries = {role: _entries(content.get(role), path, role) for role in ROLES}
    if not any(entries[role] for role in ROLES if role != "corpus"):
        raise UserError(f"{path}: nothing to read; add at least one of sft, rm, ppo")
    return Source(**entries, rules=check_section(RulesParams, content.get("rules") or {}, path, "rules"))


def _entries(content: Any, path: Path, role: str) -> list[Entry]:
    if content is None:
        return []
    if not isinstance(content, list):
        raise UserError(f"{path}: {role}: must be a list of entries, each with a dataset or files")
    return [_entry(values, path, role, f"{role}[{number}]") for number, values in enumerate(content, start=1)]


def _entry(values: Any, path: Path, role: str, name: str) -> Entry:
    entry: Entry = check_section(Entry, values, path, name)
    if bool(entry.dataset) == bool(entry.files):
        raise UserError(f"{path}: {name}: must have either dataset or files")
    if role not in LAYOUT_ROLES[entry.layout]:
        fits = ", ".join(layout for layout, roles in LAYOUT_ROLES.items() if role in roles)
        raise UserError(f"{path}: {name}.layout = {entry.layout!r}: has no data for {role}; must be one of {fits}")
    known = FIELDS[role] if role == "corpus" else (*FIELDS[role], *COMMON_FIELDS)
    for field in entry.columns:
        if field not in known:
            raise unknown_key(path, f"{name}.columns.{field}", list(known))
    if entry.columns and entry.layout != "columns":
        raise UserError(f"{path}: {name}.columns: cannot be combined with layout {entry.layout} (fixed columns)")
    for case in [*entry.use_cases.values(), *([entry.use_case] if entry.use_case else [])]:
        if case not in USE_CASE_PERCENT:
            raise UserError(f"{path}: {name}: use case {case!r} must be one of {', '.join(USE_CASE_PERCENT)}")
    _check_columns(entry, path, role, name)
    return entry


def _check_columns(entry: Entry, path: Path, role: str, name: str) -> None:
    """Raises UserError for a column map without the role's required fields."""
    mapped = set(entry.columns)
    if not mapped:
        return
    enough = {
        "sft": [{"prompt", "completion"}, {"messages"}],
        "rm": [{"prompt", "completions", "ranks"}, {"prompt", "completions", "scores"}, {"chosen", "rejected"}],
        "ppo": [{"prompt"}, {"messages"}],
        "corpus": [{"text"}],
    }[role]
    if not any(fields <= mapped for fields in enough):
        ways = "; or ".join(" and ".join(sorted(fields)) for fields in enough)
        raise UserError(f"{path}: {name}.columns: needs {ways}")
