"""What the forms in the Prefect UI offer: choices, limits, help; the same limits as the profiles'."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from prefect.utilities.callables import parameter_schema

from flows import parameters
from flows.champion import evaluate_champion
from flows.check_data import check_data
from flows.pipeline import pipeline
from flows.resume_rounds import resume_rounds
from flows.rounds import rounds
from flows.sweep import sweep
from rlhf.errors import UserError
from rlhf.params import PpoParams


@pytest.mark.parametrize(("name", "kind"), [("kl_goal", parameters.KlGoal), ("ptx_coef", parameters.PtxCoef)])
def test_limits_are_the_profiles(name: str, kind: Any) -> None:
    declared = next(item for item in fields(PpoParams) if item.name == name).metadata
    limits = {key: value for item in get_args(kind)[1].metadata for key, value in vars_of(item).items()}
    assert limits == {key: value for key, value in declared.items() if key != "help"}


def vars_of(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in ("gt", "ge", "lt", "le") if hasattr(item, name)}


def test_the_rules_are_the_profiles() -> None:
    assert get_args(parameters.BetaRule) == get_args(get_type_hints(PpoParams)["beta_rule"])


@pytest.mark.parametrize("flow", [pipeline, sweep, check_data, evaluate_champion, rounds, resume_rounds])
def test_every_parameter_has_its_help(flow: Any) -> None:
    for name, item in parameter_schema(flow).properties.items():
        assert item.get("description"), name


def test_the_form_of_a_run() -> None:
    form = parameter_schema(pipeline).properties
    assert {"cpu", "gpu", "smoke"} <= set(form["profile"]["anyOf"][0]["enum"])
    assert form["kl_goal"]["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 1000, "type": "number"}
    assert form["beta_rule"]["anyOf"][0]["enum"] == ["step", "step_ahead", "proportional", "fixed"]


@pytest.mark.parametrize(("texts", "found"), [
    (["ppo.kl_goal=1"], {"ppo.kl_goal": 1}), (["ppo.lr=1e-4"], {"ppo.lr": 0.0001}), (["ppo.beta_rule=fixed"], {
        "ppo.beta_rule": "fixed"}), (["validate.warn=[a, b]"], {"validate.warn": ["a", "b"]}),
    (["sft.packing=true", "rm.lr=.5"], {"sft.packing": True, "rm.lr": 0.5}), ([], {})])
def test_assignments(texts: list[str], found: dict[str, object]) -> None:
    assert parameters.assigned(texts) == found


@pytest.mark.parametrize("texts", [["ppo.kl_goal"], ["=1"], ["a.b=1", "a.b=2"], ["a.b={"]])
def test_what_is_no_assignment_is_said(texts: list[str]) -> None:
    with pytest.raises(UserError, match="--set"):
        parameters.assigned(texts)


def test_lists_of_values() -> None:
    assert parameters.assigned_lists(["ppo.kl_goal=0.3,0.6", "seed=1,2", "validate.warn=[a, b],[c]"]) == {
        "ppo.kl_goal": [0.3, 0.6], "seed": [1, 2], "validate.warn": [["a", "b"], ["c"]]}


@pytest.mark.parametrize("flow", [pipeline, sweep, evaluate_champion, rounds])
def test_a_field_that_may_be_empty_says_what_that_means(flow: Any) -> None:
    for name, item in parameter_schema(flow).properties.items():
        optional = any(kind.get("type") == "null" for kind in item.get("anyOf", [])) or item.get("default") in ([], {})
        assert not optional or "empty" in item["description"].lower(), name
