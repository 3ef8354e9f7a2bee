"""Settings from the environment: they change speed or frequency; results at most by rounding."""

import math
import os

from rlhf.errors import UserError


def number(name: str, default: float, least: float) -> float:
    """The number in the environment variable `name`, or `default` where it is unset or empty.

    Raises UserError where it is not a number or is below `least`.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not value >= least:
        raise UserError(f"{name} = {text!r} in the environment: must be a number >= {least:g}")
    return value


def fast_enabled() -> bool:
    """Whether the faster code in rlhf/fast is used; INSTRUCTFLOW_FAST=off turns it off.

    Raises UserError where the variable is neither on nor off.
    """
    text = os.environ.get("INSTRUCTFLOW_FAST", "")
    if text not in ("", "on", "off"):
        raise UserError(f"INSTRUCTFLOW_FAST = {text!r} in the environment: must be on or off")
    return text != "off"
