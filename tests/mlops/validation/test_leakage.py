"""The leakage expectations as Great Expectations runs them: on a frame, with rows, `mostly` and missing values."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from great_expectations import ExpectationSuite
from great_expectations.expectations.expectation import Expectation

from mlops.validation.docs import make_context
from mlops.validation.leakage import ExpectPromptsNotToCrossSplits, ExpectUsersNotToCrossSplits, leaks

LONG = "please write a long and friendly letter to the neighbours about the garden"


def unexpected(expectation: Expectation, tmp_path: Path, rows: list[tuple[Any, Any, Any]]) -> tuple[bool, list[int]]:
    """(success, indices of the rows that break it) of one expectation over (prompt, user, place) rows."""
    frame = pd.DataFrame(rows, columns=["prompt", "user_id", "place"]).astype("str")
    for name, values in zip(frame, zip(*rows, strict=True), strict=True):
        frame.loc[[value is None for value in values], name] = None
    batch = make_context(tmp_path).data_sources.add_pandas("s").add_dataframe_asset("a") \
        .add_batch_definition_whole_dataframe("b").get_batch({"dataframe": frame})
    result = batch.validate(ExpectationSuite("x", expectations=[expectation]), result_format="COMPLETE").results[0]
    assert result.exception_info.get("raised_exception") in (None, False), result.exception_info
    return bool(result.success), result.result["unexpected_index_list"]


def prompts(**options: Any) -> Expectation:
    return ExpectPromptsNotToCrossSplits(column_A="prompt", column_B="place", **options)


def test_equal_prompts_on_both_sides_name_the_valid_one(tmp_path: Path) -> None:
    rows = [("q", "a", "sft/train"), ("q", "b", "rm/valid"), ("q", "c", "ppo/valid"), ("Q", "d", "sft/valid")]
    assert unexpected(prompts(), tmp_path, rows) == (False, [1, 2])


def test_where_ppo_trains_on_a_valid_prompt_the_ppo_row_is_named(tmp_path: Path) -> None:
    rows = [("q", "a", "sft/valid"), ("q", "b", "ppo/train"), ("r", "c", "ppo/train"), ("r", "d", "ppo/valid")]
    assert unexpected(prompts(), tmp_path, rows) == (False, [1, 3])


def test_the_same_side_may_share_prompts_and_null_is_left_out(tmp_path: Path) -> None:
    rows = [("q", "a", "sft/train"), ("q", "b", "ppo/train"), ("r", "c", "rm/valid"), ("r", "d", "sft/valid"),
            (None, "e", "sft/valid"), (None, "f", "rm/train"), ("q", "g", None)]
    assert unexpected(prompts(), tmp_path, rows) == (True, [])


def test_near_duplicates_share_a_long_prefix_and_equal_ones_are_not_counted_twice(tmp_path: Path) -> None:
    rows = [(LONG, "a", "sft/train"), (LONG.upper() + "!", "b", "rm/valid"), (LONG + " now", "c", "rm/valid"),
            (LONG, "d", "ppo/valid"), (LONG[:50] + " something else entirely", "e", "sft/valid"),
            ("short one", "f", "sft/train"), ("short two", "g", "sft/valid")]
    assert unexpected(prompts(chars=40, share=0.9), tmp_path, rows) == (False, [1, 2])


def test_a_prompt_in_disguise_on_the_other_side_is_a_leak(tmp_path: Path) -> None:
    disguised = ["N\u0430me three bridges", "NAME  three bridges!", "Na\u200bme three bridges",
                 "\uff2eame three bridges", "Name\u00a0three bridges"]
    rows = [("Name three bridges", "a", "sft/train"), *((text, "b", "rm/valid") for text in disguised),
            ("Name four bridges", "c", "rm/valid")]
    assert unexpected(prompts(chars=40, share=0.9), tmp_path, rows) == (False, [1, 2, 3, 4, 5])


def test_mostly_tolerates_a_share_of_rows(tmp_path: Path) -> None:
    rows = [("q", "a", "sft/train"), ("q", "b", "sft/valid")] + [(f"p{n}", "c", "sft/train") for n in range(98)]
    assert unexpected(prompts(mostly=0.98), tmp_path, rows) == (True, [1])
    assert unexpected(prompts(mostly=0.995), tmp_path, rows) == (False, [1])


def test_a_row_between_two_near_duplicates_hides_nothing() -> None:
    keys = ["p" * 50, "p" * 50 + " a" * 50, "p" * 50 + " b"]
    assert leaks(keys, ["sft/train", "sft/train", "sft/valid"], 40, 0.9) == {2}


@pytest.mark.parametrize(("rows", "broken"), [
    ([("p", "ann", "sft/train"), ("q", "ann", "rm/valid")], [1]),
    ([("p", "ann", "sft/train"), ("q", "ann", "rm/train")], []),
    # both sides within one dataset: that dataset's own rule says so
    ([("p", "ann", "sft/train"), ("q", "ann", "sft/valid"), ("r", "ann", "rm/valid")], []),
    ([("p", None, "sft/train"), ("q", None, "rm/valid")], []),
])
def test_users_on_both_sides_of_two_datasets(tmp_path: Path, rows: list[tuple[Any, Any, Any]], broken: list[int]
                                             ) -> None:
    rule = ExpectUsersNotToCrossSplits(column_A="user_id", column_B="place")
    assert unexpected(rule, tmp_path, rows) == (not broken, broken)
