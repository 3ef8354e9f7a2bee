"""When a role has lost too much, and what is said then."""

from dataclasses import replace
from typing import Any

import pytest

from rlhf.curation.loss import check_loss, check_rules, is_too_much, lost_rows
from rlhf.curation.rules import RULES
from rlhf.curation.sources.spec import RulesParams
from rlhf.errors import UserError


def counts(read: int, quarantined: int = 0, **dropped: int) -> dict[str, Any]:
    lost = dict.fromkeys(RULES, 0) | dropped
    return {"read": read, "quarantined": {"no prompt": quarantined}, "dropped": lost,
            "kept": read - quarantined - sum(lost.values())}


@pytest.mark.parametrize(("report", "rules", "too_much"), [
    (counts(100, 20), {}, False),
    (counts(100, 21), {}, True),
    (counts(100, 10, near_duplicate=11), {}, True),
    (counts(100, subsample=90), {}, False),
    (counts(100, merged=90), {}, False),
    (counts(100, 85), {"max_lost_share": 0.85}, False),
    (counts(100, near_duplicate=60), {"max_lost_shares": {"near_duplicate": 0.5}}, False),
    (counts(100, near_duplicate=60, leak=11), {"max_lost_shares": {"near_duplicate": 0.5}}, True),
    (counts(100, 60), {"max_lost_shares": {"quarantine": 0.6}}, False),
    (counts(10, 10), {"max_lost_share": 1.0}, True),  # nothing is left
])
def test_the_loss_beyond_the_allowance_counts(report: dict[str, Any], rules: dict[str, Any], too_much: bool) -> None:
    assert is_too_much(report, replace(RulesParams(), **rules)) == too_much


def test_the_table_names_role_share_rules_and_rows() -> None:
    report = {"sft": counts(100), "rm": counts(100, 10, leak=15)}
    assert lost_rows(report["rm"]) == 25
    with pytest.raises(UserError) as caught:
        check_loss(report, RulesParams(), {"rm": {"leak": ["a.jsonl: row 4: Tell me"]}})
    lines = str(caught.value).splitlines()
    assert lines[0] == "rm: 25 of 100 rows are lost (25%), more than the rules allow (max_lost_share = 0.2)"
    assert lines[1].split()[:2] == ["leak", "15"]
    assert lines[2].strip() == "a.jsonl: row 4: Tell me"
    assert lines[3].split()[-1] == "10"
    assert "sft" not in str(caught.value)


@pytest.mark.parametrize(("rules", "said"), [
    ({"max_lost_shares": {"near_duplicat": 0.5}}, "max_lost_shares: unknown rule 'near_duplicat'; must be one of"),
    ({"max_lost_shares": {"leak": 1.5}}, "must be float >= 0 and <= 1"),
    ({"max_lost_shares": {"subsample": 0.5}}, "unknown rule 'subsample'"),
    ({"language": "jp"}, "language = 'jp': must be one of .* ja, "),
])
def test_an_allowance_for_no_rule_and_an_unknown_language_are_refused(rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_rules(replace(RulesParams(), **rules))
