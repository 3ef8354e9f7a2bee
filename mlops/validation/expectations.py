"""Expectations that Great Expectations lacks: visible text, repeats, quotas, groups, rankings, counts, shares, and what
is seen only in all rows together: completions that many prompts share, labelers whose ranks mean nothing.

Each is a GX expectation with its metric. A row that is unusable as a line is null in all columns but `line`, so that
only the rule it breaks reports it: GX skips nulls.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import pandas as pd
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import (
    ColumnAggregateExpectation,
    ColumnMapExpectation,
    ColumnPairMapExpectation,
)
from great_expectations.expectations.metrics.column_aggregate_metric_provider import (
    ColumnAggregateMetricProvider,
    column_aggregate_value,
)
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    ColumnPairMapMetricProvider,
    column_condition_partial,
    column_pair_condition_partial,
)

from mlops.validation.reader import short
from rlhf.curation.characters import is_visible
from rlhf.curation.completions import shared_completions
from rlhf.curation.labelers import doubtful_labelers

PandasColumn = Any  # a pandas Series; the row number is its index


class TextIsVisible(ColumnMapMetricProvider):
    condition_metric_name = "column_values.visible"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, **kwargs: Any) -> PandasColumn:
        return column.map(is_visible).astype(bool)


class ExpectColumnTextToBeVisible(ColumnMapExpectation):
    """Each text has at least one visible character. (GX's regex uses RE2, whose \\s is ASCII only.)"""

    map_metric = "column_values.visible"


class ValueAppearsFirst(ColumnMapMetricProvider):
    condition_metric_name = "column_values.appears_first"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, **kwargs: Any) -> PandasColumn:
        return ~column.duplicated()


class ExpectColumnValuesNotToRepeat(ColumnMapExpectation):
    """No value repeats. Unlike GX's `unique` it reports only the repeats, which are the rows to drop."""

    map_metric = "column_values.appears_first"


class PairAppearsFirst(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.appears_first"

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, **kwargs: Any) -> PandasColumn:
        return ~pd.DataFrame({"a": column_A, "b": column_B}).duplicated()


class ExpectPairsNotToRepeat(ColumnPairMapExpectation):
    """No pair of values repeats; only the repeats are reported."""

    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.appears_first"
    success_keys = ("ignore_row_if", "mostly")


class GroupWithinQuota(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.group_within_quota"
    condition_value_keys = ("most",)

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, most: int, **kwargs: Any) -> PandasColumn:
        pairs = pd.DataFrame({"group": column_A, "value": column_B})
        first = ~pairs.duplicated()
        return first.groupby(pairs["group"]).cumsum() <= most


class ExpectGroupsToBeWithinQuota(ColumnPairMapExpectation):
    """No value of column_A has more than `most` different values of column_B; the rows beyond that are reported."""

    most: int
    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.group_within_quota"
    success_keys = ("most", "ignore_row_if", "mostly")


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
    """All rows with the same column_A have the same column_B; rows that differ from their majority are reported."""

    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.group_has_one_value"
    success_keys = ("ignore_row_if", "mostly")


RANKING_TESTS: dict[str, Callable[[tuple[int, ...], tuple[str, ...]], bool]] = {
    "dense_ranks": lambda ranks, texts: set(ranks) == set(range(1, len(set(ranks)) + 1)),
    "some_preference": lambda ranks, texts: not ranks or set(ranks) != {1},
    "equal_texts_equal_ranks": lambda ranks, texts: len(set(zip(texts, ranks, strict=True))) == len(set(texts)),
}


def _similar_texts_share_ranks(ranks: tuple[int, ...], texts: tuple[str, ...]) -> bool:
    """Whether completions that differ in case and blanks only have one rank; another test compares equal ones."""
    first: dict[str, tuple[str, int]] = {}
    for text, rank in zip(texts, ranks, strict=True):
        other, its_rank = first.setdefault(" ".join(text.casefold().split()), (text, rank))
        if other != text and its_rank != rank:
            return False
    return True


RANKING_TESTS["similar_texts_equal_ranks"] = _similar_texts_share_ranks


class RankingPassesTest(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.ranking_passes"
    condition_value_keys = ("test",)

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, test: str, **kwargs: Any) -> PandasColumn:
        check = RANKING_TESTS[test]
        passed = [len(ranks) != len(texts) or check(ranks, texts)  # another rule reports unequal lengths
                  for ranks, texts in zip(column_A, column_B, strict=True)]
        return pd.Series(passed, index=column_A.index, dtype=bool)


class ExpectRankingsToPass(ColumnPairMapExpectation):
    """Each row's ranks and completions pass one of RANKING_TESTS.

    `dense_ranks`: the ranks are 1, 2, ... without a gap and ties share one (1, 2, 2, 3). `some_preference`: not all
    share rank 1, which would leave the reward model no pair to learn from. `equal_texts_equal_ranks`: identical
    completions have the same rank. `similar_texts_equal_ranks`: so have those that differ in case and blanks only.
    """

    test: str
    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.ranking_passes"
    success_keys = ("test", "ignore_row_if", "mostly")


class ValueCountsExpectation(ColumnAggregateExpectation):
    """Base of the expectations on a column's value counts; `deviations` describes the differences."""

    metric_dependencies = ("column.value_counts",)

    def deviations(self, counts: dict[str, int]) -> list[str]:
        raise NotImplementedError

    def _validate(self, metrics: dict[str, Any], runtime_configuration: dict[str, Any] | None = None,
                  execution_engine: Any = None) -> dict[str, Any]:
        counts = metrics["column.value_counts"]
        deviations = self.deviations({str(value): int(count) for value, count in counts.items()})
        return {"success": not deviations, "result": {"observed_value": "; ".join(deviations) or "as expected"}}


class ExpectColumnValueCountsToBe(ValueCountsExpectation):
    """The column has exactly `counts[value]` rows of each value.

    Another rule reports rows of unknown values (a misspelled split, wrong keys). Here such a row may fill a gap: if the
    total is right and no value exceeds its count, only such rows can be wrong.
    """

    counts: dict[str, int]
    success_keys: ClassVar[tuple[str, ...]] = ("counts",)

    def deviations(self, counts: dict[str, int]) -> list[str]:
        rows, expected = sum(counts.values()), sum(self.counts.values())
        if rows == expected and all(counts.get(value, 0) <= count for value, count in self.counts.items()):
            return []
        return [f"{counts.get(value, 0)} {value} rows, expected {count}" for value, count in self.counts.items()
                if counts.get(value, 0) != count] + [f"{rows} rows in total, expected {expected}"] * (rows != expected)


class ExpectColumnSharesToBeNear(ValueCountsExpectation):
    """Each value's share of the rows is within `tolerance` percentage points of `percent[value]`."""

    percent: dict[str, float]
    tolerance: float
    success_keys: ClassVar[tuple[str, ...]] = ("percent", "tolerance")

    def deviations(self, counts: dict[str, int]) -> list[str]:
        total = sum(counts.values())
        shares = {value: 100 * counts.get(value, 0) / max(total, 1) for value in self.percent}
        return [f"{value} {shares[value]:.1f} %, expected {percent} %" for value, percent in self.percent.items()
                if total and abs(shares[value] - percent) > self.tolerance]


class SharedCompletions(ColumnAggregateMetricProvider):
    metric_name = "column.shared_completions"

    @column_aggregate_value(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, **kwargs: Any) -> list[str]:
        found = shared_completions((prompt, text) for _, prompt, texts, _ in column.dropna() for text in texts)
        return [f"{short(text)} answers {count:,} of {total:,} prompts" for text, count, total in found]


class DoubtfulLabelers(ColumnAggregateMetricProvider):
    metric_name = "column.doubtful_labelers"

    @column_aggregate_value(engine=PandasExecutionEngine)
    def _pandas(cls, column: PandasColumn, **kwargs: Any) -> list[str]:
        return doubtful_labelers([item for item in column.dropna() if len(item[2]) == len(item[3])])


class SentencesExpectation(ColumnAggregateExpectation):
    """Base of the expectations whose metric is a list of sentences, one for each fault."""

    def _validate(self, metrics: dict[str, Any], runtime_configuration: dict[str, Any] | None = None,
                  execution_engine: Any = None) -> dict[str, Any]:
        sentences = metrics[self.metric_dependencies[0]]
        return {"success": not sentences, "result": {"observed_value": "; ".join(sentences) or "as expected"}}


class ExpectCompletionsNotToBeShared(SentencesExpectation):
    """No completion answers more prompts than `rlhf.curation.completions.shared_completions` allows."""

    metric_dependencies = ("column.shared_completions",)


class ExpectLabelersToRankByContent(SentencesExpectation):
    """No labeler ranks by position or at random (`rlhf.curation.labelers.doubtful_labelers`)."""

    metric_dependencies = ("column.doubtful_labelers",)
