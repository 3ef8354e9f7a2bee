"""Leakage: prompts and users that are on both sides of the split, within a dataset or between two.

The rules run on one frame over all datasets: `prompt`, `user_id`, and `place`, which is dataset/split. Between a
train and a valid row the valid one is named, for that is the one to take out; only where a valid prompt of the
SFT or reward-model data is among PPO's train prompts the PPO row is.
"""

import re
from typing import Any

import pandas as pd
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnPairMapExpectation
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnPairMapMetricProvider,
    column_pair_condition_partial,
)

PandasColumn = Any
_NOISE = re.compile(r"[\W_]+")


def normalised(prompt: str) -> str:
    """The prompt in lower case, everything but letters and digits one blank."""
    return _NOISE.sub(" ", prompt.casefold()).strip()


def shared_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common from the start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection over slices: compared in C
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def offenders(one: int, other: int, places: list[str]) -> int:
    """Which of a train and a valid row is to go (indices into `places`)."""
    train, valid = (one, other) if places[one].endswith("/train") else (other, one)
    return train if places[train] == "ppo/train" and not places[valid].startswith("ppo/") else valid


def leaks(keys: list[str], places: list[str], chars: int, share: float) -> set[int]:
    """Indices of the rows whose key is also, or nearly, that of a row of the other side.

    Nearly: the two share a prefix of at least `chars` characters that is at least `share` of the longer one. `chars`
    0: equal keys only. Sorting brings each row next to the one of the other side that shares most: n log n.
    """
    order = sorted((index for index in range(len(keys)) if places[index].endswith(("/train", "/valid"))),
                   key=lambda index: (keys[index], places[index], index))
    found = set()
    for direction in (order, order[::-1]):
        last: dict[bool, int] = {}
        for index in direction:
            valid = places[index].endswith("/valid")
            neighbour = last.get(not valid)
            last[valid] = index
            if neighbour is None:
                continue
            one, other = keys[index], keys[neighbour]
            longest = max(len(one), len(other))
            common = shared_prefix(one, other) if chars and longest >= chars else 0
            if one == other or (chars and common >= chars and common >= share * longest):
                found.add(offenders(index, neighbour, places))
    return found


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
