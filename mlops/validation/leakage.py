"""Leakage: prompts and users on both sides of the train/valid split, within a dataset or between two.

The rules run on one frame of all datasets with the columns `prompt`, `user` (the user id as it is compared) and
`place`, which is dataset/split. Of a train and a valid row, the valid one is reported, since it is the one to remove.
Exception: a valid prompt of the SFT or reward-model data among PPO's train prompts, where the PPO row is reported.
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
NEVER = 10**9  # longer than any prompt, so that only equal prompts match


def leaks(keys: list[str], places: list[str], chars: int, share: float) -> set[int]:
    """Indices of the rows whose key equals a key of the other side, or nearly so (`rlhf.curation.near_duplicates`).

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
        leaking = exact
        if chars:  # near duplicates only: another rule reports equal prompts
            leaking = leaks([normalised(prompt) for prompt in column_A], places, chars, share) - exact
        return pd.Series([index not in leaking for index in range(len(places))], column_A.index, dtype=bool)


class ExpectPromptsNotToCrossSplits(ColumnPairMapExpectation):
    """No prompt (column_A) of a train place is one of a valid place (column_B: dataset/split).

    With `chars` > 0 the expectation is about near duplicates (`rlhf.curation.near_duplicates`), equal after
    normalisation included. Equal prompts are left to the expectation without `chars`.
    """

    chars: int = 0
    share: float = 0.9
    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.prompt_stays_on_its_side"
    success_keys = ("chars", "share", "ignore_row_if", "mostly")


class UserStaysOnItsSide(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.user_stays_on_its_side"

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

    The valid rows are reported. Another rule reports a user on both sides of one dataset.
    """

    ignore_row_if: str = "either_value_is_missing"
    map_metric = "column_pair_values.user_stays_on_its_side"
    success_keys = ("ignore_row_if", "mostly")
