"""Reads a source description (profiles/sources/<name>.yaml) into the entries of `rlhf.curation.sources`."""

from collections.abc import Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from mlops.config.inputs import tokenizer_of
from mlops.config.loader import check_section, read_yaml, unknown_key
from rlhf.curation.loss import check_rules
from rlhf.curation.sources.columns import COMMON_FIELDS, FIELDS, needed
from rlhf.curation.sources.layouts import LAYOUT_ROLES
from rlhf.curation.sources.paths import is_bad_comparison
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
    rules = check_section(RulesParams, content.get("rules") or {}, path, "rules")
    try:
        check_rules(rules)
    except ValueError as error:
        raise UserError(f"{path}: rules.{error}") from None
    return Source(**entries, rules=replace(rules, tokenizer=tokenizer_of(rules.tokenizer, path.parent)))


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
    if entry.from_rankings and role not in ("sft", "ppo"):
        raise UserError(f"{path}: {name}.from_rankings: is for sft and ppo, which take their rows from comparisons so")
    role = entry.read_as(role)
    if role not in LAYOUT_ROLES[entry.layout]:
        fits = ", ".join(layout for layout, roles in LAYOUT_ROLES.items() if role in roles)
        raise UserError(f"{path}: {name}.layout = {entry.layout!r}: has no data for {role}; must be one of {fits}")
    known = FIELDS[role] if role == "corpus" else (*FIELDS[role], *COMMON_FIELDS)
    for field in entry.columns:
        if field not in known:
            raise unknown_key(path, f"{name}.columns.{field}", list(known))
    for case in [*entry.use_cases.values(), *([entry.use_case] if entry.use_case else [])]:
        if case not in USE_CASE_PERCENT:
            raise UserError(f"{path}: {name}: use case {case!r} must be one of {', '.join(USE_CASE_PERCENT)}")
    try:
        _check_files(entry, values, path)
        _check_preference(entry)
        _check_where(entry)
        _check_columns(entry, role)
        _check_combinations(entry, role)
    except ValueError as error:
        raise UserError(f"{path}: {name}{error}") from None
    return entry


def _check_files(entry: Entry, values: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for keys that say how something else is read, and for a pattern that is the description."""
    unused = ("revision", "config", "data_dir", "split") if entry.files else (
        "format", "encoding", "delimiter", "quotes", "escape", "decimal", "rows", "orient")
    for key in unused:
        if key in values:
            raise ValueError(f".{key}: cannot be combined with {'files' if entry.files else 'dataset'}")
    if entry.encoding:
        try:
            if not "a".encode(entry.encoding):
                raise LookupError
        except (LookupError, UnicodeError):
            raise ValueError(f".encoding = {entry.encoding!r}: is no encoding; write e.g. cp1252 or utf-16") from None
    if "delimiter" in values and len(entry.delimiter) != 1:
        raise ValueError(f".delimiter = {entry.delimiter!r}: must be one character")
    if "escape" in values and (len(entry.escape) != 1 or entry.escape == '"'):
        raise ValueError(f".escape = {entry.escape!r}: must be one character other than a quotation mark")
    if entry.files and path.is_file() and any(
            path.samefile(path.parent / name) for name in [entry.files, *glob(entry.files, root_dir=path.parent,
                                                                              recursive=True)]
            if (path.parent / name).is_file()):
        raise ValueError(f".files = {entry.files!r}: names this description itself; name the files with your rows")


def _check_preference(entry: Entry) -> None:
    vote = entry.preference
    if not vote:
        return
    for key in vote:
        if key not in ("column", "first", "second", "tie"):
            raise ValueError(f".preference.{key}: unknown key; known keys: column, first, second, tie")
    for key in ("column", "first", "second"):
        if vote.get(key) is None:
            raise ValueError(f".preference: needs {key}")
    if not isinstance(vote["column"], str):
        raise ValueError(f".preference.column = {vote['column']!r}: must be a name")
    choices = [str(item) for key in ("first", "second", "tie") if key in vote
               for item in (vote[key] if isinstance(vote[key], list) else [vote[key]])]
    for choice in choices:
        if choices.count(choice) > 1:
            raise ValueError(f".preference: {choice} stands twice; a value has one meaning")


def _check_where(entry: Entry) -> None:
    for column, value in entry.where.items():
        if isinstance(value, Mapping) and list(value) != ["not"]:
            raise ValueError(f".where.{column}: must be a value, a list of values, null, or not: and one of these")
        said = value["not"] if isinstance(value, Mapping) else value
        for item in said if isinstance(said, list) else [said]:
            if isinstance(item, str) and item.startswith(("!=", "! ")):
                raise ValueError(f".where.{column} = {item!r}: write {{not: value}}")
            if is_bad_comparison(item):
                raise ValueError(f".where.{column} = {item!r}: < and > compare with a number; for other values make a "
                                 "column of true and false in your data")


def _check_columns(entry: Entry, role: str) -> None:
    """Raises ValueError for a column map without the role's required fields, or with ones that contradict."""
    mapped = set(entry.columns)
    if entry.columns and entry.layout != "columns":
        raise ValueError(f".columns: cannot be combined with layout {entry.layout} (fixed columns)")
    for field, names in entry.columns.items():
        if not names:
            raise ValueError(f".columns.{field}: names no column")
        if isinstance(names, list) and field not in ("prompt", "completions", "scores", "ranks", "system", "text"):
            raise ValueError(f".columns.{field}: must be one column; several are for prompt, system, text, "
                             "completions, scores and ranks")
    if not mapped:
        return
    pair = next((field for field in ("chosen", "rejected") if field in mapped), "")
    for field, others in {"messages": ("prompt", "completion"), "ranks": ("scores",), "rank": ("score",),
                          pair: ("completions", "ranks", "scores", "completion", "score", "rank"),
                          "completions": ("completion", "score", "rank")}.items():
        clash = [other for other in others if other in mapped] if field in mapped else []
        if clash:
            raise ValueError(f".columns: {field} cannot be combined with {', '.join(clash)}; remove one")
    if not any(set(fields) <= mapped for fields in needed(role, entry)):
        ways = "; or ".join(" and ".join(sorted(fields)) for fields in needed(role, entry))
        single = "; completion with score or rank needs group_by" if "completion" in mapped and role == "rm" else ""
        raise ValueError(f".columns: needs {ways}{single}")
    texts, numbers = entry.columns.get("completions"), entry.columns.get("scores", entry.columns.get("ranks"))
    if isinstance(texts, list) and isinstance(numbers, list) and len(texts) != len(numbers):
        raise ValueError(f".columns: {len(texts)} completions, {len(numbers)} scores or ranks")
    if entry.preference and isinstance(texts, list) and len(texts) != 2:
        raise ValueError(f".columns.completions: {len(texts)} columns, a preference needs 2")


def _check_combinations(entry: Entry, role: str) -> None:
    """Raises ValueError for keys that nothing uses."""
    columns = entry.columns
    for key in ("group_by", "preference"):
        if getattr(entry, key) and (role != "rm" or not columns):
            raise ValueError(f".{key}: is for rm, with columns")
    if entry.preference:
        clash = [field for field in ("scores", "ranks", "chosen", "rejected") if field in columns]
        if entry.group_by or clash:
            raise ValueError(f".preference: cannot be combined with {', '.join(clash) or 'group_by'}; remove one")
    if entry.labeler and role != "rm":
        raise ValueError(".labeler: is for rm")
    for constant, field in (("labeler", "labeler_id"), ("source", "source"), ("use_case", "use_case")):
        if getattr(entry, constant) and field in columns:
            raise ValueError(f".{constant}: cannot be combined with columns.{field}; remove one")
    if entry.use_cases and (entry.layout != "columns" or (columns and "use_case" not in columns)):
        raise ValueError(".use_cases: needs columns.use_case")
