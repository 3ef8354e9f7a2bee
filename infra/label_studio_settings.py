"""Label Studio's settings with the gate of flows/gate.py before it; infra/servers.py starts it with them.

Label Studio does not check where a request comes from: it answers any origin and any host, and takes a form that
another page sends as the person who is logged in. It has a login of its own, so the gate asks for none.
"""

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from flows.gate import HEADERS, names_of, stranger

# Its own settings read settings while they are imported, and must find themselves.
os.environ["DJANGO_SETTINGS_MODULE"] = "label_studio.core.settings.label_studio"
from label_studio.core.settings.label_studio import *  # noqa: F403

os.environ["DJANGO_SETTINGS_MODULE"] = __name__

MIDDLEWARE = [f"{__name__}.Gate", *globals()["MIDDLEWARE"]]
CORS_ALLOW_ALL_ORIGINS = False
SESSION_COOKIE_SAMESITE = "Strict"
HOSTS = names_of(urlsplit(os.environ["LABEL_STUDIO_HOST"]).port or 0)


class Gate:
    """Django's form of `flows.gate.Gate`."""

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        headers = [(name.lower(), value) for name, value in request.headers.items()]
        from django.http import HttpResponse  # type: ignore[import-not-found, unused-ignore]

        refused = stranger(HOSTS, request.method, headers)
        response = HttpResponse(refused[1], status=int(refused[0])) if refused else self.get_response(request)
        for name, value in HEADERS.items():
            if name not in response:
                response[name] = value
        return response
