"""The types of the flows' parameters: what Prefect's forms offer and refuse.

The limits are those of rlhf.params (tests/flows/test_parameters.py holds them against each other).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

PROFILES = sorted(path.stem for path in (Path(__file__).parents[1] / "profiles").glob("*.yaml"))

ProfileName = Annotated[str, Field(json_schema_extra={"enum": PROFILES})]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
KlGoal = Annotated[float, Field(gt=0, le=1000)]
BetaRule = Literal["step", "step_ahead", "proportional", "fixed"]
PtxCoef = Annotated[float, Field(ge=0)]
Hours = Annotated[float, Field(gt=0, le=1000)]
