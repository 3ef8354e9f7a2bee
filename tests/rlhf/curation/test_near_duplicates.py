"""Near duplicates, compared with the definition applied to every pair."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.curation.near_duplicates import PrefixIndex, adds_little, normalised, same_user
from rlhf.data.prompts import prompt_text

CHARS, SHARE = 3, 0.5
keys = st.lists(st.lists(st.sampled_from(["a", "b", "ab", "a.", "+", "1"]), max_size=5).map(" ".join), max_size=40)
LONG = "please write a long and friendly letter to the neighbours about the garden"
FRAME = "you are the helper of a small museum of clocks and you answer in a friendly way and in two sentences. "


def near(one: str, other: str) -> bool:
    shorter, longer = sorted((one, other), key=len)
    return one == other or adds_little(shorter, longer, CHARS, SHARE)


@settings(max_examples=400, deadline=None)
@given(keys, st.integers(0, 2**31))
def test_a_row_is_dropped_exactly_if_it_is_near_a_shorter_row_that_stays(texts: list[str], seed: int) -> None:
    rank = np.array(random.Random(seed).sample(range(1000), len(texts)), np.uint64)
    among = [index for index in range(len(texts)) if index % 3 or len(texts) < 5]
    dropped = set(PrefixIndex(texts, CHARS, SHARE).repeats(rank, among))
    stay = [index for index in among if index not in dropped]
    assert dropped <= set(among)
    for place, one in enumerate(stay):
        assert not any(near(texts[one], texts[other]) for other in stay[:place])
    for index in dropped:
        assert any(near(texts[index], texts[other]) and len(texts[other]) <= len(texts[index]) for other in stay)
        twins = [other for other in among if texts[other] == texts[index]]
        assert len([other for other in twins if other in stay]) <= 1
        assert not any(other in stay and rank[other] > rank[index] for other in twins)


@settings(max_examples=400, deadline=None)
@given(keys, st.data())
def test_crossing_finds_every_pair_between_the_sides(texts: list[str], data: st.DataObject) -> None:
    sides = data.draw(st.lists(st.sampled_from("lr-"), min_size=len(texts), max_size=len(texts)))
    left = [index for index, side in enumerate(sides) if side == "l"]
    right = [index for index, side in enumerate(sides) if side == "r"]
    expected = [index for index in right if any(near(texts[index], texts[other]) for other in left)]
    assert PrefixIndex(texts, CHARS, SHARE).crossing(left, right) == expected


@pytest.mark.parametrize("added", [" now", " please", ", please", ". thank you"])
def test_a_few_words_more_ask_the_same(added: str) -> None:
    assert adds_little(LONG, LONG + added, 40, 0.8)
    assert adds_little(FRAME + LONG, FRAME + LONG + added, 40, 0.8)


@pytest.mark.parametrize(("shorter", "longer"), [
    (LONG, LONG + "er"),  # another word
    (LONG + " in c", LONG + " in c++"),
    (LONG + " of 1", LONG + " of 10"),
    (LONG + " in c", LONG + " in c #"),
    (LONG, LONG + " of 2"),
    (LONG, LONG + " with roses and beans and peas and a pond and what not"),  # much more
    (FRAME + "is there a lift", FRAME + "is there a lift here"),  # the frame is long, the question is not
    (FRAME + "q: how old is it a: very q: is it late", FRAME + "q: how old is it a: very q: is it late now"),
    ("is it late", "is it late now"),
])
def test_other_questions_are_no_near_duplicates(shorter: str, longer: str) -> None:
    assert not adds_little(shorter, longer, 40, 0.8)


def test_a_longer_row_between_two_near_duplicates_does_not_hide_them() -> None:
    texts = [LONG, LONG + " a" * 90, LONG + " b"]
    assert PrefixIndex(texts, 40, 0.9).repeats(np.arange(3, dtype=np.uint64), range(3)) == [2]


@pytest.mark.parametrize(("one", "other"), [
    ("What  is\tTHAT?!", "what is that"),
    ("Name a river .", "Name a river"),
    ("\uff34\uff45\uff4c\uff4c \uff4d\uff45", "Tell me"),
    ("caf\u00e9", "cafe\u0301"),
    ("Explai\u200bn the\u00a0sea", "Explain the sea"),
    ("Hi\U000e0041 there\ufe0f", "hi there"),
    ("N\u0430me \u0430 b\u0456rd", "Name a bird"),
    ("\u0441\u0440\u0430ce and \u0441\u043e\u0440\u0435 in words", "cpace and cope in words"),
    ("\u039fRANGE is a colour", "orange is a colour"),
    ("\u201cIt\u2019s\u201d 3\u22122", "\"It's\" 3-2"),
    ("\u00bfQu\u00e9 es?", "qu\u00e9 es"),
    ("\u65e5\u672c\u8a9e\u3067\u3059\u3002", "\u65e5\u672c\u8a9e\u3067\u3059"),
])
def test_case_blanks_form_hidden_and_look_alike_characters_and_closing_marks_do_not_count(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [
    ("in C", "in C++"), ("in C", "in C#"), ("7 + 3", "7 - 3"), ("x > y", "x < y"), ("is it -8", "is it 8"),
    ("???", "!!!"), ("F", "F#"), ("1.5", "15"), ("a, b", "a b"), ("@home", "home"), ("5 %", "5"),
    ("dog \U0001f600", "dog"),
    ("What is \u03b1?", "What is a?"), ("Solve \u03b1x = 1", "Solve ax = 1"),
    # Words of another alphabet stay what they are.
    ("Что такое сор", "Что такое cop"),
    ("τι είναι ον", "τι είναι ov"),
])
def test_symbols_digits_and_other_alphabets_count(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_spellings_of_one_user_id_are_one_user() -> None:
    assert same_user(" Ann\u00a0Lee ") == same_user("ann  lee") == same_user("\uff21nn Lee\u200b") == "ann lee"
    assert same_user("ann.lee") != same_user("annlee")


def test_raised_and_lowered_digits_and_factorials_count() -> None:
    for one, other in (("What is 2\u00b2?", "What is 22?"), ("10\u207b\u00b3", "10-3"),
                       ("H\u2082O", "H2O"), ("x = 5!", "x = 5")):
        assert normalised(one) != normalised(other)
    assert normalised("Say hello!") == normalised("say hello")
    assert normalised("Answer (soon)!") == normalised("answer (soon)")
    assert normalised("What is (n + 1)!") != normalised("What is (n + 1)")


def test_a_user_whose_number_became_a_float_is_the_same() -> None:
    assert same_user("17.0") == same_user(" 17 ") == "17"
    assert same_user("17.5") != same_user("17")


def test_punctuation_at_the_end_of_earlier_turns_makes_no_other_conversation() -> None:
    one, other = ([{"role": "user", "content": f"Name a tree{end}"}, {"role": "assistant", "content": f"The elm{end}"},
                   {"role": "user", "content": "Why that one?"}] for end in (".", " !"))
    assert normalised(prompt_text(one)) == normalised(prompt_text(other))
    asks_else = [one[0], {**one[1], "content": "The elm?s."}, one[2]]
    assert normalised(prompt_text(one)) != normalised(prompt_text(asks_else))
