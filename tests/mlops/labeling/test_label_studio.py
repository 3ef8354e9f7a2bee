"""What Label Studio shows and what comes back; the server itself is in tests/infra/test_labels.py."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from mlops.labeling.batch import Assignment, Item
from mlops.labeling.guide import FLAG_QUESTIONS, GUIDE_EN, GUIDE_JA
from mlops.labeling.label_studio import config, label_of, read_result, task_data
from rlhf.errors import UserError

ROW = {"prompt_id": "p1", "user_id": "u", "source": "customer", "split": "train", "use_case": "chat", "prompt": "Why?"}
ITEM = Item("item-1", ROW, ("first", "second", "third"), ("secret-model", "other-model", "secret-model"))


def choices(name: str, *values: str) -> dict[str, Any]:
    return {"from_name": name, "type": "choices", "value": {"choices": list(values)}}


def test_no_model_s_name_is_shown_and_the_order_is_the_labeler_s() -> None:
    shown = task_data(ITEM, (2, 0, 1))
    assert shown == {"item_id": "item-1", "prompt": "Why?", "turns": [{"role": "Human", "text": "Why?"}],
                     "a": "third", "b": "first", "c": "second"}


def test_a_conversation_is_shown_turn_by_turn() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
              {"role": "assistant", "content": "Human: because"}, {"role": "user", "content": "And how?"}]
    shown = task_data(Item("item-1", {**ROW, "prompt": prompt}, ("first",), ("m",)), (0,))
    assert shown["turns"] == [{"role": "System", "text": "Be brief."}, {"role": "Human", "text": "Why?"},
                              {"role": "Assistant", "text": "Human: because"}, {"role": "Human", "text": "And how?"}]
    turns = ElementTree.fromstring(config(3, True, turns=True)).find("Paragraphs")
    assert turns is not None
    assert (turns.get("name"), turns.get("value")) == ("prompt", "$turns")


@pytest.mark.parametrize("count", range(2, 10))
def test_the_configuration_has_what_each_answer_needs(count: int) -> None:
    ranking, choosing = ElementTree.fromstring(config(count, False)), ElementTree.fromstring(config(count, True))
    names = [item.get("name") for item in ranking.iter("Choices")]
    assert names == [f"{what}_{letter}" for letter in "abcdefghi"[:count] for what in ("rank", "flags")]
    keys = [item.get("hotkey") for item in ranking.iter("Choice") if item.get("hotkey")]
    assert len(keys) == len(set(keys)) == (count * count if count <= 4 else 0)
    best = choosing.find("Choices[@name='best']")
    assert best is not None
    assert [item.get("hotkey") for item in best] == [str(place) for place in range(1, count + 1)]
    assert {item.get("maxRating") for item in ranking.iter("Rating")} == {"7"}
    assert {item.get("alias") for item in ranking.iter("Choice") if item.get("alias")} == set(FLAG_QUESTIONS)
    header = " ".join(item.get("value", "") for item in ranking.iter("Header"))
    assert "Truthful and harmless go before helpful" in header
    assert "真実性と無害性は有用性より優先" in header


def test_the_guide_says_the_same_in_both_languages() -> None:
    assert [len(re.findall(tag, GUIDE_EN)) for tag in ("<li>", "<p>", "<b>")] == \
        [len(re.findall(tag, GUIDE_JA)) for tag in ("<li>", "<p>", "<b>")]


def test_ranks_ratings_and_flags_go_back_to_the_item_s_order() -> None:
    # shown: third, first, second; ranked 3, 1, 1 (a tie, rank 2 left out)
    result = [choices("rank_a", "3"), choices("rank_b", "1"), choices("rank_c", "1"),
              *({"from_name": f"overall_{letter}", "type": "rating", "value": {"rating": value}}
                for letter, value in (("a", 2), ("b", 6), ("c", 5))),
              choices("flags_a", "violent", "opinion")]
    label = label_of("s1", ITEM, Assignment("item-1", "ada", (2, 0, 1)), result)
    assert label.ranks == (1, 1, 2)  # first, second, third
    assert label.overall == (6, 5, 2)
    assert label.flags == ((), (), ("opinion", "violent"))


def test_a_choice_is_the_best_and_the_others_share_the_second_place() -> None:
    assert read_result([choices("best", "B")], 3) == ((2, 1, 2), (), ())


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(UserError, match="no rank for B, C"):
        read_result([choices("rank_a", "1")], 3)
