"""Each data rule on rows written for it."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.curation.rules import RULES, STAYS, Rows, apply_rules
from rlhf.curation.screen import UNDECIDED, Screened, hashed, openings, problem_of, screen_rows
from rlhf.curation.sources.groups import _turns_or_id
from rlhf.curation.sources.layouts import Record
from rlhf.curation.sources.spec import Entry, RulesParams

TRAIN, VALID = 0, 1
RULES_OFF = RulesParams(valid_share=0.0)


def row(key: str, user: str = "", *, split: int = UNDECIDED, own_id: str = "", foreign: bool = False,
        personal: bool = False, too_long: str = "", order: int = -1, comparison: str = "",
        turns: list[tuple[str, str]] | None = None) -> Screened:
    """A row; without a user one that the source names none of."""
    return Screened(1, b"{", b"}\n", key, hashed(user) if user else 0, hashed(key + user + comparison) if order < 0
                    else order, hashed(own_id) if own_id else 0, split, foreign, personal, too_long,
                    *openings(turns or [("user", key)], key),
                    hashed(comparison) if comparison else 0)


def table(*items: Screened) -> Rows:
    rows = Rows()
    for item in items:
        rows.add(item)
    return rows


def fates(rules: RulesParams, **datasets: list[Screened]) -> dict[str, list[str]]:
    decided = apply_rules({name: table(*items) for name, items in datasets.items()}, rules, seed=1)
    return {name: ["" if fate == STAYS else list(RULES)[fate] for fate in decided[name][1]] for name in datasets}


def test_rows_that_are_too_long_are_dropped_first() -> None:
    assert fates(RULES_OFF, sft=[row("a", too_long="long_prompt", personal=True), row("b", too_long="long_completion")]
                 ) == {"sft": ["long_prompt", "long_completion"]}


def test_a_repeated_prompt_id_in_a_dataset_is_dropped() -> None:
    same = [row("a", own_id="1", order=5), row("b", own_id="1", order=3), row("c", own_id="2")]
    assert fates(RULES_OFF, sft=same, ppo=[row("z", own_id="1")]) == {"sft": ["repeated_id", "", ""], "ppo": [""]}


def test_foreign_rows_are_dropped_by_hash_until_the_english_share_is_reached() -> None:
    rows = [row(f"english {number}") for number in range(9)] + [
        row("fremd", foreign=True, order=2), row("autre", foreign=True, order=1), row("otro", foreign=True, order=3)]
    assert fates(replace(RULES_OFF, min_language_share=0.9), sft=rows)["sft"][9:] == ["other_language", "",
                                                                                     "other_language"]
    assert fates(replace(RULES_OFF, min_language_share=1.0), sft=rows)["sft"].count("other_language") == 3
    assert fates(replace(RULES_OFF, min_language_share=0.0), sft=rows)["sft"].count("other_language") == 0


def test_a_user_is_on_one_side_in_all_datasets() -> None:
    rng = random.Random(3)
    users = [f"user {rng.randrange(400)}" for _ in range(3000)]
    data = {name: table(*[row(f"{name} {number} {user}", user) for number, user in enumerate(users)])
            for name in ("sft", "rm", "ppo")}
    decided = apply_rules(data, RulesParams(valid_share=0.3), seed=1)
    sides = {user: {int(splits[place]) for splits, _ in decided.values() for place, name in enumerate(users)
                    if name == user} for user in set(users)}
    assert all(len(side) == 1 for side in sides.values())
    assert 0.22 < np.mean([side == {VALID} for side in sides.values()]) < 0.38
    other = apply_rules(data, RulesParams(valid_share=0.3), seed=2)
    assert (other["sft"][0] != decided["sft"][0]).any()


def test_the_split_of_the_source_is_kept_and_contradictions_are_dropped() -> None:
    sft = [row("a1", "ann", split=VALID), row("a2", "ann"), row("b1", "bob", split=TRAIN),
           row("b2", "bob", split=VALID)]
    rm = [row("a3", "ann", split=VALID), row("b3", "bob")]
    decided = apply_rules({"sft": table(*sft), "rm": table(*rm)}, RULES_OFF, 1)
    assert decided["sft"][0].tolist()[:3] == [VALID, VALID, TRAIN]
    assert decided["rm"][0].tolist() == [VALID, TRAIN]
    assert fates(RULES_OFF, sft=sft, rm=rm)["sft"] == ["", "", "", "user_in_both_splits"]


def test_personal_data_is_dropped_from_train_only() -> None:
    rows = [row("a", split=TRAIN, personal=True), row("b", split=VALID, personal=True)]
    assert fates(RULES_OFF, sft=rows) == {"sft": ["personal_data", ""]}
    assert fates(replace(RULES_OFF, personal_data="keep"), sft=rows) == {"sft": ["", ""]}


LONG = "tell me a very long story about the old man and the sea and the"


def test_near_duplicates_are_dropped_within_a_dataset_but_not_across_datasets_of_one_split() -> None:
    rows = [row(LONG + " fish"), row(LONG), row("short", "ann"), row("short", "bob", order=0)]
    assert fates(RULES_OFF, sft=rows, rm=[row(LONG)]) == {
        "sft": ["near_duplicate", "", "near_duplicate", ""], "rm": [""]}


def test_comparisons_of_near_identical_prompts_are_all_kept_and_on_one_side() -> None:
    rows = [row(LONG, f"u{n}", comparison=f"c{n}") for n in range(6)] + [row(LONG + " now", "v", comparison="d")]
    for seed in range(5):
        splits, outcome = apply_rules({"rm": table(*rows)}, RulesParams(valid_share=0.5), seed)["rm"]
        assert (outcome == STAYS).all()
        assert len(set(splits.tolist())) == 1


def test_only_an_equal_comparison_is_dropped() -> None:
    rows = [row("q", "a", comparison="1", order=2), row("q", "b", comparison="1", order=1), row("q", comparison="2")]
    assert fates(RULES_OFF, rm=rows) == {"rm": ["repeated_comparison", "", ""]}


def test_comparisons_may_share_the_source_s_prompt_id() -> None:
    rows = [row("q", own_id="7", comparison="1"), row("q", own_id="7", comparison="2")]
    assert fates(RULES_OFF, rm=rows) == {"rm": ["", ""]}


def test_a_user_has_at_most_the_capped_number_of_prompts() -> None:
    rows = [row(f"prompt {number}", "ann" if number % 2 else "bob", order=number) for number in range(10)]
    assert fates(replace(RULES_OFF, max_prompts_per_user=3), sft=rows)["sft"] == [""] * 6 + ["user_cap"] * 4
    assert fates(replace(RULES_OFF, max_prompts_per_user=1), sft=[row(f"p{n}") for n in range(9)])["sft"] == [""] * 9


def test_the_cap_counts_prompts_and_not_their_comparisons() -> None:
    rows = [row(f"prompt {n % 2}", "ann", comparison=f"c{n}", order=n + 1) for n in range(8)]
    assert fates(replace(RULES_OFF, max_prompts_per_user=1), rm=rows)["rm"] == ["", "user_cap"] * 4


def test_chats_that_begin_alike_are_not_one_user_s_but_one_conversation_s_prompts_are() -> None:
    def chat(*said: str) -> Screened:
        turns = [turn for text in said for turn in (("user", text), ("assistant", "Yes?"))][:-1]
        return row("\n\n".join(f"{role}: {text}" for role, text in turns), turns=turns)

    greetings = [chat("Hi", f"Tell me {number}") for number in range(30)]
    splits, _ = apply_rules({"sft": table(*greetings)}, RulesParams(valid_share=0.5), 1)["sft"]
    assert set(splits.tolist()) == {TRAIN, VALID}
    one = [chat("How are old maps drawn", *(f"And {step}" for step in range(number))) for number in range(1, 9)]
    for seed in range(5):
        splits, _ = apply_rules({"sft": table(*one, *greetings)}, RulesParams(valid_share=0.5), seed)["sft"]
        assert len(set(splits.tolist()[:8])) == 1


def test_users_who_share_prompts_are_on_one_side_unless_the_prompt_is_everybody_s() -> None:
    rows = [row("hello", f"u{n}", comparison=f"c{n}") for n in range(60)] + [
        row(f"p{n // 2}", f"u{n}", comparison=f"d{n}") for n in range(60)]
    splits, outcome = apply_rules({"rm": table(*rows)}, RulesParams(valid_share=0.5), 1)["rm"]
    assert set(splits.tolist()) == {TRAIN, VALID}
    assert (splits[60::2] == splits[61::2]).all()
    names = list(RULES)
    assert {names[fate] for fate in outcome[outcome != STAYS]} == {"leak"}  # "hello" stays in train
    assert (outcome[60:] == STAYS).all()


def test_a_group_that_is_larger_than_valid_should_be_is_in_train() -> None:
    rows = [row(f"p{n}", "ann") for n in range(30)] + [row(f"q{n}", f"u{n}") for n in range(70)]
    for seed in range(9):
        splits, _ = apply_rules({"ppo": table(*rows)}, RulesParams(valid_share=0.2), seed)["ppo"]
        assert (splits[:30] == TRAIN).all()


def test_leaks_between_datasets_cost_the_cheaper_row() -> None:
    valid, train = {"split": VALID}, {"split": TRAIN}
    outcome = fates(
        RULES_OFF,
        sft=[row(LONG + " one", "a", **train), row("only here", "b", **valid)],  # type: ignore[arg-type]
        rm=[row(LONG, "c", **valid), row("other " + LONG, "d", **train)],  # type: ignore[arg-type]
        ppo=[row(LONG + " ppo", "e", **train), row("other " + LONG, "f", **valid)])  # type: ignore[arg-type]
    assert outcome == {"sft": ["leak", ""], "rm": ["", ""], "ppo": ["leak_into_ppo", "leak"]}


def test_the_near_duplicate_rule_can_be_switched_off() -> None:
    rows = [row(LONG + " fish", "a"), row(LONG, "b"), row(LONG, "c")]
    assert fates(replace(RULES_OFF, near_duplicates="keep"), sft=rows) == {"sft": ["", "", ""]}


def test_the_counts_of_the_paper_are_reached_by_a_seeded_sample() -> None:
    rng = np.random.default_rng(1)
    rows = Rows(keys=[f"prompt {number}" for number in range(16_000)], users=list(range(1, 16_001)),
                orders=rng.permutation(16_000).tolist(), own_ids=[0] * 16_000, openings=[0] * 16_000,
                branches=[0] * 16_000, comparisons=[0] * 16_000, rankers=[0] * 16_000,
                splits=[VALID] * 2_000 + [TRAIN] * 14_000, foreign=[False] * 16_000, personal=[False] * 16_000,
                fates=[STAYS] * 16_000)
    splits, outcome = apply_rules({"sft": rows}, RulesParams(rows="paper"), 1)["sft"]
    stay = outcome == STAYS
    assert (int((stay & (splits == TRAIN)).sum()), int((stay & (splits == VALID)).sum())) == (12_725, 1_653)
    order = np.array(rows.orders)
    for side in (TRAIN, VALID):
        mine = splits == side
        assert order[mine & stay].max() < order[mine & ~stay].min()


@pytest.mark.parametrize(("role", "record", "reason"), [
    ("sft", Record(" \u200b", ("x",)), "empty prompt"),
    ("sft", Record("q", ("\u00a0",)), "empty completion"),
    ("sft", Record("q", ("He opened the door because",)), "breaks off"),
    ("sft", Record("q", ("fine \ud800.",)), "surrogate"),
    ("ppo", Record("q\x07"), "U+0007"),
    ("ppo", Record("q <|im_start|>system"), "special token <|im_start|>"),
    ("rm", Record("q", ("a", ""), (1, 2)), "completion 2 is empty"),
    ("rm", Record("q", ("a",), (1,)), "1 completions, not 2 to 9"),
    ("rm", Record("q", tuple("abcdefghij"), tuple(range(1, 11))), "10 completions"),
    ("rm", Record("q", ("a", "b"), (1, 1)), "all completions share a rank"),
    ("rm", Record("q", ("a", "a"), (1, 2)), "equal completions have different ranks"),
    ("rm", Record("q", ("a", "b, and"), (1, 2)), ""),
    ("sft", Record("q\n\tx", ("a\nb.",)), ""),
])
def test_broken_records_are_quarantined_with_the_reason(role: str, record: Record, reason: str) -> None:
    problem = problem_of(record, role, RulesParams())
    assert reason in problem
    assert bool(problem) == bool(reason)


def test_a_row_that_the_tokenizer_s_chat_format_cannot_hold_is_quarantined_alone(tmp_path: Path) -> None:
    """Its error ended the whole of ingest, without file and row."""
    from tests.rlhf.model.families import build

    build("gemma", tmp_path)  # its template raises on system turns
    rows: list[dict[str, Any]] = [{"prompt": f"Name {number} birds.", "completion": "Wren."} for number in range(6)]
    for number in (2, 4):
        rows[number]["system"] = "Be brief."
    rules = RulesParams(tokenizer=str(tmp_path), max_prompt_tokens=60, max_completion_tokens=60)
    sound, bad, _ = screen_rows("sft", Entry(files="x"), rules, 1, [1, 2, 3, 4, 5, 6], rows)
    assert [row.number for row in sound] == [1, 2, 4, 6]
    assert [item.number for item in bad] == [3, 5]
    assert all("refuses a conversation of system, user" in item.reason and item.fits for item in bad)


def test_equal_conversations_are_grouped_whatever_form_their_prompts_have() -> None:
    one = [{"role": "user", "content": "Name a bird."}]
    other = [{"content": "Name a bird.", "role": "user"}]
    assert _turns_or_id("Name a bird.") == _turns_or_id(one) == _turns_or_id(other)
    longer = [*one, {"role": "assistant", "content": "Wren."}, {"role": "user", "content": "Another."}]
    assert _turns_or_id(longer) == _turns_or_id([{"from": "human", "value": "Name a bird."}, {
        "from": "gpt", "value": "Wren."}, {"from": "human", "value": "Another."}])
    assert _turns_or_id([3, "x"]) == "[3, 'x']"
