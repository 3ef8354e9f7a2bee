"""The rules of the datasets as Great Expectations suites: one per dataset, one across the three.

A rule is an expectation with a short name in `meta["rule"]`, name and sentence in `description`, the remedy in
`meta["fix"]`, and a severity: "stop" fails the stage, "warn" is only reported. docs/validation.md lists the rules.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from great_expectations import ExpectationSuite
from great_expectations.expectations import (
    ExpectColumnPairValuesToBeEqual,
    ExpectColumnValueLengthsToBeBetween,
    ExpectColumnValuesToBeBetween,
    ExpectColumnValuesToBeInSet,
    ExpectColumnValuesToNotBeInSet,
    ExpectTableRowCountToBeBetween,
)
from great_expectations.expectations.expectation import Expectation

from mlops.validation.expectations import (
    ExpectColumnSharesToBeNear,
    ExpectColumnTextToBeVisible,
    ExpectColumnValueCountsToBe,
    ExpectColumnValuesNotToRepeat,
    ExpectCompletionsNotToBeShared,
    ExpectGroupsToBeWithinQuota,
    ExpectGroupsToHaveOneValue,
    ExpectLabelersToRankByContent,
    ExpectPairsNotToRepeat,
    ExpectRankingsToPass,
)
from mlops.validation.leakage import ExpectPromptsNotToCrossSplits, ExpectUsersNotToCrossSplits
from mlops.validation.reader import AS_DECLARED
from rlhf.data.schema import MAX_K, SPLITS, USE_CASE_PERCENT, expected_rows
from rlhf.errors import UserError
from rlhf.params import ValidateParams

MIX_TOLERANCE = 1.0  # percentage points
MIX_MIN_ROWS = 1000  # with fewer rows, rounding alone exceeds the tolerance
STOP, WARN = "stop", "warn"
# "warn" by default, since a sound row may have it too; all others "stop".
WARNINGS = ("language", "personal_data_in_valid", "turn_marks", "repeated_prompt", "truncated", "shared_completion",
            "similar_texts_equal_ranks", "labelers")

LINE_RULES = {
    "line_length": ("no line has more than a million bytes", "check for a missing line break"),
    "null_bytes": ("no line contains a null byte", "rewrite the file"),
    "utf8": ("each line is UTF-8", "write the file in UTF-8"),
    "no_bom": ("the file has no byte order mark", "write the file in UTF-8 without one"),
    "line_ends": ("lines end in LF", "write the file with Unix line ends"),
    "no_blank_line": ("no line is blank", "remove the line"),
    "json": ("each line is JSON", "fix or remove the row"),
    "finite_numbers": ("numbers are finite", "fix the value"),
    "unique_keys": ("no key appears twice in a row", "remove one of them"),
    "json_object": ("each line is an object", "fix or remove the row"),
    "exact_keys": ("each row has the declared keys", "use the keys of docs/design.md"),
    "value_types": ("each value has its declared type", "use the declared type"),
    "transcripts": ("a prompt of several turns is a list of messages, no transcript",
                    "make the data again with `dvc repro data.dvc`, or write the turns as {role, content}"),
    "surrogates": ("texts have no lone surrogate", "fix or remove the row"),
    "key_order": ("keys are in their declared order", "use the order of docs/design.md"),
    "whole_file": ("the file is complete", "fetch it again"),
}


def rule(kind: type[Expectation], name: str, sentence: str, fix: str = "fix or remove the row", **kwargs: Any
         ) -> Expectation:
    """An expectation with its rule name, sentence and remedy."""
    return kind(meta={"rule": name, "fix": fix}, description=f"{name}: {sentence}", **kwargs)


def declared(column: str, name: str, sentence: str, fix: str = "fix or remove the row") -> Expectation:
    """The reader reports no problem in this column."""
    return rule(ExpectColumnValuesToBeInSet, name, sentence, fix, column=column, value_set=[AS_DECLARED])


def visible(column: str, name: str, what: str = "") -> Expectation:
    return rule(ExpectColumnTextToBeVisible, name, f"no {what or column} is blank", column=column)


def not_longer(column: str, name: str, what: str, limit: int, parameter: str) -> Expectation:
    return rule(ExpectColumnValueLengthsToBeBetween, name, f"no {what} has more than {limit} characters",
                f"shorten it, remove the row, or raise validate.{parameter}", column=column, max_value=limit)


def sound_ranking(name: str, sentence: str) -> Expectation:
    return rule(ExpectRankingsToPass, name, sentence, column_A="ranks", column_B="completions", test=name)


def common_rules(dataset: str, scale: float, limits: ValidateParams) -> list[Expectation]:
    """The rules of all three datasets."""
    rows = expected_rows(dataset, scale)
    sources = sorted({source for _, source in rows})
    rules = [rule(ExpectColumnValuesToNotBeInSet, name, sentence, fix, column="line", value_set=[name])
             for name, (sentence, fix) in LINE_RULES.items()]
    if limits.counts == "paper":
        rules += count_rules(rows)
    else:
        rules.append(rule(ExpectTableRowCountToBeBetween, "some_rows", "the file has a row",
                          "make the dataset again, or remove the file", min_value=1))
    return [
        *rules,
        rule(ExpectColumnValuesToBeInSet, "known_source", f"source is {' or '.join(sources)}",
             column="source", value_set=sources),
        rule(ExpectColumnValuesToBeInSet, "known_split", f"split is {' or '.join(SPLITS)}",
             column="split", value_set=list(SPLITS)),
        rule(ExpectColumnValuesToBeInSet, "known_use_case", f"use_case is one of {', '.join(USE_CASE_PERCENT)}",
             column="use_case", value_set=list(USE_CASE_PERCENT)),
        visible("prompt_id", "filled_prompt_id"),
        visible("user_id", "filled_user_id"),
        visible("prompt", "filled_prompt"),
        not_longer("prompt", "prompt_length", "prompt", limits.max_prompt_chars, "max_prompt_chars"),
        *repeat_rules(dataset),
        rule(ExpectGroupsToHaveOneValue, "user_in_one_split", "each user is in one split only",
             "move all rows of the user to one split", column_A="user", column_B="side"),
        rule(ExpectGroupsToBeWithinQuota, "prompts_per_user",
             f"no user has more than {limits.max_prompts_per_user} prompts",
             "remove rows of the user, or raise validate.max_prompts_per_user",
             column_A="user", column_B="prompt", most=limits.max_prompts_per_user),
        declared("characters", "characters", "texts contain no control or hidden character, byte order mark or U+FFFD"),
        declared("special_tokens", "special_tokens", "texts contain no special token of a chat format",
                 "remove the row, or the token from the text"),
        declared("personal_data", "personal_data", "train rows contain no personal data",
                 "remove the row, or the personal data from the text"),
        declared("personal_data_in_valid", "personal_data_in_valid", "valid rows contain no personal data",
                 "remove the row, or the personal data from the text"),
        declared("language", "language", f"prompts are in {language_name(limits.language)}",
                 "remove the row, translate it, or set validate.language"),
        declared("turn_marks", "turn_marks", "completions open no other turn, prompts hold no instruction template",
                 "remove the row, or end the completion before the mark"),
    ]


def language_name(code: str) -> str:
    """"English", or the ISO 639-1 code of another language."""
    return "English" if code == "en" else f"the language {code}"


def repeat_rules(dataset: str) -> list[Expectation]:
    """What may appear once. Several rankings of a prompt are no fault: only an identical one is."""
    if dataset == "rm":
        return [rule(ExpectGroupsToHaveOneValue, "unique_prompt_id", "each prompt_id has one prompt",
                     column_A="prompt_id", column_B="prompt"),
                rule(ExpectColumnValuesNotToRepeat, "unique_comparison",
                     "no labeler has the same ranking of the same completions twice", "remove one of them",
                     column="comparison")]
    return [rule(ExpectColumnValuesNotToRepeat, "unique_prompt_id", "each prompt_id appears once", column="prompt_id"),
            rule(ExpectPairsNotToRepeat, "unique_prompt", "each prompt appears once in its split",
                 column_A="prompt", column_B="split")]


def count_rules(rows: dict[tuple[str, str], int]) -> list[Expectation]:
    """The paper's number of rows by split and source, and its mix of use cases."""
    rules = [
        rule(ExpectColumnValueCountsToBe, "row_counts", "each split and source has its number of rows",
             "restore the file with `dvc checkout data.dvc`, set ingest.scale to its scale, or set "
             "validate.counts to none",
             column="split_source", counts={"/".join(key): count for key, count in rows.items()})]
    if sum(rows.values()) > MIX_MIN_ROWS:
        rules.append(rule(ExpectColumnSharesToBeNear, "use_case_mix",
                          f"each use case has its share of the rows, within {MIX_TOLERANCE:g} percentage point",
                          "add or remove rows of these use cases", column="use_case", percent=USE_CASE_PERCENT,
                          tolerance=MIX_TOLERANCE))
    return rules


def model_rules(max_tokens: int) -> list[Expectation]:
    """What the model that is trained must be able to read."""
    return [
        rule(ExpectColumnValuesToBeBetween, "fits_model", f"prompt and completion have at most {max_tokens} tokens",
             "shorten it or remove the row", column="tokens", max_value=max_tokens),
        declared("chat_template", "chat_template", "the model's chat template takes each conversation",
                 "remove the row or the turn, or give the model a template that takes it (its chat_template.jinja)")]


def sft_rules(scale: float, limits: ValidateParams) -> list[Expectation]:
    """Demonstrations."""
    return [
        *common_rules("sft", scale, limits),
        visible("completion", "filled_completion"),
        not_longer("completion", "completion_length", "completion", limits.max_completion_chars,
                   "max_completion_chars"),
        declared("repeated_prompt", "repeated_prompt", "no completion is its prompt or begins with it",
                 "remove the row, or the prompt from the completion"),
        declared("truncated", "truncated", "no completion breaks off", "remove the row, or complete it"),
        shared_completion(),
    ]


def shared_completion() -> Expectation:
    return rule(ExpectCompletionsNotToBeShared, "shared_completion",
                "no completion is the same for many prompts", "remove most of its rows", column="answers")


def rm_rules(scale: float, limits: ValidateParams) -> list[Expectation]:
    """Rankings of K completions."""
    return [
        *common_rules("rm", scale, limits),
        visible("labeler_id", "filled_labeler_id"),
        rule(ExpectColumnValuesToBeBetween, "completion_count", f"each row has {limits.min_k} to {MAX_K} completions",
             "fix or remove the row, or set validate.min_k to 2 for pairs",
             column="k", min_value=limits.min_k, max_value=MAX_K),
        rule(ExpectColumnPairValuesToBeEqual, "rank_count", "each row has as many ranks as completions",
             column_A="rank_count", column_B="k", ignore_row_if="either_value_is_missing"),
        visible("blankest_completion", "filled_completions", "completion"),
        not_longer("longest_completion", "completion_length", "completion", limits.max_completion_chars,
                   "max_completion_chars"),
        sound_ranking("dense_ranks", "ranks are 1, 2, ... without a gap, ties share a rank"),
        sound_ranking("some_preference", "not all completions of a row share a rank"),
        sound_ranking("equal_texts_equal_ranks", "equal completions of a row share a rank"),
        sound_ranking("similar_texts_equal_ranks",
                      "completions of a row that differ in case and blanks only share a rank"),
        declared("repeated_prompt", "repeated_prompt", "no best completion is its prompt"),
        shared_completion(),
        rule(ExpectLabelersToRankByContent, "labelers", "no labeler ranks by position or at random",
             "look at the labeler's rankings, and remove them", column="answers"),
    ]


def ppo_rules(scale: float, limits: ValidateParams) -> list[Expectation]:
    """Prompts alone."""
    return common_rules("ppo", scale, limits)


def cross_rules(limits: ValidateParams) -> list[Expectation]:
    """The rules between train and valid across all datasets."""
    fix = "remove the row, or move all rows of it to one side"
    return [
        rule(ExpectPromptsNotToCrossSplits, "prompt_leak", "no valid prompt is a train prompt, in any dataset", fix,
             column_A="prompt", column_B="place"),
        rule(ExpectPromptsNotToCrossSplits, "near_duplicate_leak",
             "no valid prompt is a near duplicate of a train prompt", fix, column_A="prompt", column_B="place",
             chars=limits.near_duplicate_chars, share=limits.near_duplicate_share),
        rule(ExpectUsersNotToCrossSplits, "user_leak", "no user is in train of one dataset and valid of another", fix,
             column_A="user", column_B="place"),
    ]


RULES = {"sft": sft_rules, "rm": rm_rules, "ppo": ppo_rules}


def name_of(item: Expectation) -> str:
    """The rule's short name."""
    assert item.meta is not None
    return str(item.meta["rule"])


def suite_of(name: str, rules: Iterable[Expectation], limits: ValidateParams) -> ExpectationSuite:
    """The suite of the rules, with severity and `mostly` from the parameters. Raises UserError where a rule about the
    whole file has a `mostly`."""
    chosen = []
    for item in rules:
        named = name_of(item)
        warns = named in limits.warn or (named in WARNINGS and named not in limits.stop)
        item.meta = {**(item.meta or {}), "severity": WARN if warns else STOP}
        if named in limits.mostly:
            if not hasattr(item, "mostly"):
                raise UserError(f"validate.mostly: {named} is about the whole file and cannot have a share of rows")
            item.mostly = limits.mostly[named]
        chosen.append(item)
    return ExpectationSuite(name, expectations=chosen)


def rule_names() -> list[str]:
    """The names of all rules, whatever the parameters."""
    limits = [ValidateParams(counts="paper"), ValidateParams(counts="none")]
    rules = [item for make in RULES.values() for some in limits for item in make(1.0, some)]
    return sorted({name_of(item) for item in [*rules, *cross_rules(limits[0]), *model_rules(0)]})


def check_names(limits: ValidateParams, known: Sequence[str]) -> None:
    """Raises UserError for a rule in validate.mostly, warn or stop that does not exist."""
    for parameter in ("mostly", "warn", "stop"):
        for name in getattr(limits, parameter):
            if name not in known:
                raise UserError(f"validate.{parameter}: unknown rule {name!r}; known: {', '.join(known)}")
