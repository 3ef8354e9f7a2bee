"""The forms of Prefect's UI offer the profiles that there are as they are opened."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.server.api.server import create_app
from prefect.server.database import provide_database_interface
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_SERVER_API_AUTH_STRING, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows.champion import evaluate_champion
from flows.check_data import check_data
from flows.gate import basic
from flows.pipeline import pipeline
from flows.rounds import rounds
from flows.sweep import sweep
from infra.forms import Forms, with_profiles

LOGIN = "somebody:secret"


@pytest.mark.parametrize("flow", [pipeline, sweep, evaluate_champion, rounds])
def test_the_profiles_of_a_form_are_renewed_and_nothing_else(flow: Any) -> None:
    schema = parameter_schema(flow).model_dump()
    renewed = with_profiles(schema, ["mine"])
    assert renewed is not None
    assert [kind.get("enum") for kind in renewed["properties"]["profile"]["anyOf"]] == [["mine"], None]
    assert with_profiles(renewed, ["mine"]) is None
    for kept in (schema, renewed):
        del kept["properties"]["profile"]["anyOf"]
    assert renewed == schema


def test_a_form_without_profiles_stays_as_it_is() -> None:
    assert with_profiles(parameter_schema(check_data).model_dump(), ["mine"]) is None
    assert with_profiles(None, ["mine"]) is None
    assert with_profiles({"properties": {"profile": {"type": "string"}}}, ["mine"]) is None


@contextmanager
def settings(folder: Path) -> Iterator[None]:
    database = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: database, PREFECT_SERVER_API_AUTH_STRING: LOGIN}):
        yield


def test_a_server_takes_a_profile_that_was_made_after_its_deployments(tmp_path: Path) -> None:
    """In Prefect's own server: the list is renewed, the schedule and the other parameters stay, a run is accepted."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "cpu.yaml").touch()

    async def story() -> None:
        await provide_database_interface().create_db()
        app = Forms(create_app(ephemeral=True, ignore_cache=True), tmp_path, LOGIN)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1",
                                     headers={"Authorization": basic(LOGIN)}) as client:
            async def post(path: str, content: dict[str, Any]) -> Any:
                answer = await client.post(f"/api{path}", json=content)
                answer.raise_for_status()
                return answer.json()

            flow = await post("/flows/", {"name": "pipeline"})
            schema = json.loads(json.dumps(parameter_schema(pipeline).model_dump()))
            deployment = await post("/deployments/", {
                "name": "nightly", "flow_id": flow["id"], "parameter_openapi_schema": schema, "tags": ["night"],
                "enforce_parameter_schema": True, "parameters": {"profile": "cpu"},
                "schedules": [{"schedule": {"cron": "0 2 * * *", "timezone": "UTC"}, "active": True}]})
            path, run = f"/api/deployments/{deployment['id']}", f"/deployments/{deployment['id']}/create_flow_run"

            async def offered() -> list[str]:
                answer = (await client.get(path)).json()
                assert [item["schedule"]["cron"] for item in answer["schedules"]] == ["0 2 * * *"]
                assert (answer["tags"], answer["parameters"]) == (["night"], {"profile": "cpu"})
                return list(answer["parameter_openapi_schema"]["properties"]["profile"]["anyOf"][0]["enum"])

            assert await offered() == ["cpu"]
            (tmp_path / "profiles" / "team.yaml").touch()
            assert await offered() == ["cpu", "team"]
            await post(run, {"parameters": {"profile": "team"}})
            refused = await client.post(f"/api{run}", json={"parameters": {"profile": "nobody"}})
            assert refused.status_code == httpx.codes.CONFLICT
            for name in ("cpu", "team"):
                os.remove(tmp_path / "profiles" / f"{name}.yaml")
            assert await offered() == ["cpu"]  # the deployment's own
            assert (await client.get(f"/api/deployments/{flow['id']}")).status_code == httpx.codes.NOT_FOUND

    with settings(tmp_path):
        asyncio.run(story())
