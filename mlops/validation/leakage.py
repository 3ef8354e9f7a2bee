"""Leakage: prompts and users that are on both sides of the split, within a dataset or between two.

The rules run on one frame over all datasets: `prompt`, `user_id`, and `place`, which is dataset/split. Between a
train and a valid row the valid one is named, for that is the one to take out; only where a valid prompt of the
SFT or reward-model data is among PPO's train prompts the PPO row is.
"""

from typing import Any

import pandas as pd
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnPairMapExpectation
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnPairMapMetricProvider,
    column_pair_condition_partial,
)

from rlhf.curation.near_duplicates import PrefixIndex, normalised

PandasColumn = Any
NEVER = 10**9  # characters that no prompt has: then only equal prompts count


def leaks(keys: list[str], places: list[str], chars: int, share: float) -> set[int]:
    """Indices of the rows whose key is also, or nearly, that of a row of the other side (`rlhf.curation.near_duplicates`).

    `chars` 0: equal keys only.
    """
    index = PrefixIndex(keys, chars or NEVER, share)
    rows = {name: [row for row, place in enumerate(places) if place in kinds] for name, kinds in (
        ("train", ("sft/train", "rm/train")), ("valid", ("sft/valid", "rm/valid")),
        ("ppo_train", ("ppo/train",)), ("ppo_valid", ("ppo/valid",)))}
    return {*index.crossing(rows["train"], rows["valid"] + rows["ppo_valid"]),
            *index.crossing(rows["ppo_train"], rows["ppo_valid"]),
            *index.crossing(rows["valid"], rows["ppo_train"])}


class PromptStaysOnItsSide(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.prompt_stays_on_its_side"
    condition_value_keys = ("chars", "share")

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, chars: int, share: float,
                **kwargs: Any) -> PandasColumn:
        places = list(column_B)
        exact = leaks(list(column_A), places, 0, 0)
        found = exact
        if chars:  # near duplicates alone: equal prompts break a rule of their own
            found = leaks([normalised(prompt) for prompt in column_A], places, chars, share) - exact
        return pd.Series([index not in found for index in range(len(places))], column_A.index, dtype=bool)


class ExpectPromptsNotToCrossSplits(ColumnPairMapExpectation):
    """No prompt (column_A) of a train place is one of a valid place (column_B: dataset/split).

    With `chars` > 0: nor nearly so. Prompts are then compared in lower case without punctuation, and are nearly the
    same where they share a prefix of at least `chars` characters and `share` of the longer one; equal ones are left
    to the expectation without `chars`.
    """

    chars: int = 0
    share: float = 0.9
    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.prompt_stays_on_its_side"
    success_keys = ("chars", "share", "ignore_row_if", "mostly")


class UserStaysOnHisSide(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.user_stays_on_his_side"

    @column_pair_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_A: PandasColumn, column_B: PandasColumn, **kwargs: Any) -> PandasColumn:
        frame = pd.DataFrame({"user": column_A, "place": column_B})
        split = frame["place"].str.split("/").str[1]
        dataset = frame["place"].str.split("/").str[0]
        within = split.groupby([frame["user"], dataset]).transform("nunique")
        mixed_inside = (within > 1).groupby(frame["user"]).transform("any")
        sides = split.groupby(frame["user"]).transform("nunique")
        crosses = (sides > 1) & ~mixed_inside
        return ~(crosses & (split == "valid"))


class ExpectUsersNotToCrossSplits(ColumnPairMapExpectation):
    """No user (column_A) is in a train place of one dataset and a valid place of another (column_B: dataset/split).

    The valid rows are reported. A user who is on both sides within a dataset breaks that dataset's own rule.
    """

    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.user_stays_on_his_side"
    success_keys = ("ignore_row_if", "mostly")
