"""The rules of the three datasets: one Great Expectations suite a dataset, and the expectations that GX lacks.

`tasks.validate` reads a file into a frame, one column a key and some derived ones, and runs the suite on it. Each
rule is an expectation of its own: a short name in `meta["rule"]`, name and sentence in `description` and, in
`meta["fix"]`, what to do. A row whose keys or types are wrong is null in all other columns, so only the rule that it
breaks reports it: GX leaves nulls out.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import pandas as pd
from great_expectations import ExpectationSuite
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations import (
    ExpectColumnPairValuesToBeEqual,
    ExpectColumnValueLengthsToBeBetween,
    ExpectColumnValuesToBeBetween,
    ExpectColumnValuesToBeInSet,
)
from great_expectations.expectations.expectation import (
    ColumnAggregateExpectation,
    ColumnMapExpectation,
    ColumnPairMapExpectation,
    Expectation,
)
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    ColumnPairMapMetricProvider,
    column_condition_partial,
    column_pair_condition_partial,
)

from rlhf.data.schema import MAX_K, MIN_K, SPLITS, USE_CASE_PERCENT, expected_rows
from rlhf.params import ValidateParams

AS_DECLARED = "as declared"  # what the frame's columns `keys` and `types` hold for a well-formed row
MIX_TOLERANCE = 1.0  # percentage points
MIX_MIN_ROWS = 1000  # fewer rows stray further from the mix by rounding alone

PandasColumn = Any  # a pandas Series; the row number is its index


class TextIsVisible(ColumnMapMetricProvider):
    condition_metric_name = "column_values.visible"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, **kwargs: Any) -> PandasColumn:
        return column.map(is_visible).astype(bool)


def is_visible(text: str) -> bool:
    """Whether the text has a character one can see: "", blanks of any alphabet and zero-width marks have none."""
    return any(character.isprintable() and not character.isspace() for character in text)


class ExpectColumnTextToBeVisible(ColumnMapExpectation):
    """Each text has at least one character that can be seen. (GX's regex runs on RE2 here: its \\s is ASCII only.)"""

    map_metric = "column_values.visible"


class ValueAppearsFirst(ColumnMapMetricProvider):
    condition_metric_name = "column_values.appears_first"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, **kwargs: Any) -> PandasColumn:
        return ~column.duplicated()


class ExpectColumnValuesNotToRepeat(ColumnMapExpectation):
    """Each value is new. Unlike GX's `unique` it reports the repeats and not the first: those are the rows to drop."""

    map_metric = "column_values.appears_first"


class ValueWithinQuota(ColumnMapMetricProvider):
    condition_metric_name = "column_values.within_quota"
    condition_value_keys = ("max_rows",)

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, max_rows: int, **kwargs: Any) -> PandasColumn:
        return column.groupby(column).cumcount() < max_rows


class ExpectColumnValuesToBeWithinQuota(ColumnMapExpectation):
    """No value has more than `max_rows` rows; the rows beyond that are reported."""

    max_rows: int
    map_metric = "column_values.within_quota"
    success_keys = ("max_rows", "mostly")


class GroupHasOneValue(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.group_has_one_value"

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, **kwargs: Any) -> PandasColumn:
        if column_A.empty:
            return pd.Series([], dtype=bool)
        sizes = pd.DataFrame({"group": column_A, "value": column_B}).value_counts(sort=False).reset_index()
        ordered = sizes.sort_values(["count", "value"], ascending=[False, True])
        usual = ordered.drop_duplicates("group").set_index("group")["value"]
        return column_B == column_A.map(usual)


class ExpectGroupsToHaveOneValue(ColumnPairMapExpectation):
    """All rows with the same column_A have the same column_B; rows that differ from most of theirs are reported."""

    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.group_has_one_value"
    success_keys = ("ignore_row_if", "mostly")


RANKING_TESTS: dict[str, Callable[[tuple[int, ...], tuple[str, ...]], bool]] = {
    "dense_ranks": lambda ranks, texts: set(ranks) == set(range(1, len(set(ranks)) + 1)),
    "some_preference": lambda ranks, texts: not ranks or set(ranks) != {1},
    "equal_texts_equal_ranks": lambda ranks, texts: len(set(zip(texts, ranks, strict=True))) == len(set(texts)),
}


class RankingPassesTest(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.ranking_passes"
    condition_value_keys = ("test",)

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, test: str, **kwargs: Any) -> PandasColumn:
        check = RANKING_TESTS[test]
        passed = [len(ranks) != len(texts) or check(ranks, texts)  # unequal lengths break a rule of their own
                  for ranks, texts in zip(column_A, column_B, strict=True)]
        return pd.Series(passed, index=column_A.index, dtype=bool)


class ExpectRankingsToPass(ColumnPairMapExpectation):
    """Each row's ranks and completions pass one of RANKING_TESTS.

    `dense_ranks`: the ranks are 1, 2, ... without a gap and ties share one (1, 2, 2, 3). `some_preference`: not all
    share rank 1, which would leave the reward model no pair to learn. `equal_texts_equal_ranks`: completions that
    are equal, letter by letter, have the same rank.
    """

    test: str
    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.ranking_passes"
    success_keys = ("test", "ignore_row_if", "mostly")


class ValueCountsExpectation(ColumnAggregateExpectation):
    """Base of the expectations over how often each value of a column appears; `deviations` says what is wrong."""

    metric_dependencies = ("column.value_counts",)

    def deviations(self, found: dict[str, int]) -> list[str]:
        raise NotImplementedError

    def _validate(self, metrics: dict[str, Any], runtime_configuration: dict[str, Any] | None = None,
                  execution_engine: Any = None) -> dict[str, Any]:
        counts = metrics["column.value_counts"]
        deviations = self.deviations({str(value): int(count) for value, count in counts.items()})
        return {"success": not deviations, "result": {"observed_value": "; ".join(deviations) or "as expected"}}


class ExpectColumnValueCountsToBe(ValueCountsExpectation):
    """The column has exactly `counts[value]` rows of each value.

    A row of no known value (its split is misspelled, its keys are wrong) is reported by the rule it breaks. Here it
    may fill a gap: with the right total and no value above its count, nothing but such rows can be amiss.
    """

    counts: dict[str, int]
    success_keys: ClassVar[tuple[str, ...]] = ("counts",)

    def deviations(self, found: dict[str, int]) -> list[str]:
        total, wanted = sum(found.values()), sum(self.counts.values())
        if total == wanted and all(found.get(value, 0) <= count for value, count in self.counts.items()):
            return []
        return [f"{found.get(value, 0)} {value} rows, expected {count}" for value, count in self.counts.items()
                if found.get(value, 0) != count] + [f"{total} rows in all, expected {wanted}"] * (total != wanted)


class ExpectColumnSharesToBeNear(ValueCountsExpectation):
    """Each value's share of the rows is within `tolerance` percentage points of `percent[value]`."""

    percent: dict[str, float]
    tolerance: float
    success_keys: ClassVar[tuple[str, ...]] = ("percent", "tolerance")

    def deviations(self, found: dict[str, int]) -> list[str]:
        total = sum(found.values())
        shares = {value: 100 * found.get(value, 0) / max(total, 1) for value in self.percent}
        return [f"{value} {shares[value]:.1f} %, expected {percent} %" for value, percent in self.percent.items()
                if total and abs(shares[value] - percent) > self.tolerance]


def rule(kind: type[Expectation], name: str, sentence: str, fix: str = "mend or remove the row", **kwargs: Any
         ) -> Expectation:
    """One expectation with its name, its sentence and what to do. `mostly` and `severity` may be passed on to GX."""
    return kind(meta={"rule": name, "fix": fix}, description=f"{name}: {sentence}", **kwargs)


def visible(column: str, name: str, what: str = "") -> Expectation:
    return rule(ExpectColumnTextToBeVisible, name, f"no {what or column} is blank", column=column)


def not_longer(column: str, name: str, what: str, limit: int, parameter: str) -> Expectation:
    return rule(ExpectColumnValueLengthsToBeBetween, name, f"no {what} has more than {limit} characters",
                f"shorten it, remove the row, or raise validate.{parameter}", column=column, max_value=limit)


def sound_ranking(name: str, sentence: str) -> Expectation:
    return rule(ExpectRankingsToPass, name, sentence, column_A="ranks", column_B="completions", test=name)


def common_rules(dataset: str, scale: float, limits: ValidateParams) -> list[Expectation]:
    """What holds for each of the three datasets."""
    rows = expected_rows(dataset, scale)
    sources = sorted({source for _, source in rows})
    rules = [
        rule(ExpectColumnValuesToBeInSet, "exact_keys", "each row has the declared keys in their order",
             "give the row the keys of docs/design.md", column="keys", value_set=[AS_DECLARED]),
        rule(ExpectColumnValuesToBeInSet, "value_types", "each value has its declared type",
             "give the value its type", column="types", value_set=[AS_DECLARED]),
        rule(ExpectColumnValueCountsToBe, "row_counts", "each split and source has its number of rows",
             "restore the file with `dvc checkout data.dvc`, or set ingest.scale to what it was made with",
             column="split_source", counts={"/".join(key): count for key, count in rows.items()}),
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
        rule(ExpectColumnValuesNotToRepeat, "unique_prompt_id", "each prompt_id appears once", column="prompt_id"),
        rule(ExpectColumnValuesNotToRepeat, "unique_prompt", "each prompt appears once", column="prompt"),
        rule(ExpectGroupsToHaveOneValue, "user_in_one_split", "each user is in one split only",
             "move all rows of the user to one split", column_A="user_id", column_B="split"),
        rule(ExpectColumnValuesToBeWithinQuota, "prompts_per_user",
             f"no user has more than {limits.max_prompts_per_user} prompts",
             "remove rows of the user, or raise validate.max_prompts_per_user",
             column="user_id", max_rows=limits.max_prompts_per_user),
    ]
    if sum(rows.values()) > MIX_MIN_ROWS:
        rules.append(rule(ExpectColumnSharesToBeNear, "use_case_mix",
                          f"each use case has its share of the rows, within {MIX_TOLERANCE:g} percentage point",
                          "add or remove rows of these use cases", column="use_case", percent=USE_CASE_PERCENT,
                          tolerance=MIX_TOLERANCE))
    return rules


def sft_suite(scale: float, limits: ValidateParams) -> ExpectationSuite:
    """Demonstrations."""
    return ExpectationSuite("sft", expectations=[
        *common_rules("sft", scale, limits),
        visible("completion", "filled_completion"),
        not_longer("completion", "completion_length", "completion", limits.max_completion_chars,
                   "max_completion_chars"),
    ])


def rm_suite(scale: float, limits: ValidateParams) -> ExpectationSuite:
    """Rankings of K completions."""
    return ExpectationSuite("rm", expectations=[
        *common_rules("rm", scale, limits),
        visible("labeler_id", "filled_labeler_id"),
        rule(ExpectColumnValuesToBeBetween, "completion_count", f"each row has {MIN_K} to {MAX_K} completions",
             column="k", min_value=MIN_K, max_value=MAX_K),
        rule(ExpectColumnPairValuesToBeEqual, "rank_count", "each row has as many ranks as completions",
             column_A="rank_count", column_B="k", ignore_row_if="either_value_is_missing"),
        visible("blankest_completion", "filled_completions", "completion"),
        not_longer("longest_completion", "completion_length", "completion", limits.max_completion_chars,
                   "max_completion_chars"),
        sound_ranking("dense_ranks", "ranks are 1, 2, ... without a gap, ties share one"),
        sound_ranking("some_preference", "not all completions of a row share a rank"),
        sound_ranking("equal_texts_equal_ranks", "equal completions of a row share a rank"),
    ])


def ppo_suite(scale: float, limits: ValidateParams) -> ExpectationSuite:
    """Prompts alone."""
    return ExpectationSuite("ppo", expectations=common_rules("ppo", scale, limits))


SUITES = {"sft": sft_suite, "rm": rm_suite, "ppo": ppo_suite}
