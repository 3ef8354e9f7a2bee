"""The types of the flows' parameters: what Prefect's forms offer and refuse.

The limits are those of rlhf.params (tests/flows/test_parameters.py holds them against each other).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from rlhf.errors import UserError


def profile_names(root: Path) -> list[str]:
    """The profiles of a checkout, sorted."""
    return sorted(path.stem for path in (root / "profiles").glob("*.yaml"))


# The form's list; of a local server it is renewed as the form is opened (infra/forms.py).
ProfileName = Annotated[str, Field(json_schema_extra={"enum": profile_names(Path(__file__).parents[1])})]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
KlGoal = Annotated[float, Field(gt=0, le=1000)]
BetaRule = Literal["step", "step_ahead", "proportional", "fixed"]
PtxCoef = Annotated[float, Field(ge=0)]
Hours = Annotated[float, Field(gt=0, le=1000)]
ChangedParameters = Annotated[dict[str, Any], Field(json_schema_extra={"example": {"sft.epochs": 3}})]


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """["ppo.kl_goal=1"] as {"ppo.kl_goal": 1}: values as in a profile. Raises UserError."""
    found: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set {text}: must be SECTION.PARAMETER=VALUE, e.g. ppo.kl_goal=1")
        if key in found:
            raise UserError(f"--set {text}: {key} is given twice")
        found[key] = parsed(value)
    return found


def assigned_lists(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """["ppo.kl_goal=0.3,0.6"] as {"ppo.kl_goal": [0.3, 0.6]}: commas separate the values. Raises UserError."""
    texts = [(text, *text.partition("=")[::2]) for text in assignments]
    assigned([f"{key}=0" if "=" in text else text for text, key, _ in texts])  # its checks
    return {key: [parsed(value) for value in re.split(r",(?![^\[{]*[\]}])", values)] for _, key, values in texts}


def parsed(value: str) -> Any:
    """A value as YAML reads it; 1e-4 is a number too. Raises UserError."""
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set ...={value}: not a value: {' '.join(str(error).split())}") from None
