"""What a source description (profiles/sources/<name>.yaml) may say: typed, with the limits and help of each field."""

from dataclasses import dataclass
from typing import Literal

from rlhf.params import param

Layout = Literal["columns", "dolly", "no_robots", "dolly_hhrlhf", "nectar", "oasst_trees", "oasst_messages", "hh_rlhf"]
ROLES = ("sft", "rm", "ppo")


@dataclass(frozen=True)
class Entry:
    """One set of rows for one role: of a dataset of the hub, or of files."""

    dataset: str = param("", "a dataset's name on the hub, or a folder laid out like one")
    revision: str = param("", "the commit of the hub's dataset, 40 hex digits: a branch moves, a commit does not")
    config: str = param("", "the dataset's configuration, where it has several")
    data_dir: str = param("", "folder inside the dataset")
    split: str = param("train", "the dataset's splits to read, joined by +")
    files: str = param("", "a file, or a pattern with * or ?; relative to the description")
    format: Literal["auto", "jsonl", "parquet", "csv", "tsv"] = param("auto", "auto: by the file's name")
    layout: Layout = param("columns", "how a row is read")
    columns: dict[str, str] = param({}, "field: the column that holds it (layout columns)")
    where: dict[str, str] = param({}, "column: the value that a row must have to be read; a.b looks inside a")
    use_cases: dict[str, str] = param({}, "value of the use-case column: one of the ten use cases")
    use_case: str = param("", "use case of all rows, where no column says it")
    source: Literal["", "labeler", "customer"] = param("", "who wrote the prompts; empty: what the layout knows")
    labeler: str = param("", "labeler_id of all rankings, where no column says it")


@dataclass(frozen=True)
class RulesParams:
    """The data rules [InstructGPT §3.2, App. C]."""

    valid_share: float = param(0.1, "share of users whose rows are valid ones, where no column says so", ge=0, le=1)
    rows: Literal["all", "paper"] = param("all", "paper: no more rows of a dataset and split than InstructGPT had")
    max_prompts_per_user: int = param(200, "prompts of one user in a dataset", ge=1)
    near_duplicate_chars: int = param(40, "a shared prefix this long makes prompts near duplicates ...", ge=1)
    near_duplicate_share: float = param(0.9, "... where it is this share of the longer one", gt=0, le=1)
    min_english_share: float = param(1.0, "prompts in other languages are dropped until this share is English",
                                     ge=0, le=1)
    personal_data: Literal["drop", "keep"] = param("drop", "train rows that hold personal data")
    min_k: int = param(2, "least completions of a ranking", ge=2, le=9)
    tokenizer: str = param("", "the model's tokenizer (folder or name), to count tokens with; empty: do not")
    max_prompt_tokens: int = param(1000, "longest prompt, tokens", ge=1)
    max_completion_tokens: int = param(1000, "longest completion, tokens", ge=1)
    max_prompt_chars: int = param(100_000, "longest prompt, characters", ge=1)
    max_completion_chars: int = param(100_000, "longest completion, characters", ge=1)


@dataclass(frozen=True)
class Source:
    """A source description: what is read for each role, and the rules."""

    sft: list[Entry]
    rm: list[Entry]
    ppo: list[Entry]
    corpus: list[Entry]
    rules: RulesParams
