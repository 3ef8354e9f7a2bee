"""The fields of a source description (profiles/sources/<name>.yaml) with their types, limits and help texts."""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.params import param

Layout = Literal["columns", "dolly", "no_robots", "dolly_hhrlhf", "nectar", "oasst_trees", "oasst_messages", "hh_rlhf",
                 "ultrafeedback", "helpsteer", "alpaca", "sharegpt", "openai_messages", "arena"]


@dataclass(frozen=True)
class Entry:
    """Rows for one role: a dataset of the hub, or files."""

    dataset: str = param("", "name of a hub dataset, or a folder with the same layout or that save_to_disk wrote")
    revision: str = param("", "commit of the hub dataset, 40 hex digits")
    config: str = param("", "configuration of the dataset, if it has several")
    data_dir: str = param("", "folder inside the dataset")
    split: str = param("train", "splits of the dataset to read, joined by +")
    files: str = param("", "a file or a pattern with * or ?, relative to the description")
    format: Literal["auto", "jsonl", "json", "parquet", "arrow", "csv", "tsv", "text"] = param(
        "auto", "auto: by the file name")
    encoding: str = param("", "encoding of text files, e.g. cp1252; empty: UTF-8, or what a byte order mark says")
    delimiter: str = param("", "what separates the columns of a CSV file; empty: a comma, of .tsv a tab")
    quotes: bool = param(True, "whether quotation marks enclose values in a CSV file, or are plain characters")
    escape: str = param("", "character before a quotation mark inside a value of a CSV file; empty: it is doubled")
    decimal: Literal[".", ","] = param(".", "the decimal mark of scores and ranks that are text")
    rows: str = param("", "key of the list of rows in a JSON object that has several lists")
    orient: Literal["", "index", "columns", "split"] = param("", "pandas' orient of a JSON object that has no list")
    layout: Layout = param("columns", "how a row is read")
    columns: dict[str, str | list[str]] = param({}, "field: its column, for layout columns; several columns are joined")
    json_columns: list[str] = param([], "columns whose text is JSON that is to be read; other texts stay as they are")
    group_by: str | list[str] = param("", "column whose equal values make one ranking of several rows")
    preference: dict[str, Any] = param({}, "column of votes, and its values for first, second and tie")
    where: dict[str, Any] = param({}, "column: value that a row must have to be read; a.b is key b of column a")
    tool_turns: Literal["quarantine", "drop", "keep"] = param(
        "quarantine", "rows with calls of tools, or only these turns; keep: in the model's own format, with `tools`")
    use_cases: dict[str, str] = param({}, "value of the use-case column: one of the ten use cases")
    use_case: str = param("", "use case of all rows, whatever a column says")
    source: Literal["", "labeler", "customer"] = param("", "who wrote the prompts; empty: the default of the layout")
    labeler: str = param("", "labeler_id of all rankings, whatever a column says")
    from_rankings: bool = param(False, "for sft and ppo: rows are comparisons, read as for rm; sft takes the best "
                                "completion of each, of equal ones the first, and ppo the prompt")

    def read_as(self, role: str) -> str:
        """The role whose rows these are, where the entry stands under `role`."""
        return "rm" if self.from_rankings else role

    def is_table(self) -> bool:
        """Whether its rows come from Parquet, Arrow or a dataset, where every object of a column has the same keys."""
        return bool(self.dataset) or self.format in ("parquet", "arrow") or self.files.endswith((".parquet", ".arrow"))

    def groups(self) -> list[str]:
        """The columns of `group_by`."""
        return [self.group_by] if isinstance(self.group_by, str) and self.group_by else list(self.group_by)

    def column_paths(self, field: str) -> list[str]:
        """The columns that are mapped to a field."""
        mapped = self.columns.get(field, [])
        return [mapped] if isinstance(mapped, str) else mapped

    def paths(self) -> list[str]:
        """All columns that the description names, each once."""
        mapped = [path for field in self.columns for path in self.column_paths(field)]
        vote = [self.preference["column"]] if self.preference else []
        return list(dict.fromkeys([*mapped, *self.groups(), *vote, *self.where, *self.json_columns]))


@dataclass(frozen=True)
class RulesParams:
    """The data rules [InstructGPT §3.2, App. C]."""

    valid_share: float = param(0.1, "share of users whose rows go to valid, if no column has the split", ge=0, le=1)
    rows: Literal["all", "paper"] = param("all", "all, or at most as many per dataset and split as InstructGPT")
    max_lost_share: float = param(0.2, "share of a role's rows that quarantine and rules other than subsample may take",
                                  ge=0, le=1)
    max_lost_shares: dict[str, float] = param({}, "rule, or quarantine: share that it may take beside max_lost_share")
    max_prompts_per_user: int = param(200, "maximum prompts per user in a dataset", ge=1)
    near_duplicates: Literal["drop", "keep"] = param("drop", "SFT and PPO prompts that are near duplicates")
    near_duplicate_chars: int = param(40, "near duplicates share a last sentence of at least this many characters ...",
                                      ge=1)
    near_duplicate_share: float = param(0.9, "... that is at least this share of the longer one", gt=0, le=1)
    merge_rankings: bool = param(False, "merge rankings of a prompt by one labeler whose orders agree (at most 9)")
    language: str = param("en", "ISO 639-1 code of the language of the prompts")
    min_language_share: float = param(1.0, "prompts wholly in other languages are dropped until this share is left",
                                      ge=0, le=1)
    personal_data: Literal["drop", "keep"] = param("drop", "train rows with personal data or secrets")
    broken_endings: Literal["quarantine", "keep"] = param("quarantine", "demonstrations that break off")
    special_tokens: Literal["quarantine", "keep"] = param("quarantine", "texts with a special token of a chat format")
    min_k: int = param(2, "minimum completions per ranking", ge=2, le=9)
    tokenizer: str = param("", "tokenizer (folder or name) that counts tokens; empty: no token limits")
    max_prompt_tokens: int = param(1000, "longest prompt, tokens", ge=1)
    max_completion_tokens: int = param(1000, "longest completion, tokens", ge=1)
    max_prompt_chars: int = param(100_000, "longest prompt, characters", ge=1)
    max_completion_chars: int = param(100_000, "longest completion, characters", ge=1)


@dataclass(frozen=True)
class Source:
    """A source description: the entries of each role, and the rules."""

    sft: list[Entry]
    rm: list[Entry]
    ppo: list[Entry]
    corpus: list[Entry]
    rules: RulesParams
