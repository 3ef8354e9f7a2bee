"""Before Prefect's server: a deployment's form offers the profiles that there are when it is opened.

Prefect keeps the form of a deployment as it was registered, and refuses a run whose parameters do not fit it. So as a
page asks for a deployment, the names in the form are compared with profiles/*.yaml and renewed where they differ.
"""

import asyncio
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from flows.gate import App, Receive, Scope, Send, basic
from flows.parameters import profile_names

DEPLOYMENT = re.compile(r"/api/deployments/[0-9a-f-]{36}")
FIELD = "profile"

log = logging.getLogger("instructflow.forms")


class Forms:
    """An ASGI application before Prefect's server.

    Args:
        app: Prefect's server.
        root: The checkout, whose profiles the forms offer.
        login: NAME:PASSWORD of the server.
    """

    def __init__(self, app: App, root: Path, login: str) -> None:
        self.app, self.root = app, root
        self._headers = {"Authorization": basic(login)}
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and DEPLOYMENT.fullmatch(scope["path"]):
            async with self._one_at_a_time:
                await self._renew(scope["path"])
        await self.app(scope, receive, send)

    async def _renew(self, path: str) -> None:
        """Gives the deployment's form today's profiles; where that fails the form stays as it is."""
        try:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1",
                                         headers=self._headers) as client:
                answer = await client.get(path)
                if answer.status_code != httpx.codes.OK:
                    return
                deployment = answer.json()
                own = (deployment.get("parameters") or {}).get(FIELD)  # Prefect insists on it
                names = sorted({*profile_names(self.root), *([own] if own else [])})
                if renewed := with_profiles(deployment.get("parameter_openapi_schema"), names):
                    (await client.patch(path, json={"parameter_openapi_schema": renewed})).raise_for_status()
        except Exception as error:
            log.warning("the form's profiles were not renewed: %s", error)


def with_profiles(schema: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any] | None:
    """The schema of a flow's parameters with these profiles to choose from; None where it has them, or no profile."""
    properties = dict((schema or {}).get("properties") or {})
    field = properties.get(FIELD)
    if schema is None or not isinstance(field, Mapping):
        return None
    kinds = [dict(kind) for kind in field.get("anyOf", [])] or [dict(field)]
    changed = [kind for kind in kinds if kind.get("enum", names) != names]
    for kind in changed:
        kind["enum"] = names
    if not changed:
        return None
    properties[FIELD] = {**field, "anyOf": kinds} if "anyOf" in field else kinds[0]
    return {**schema, "properties": properties}
