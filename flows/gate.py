"""What stands before a local server: it checks where a request comes from, and that it knows the secret.

A browser sends requests to 127.0.0.1 for any page that asks for it, and any account of the machine can connect. So a
request must name this server as its host (else a page could reach it under a name of its own, by DNS rebinding), come
from this server's own pages or from no page at all, and bring the secret.

Only the standard library is imported: Label Studio's environment has nothing else (infra/label_studio_settings.py).
"""

import base64
import hmac
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ENTER = "/enter"
# No page of another origin may show an answer in a frame, as a picture or as a script.
HEADERS = {"X-Frame-Options": "SAMEORIGIN", "Content-Security-Policy": "frame-ancestors 'self'",
           "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "same-origin"}


def names_of(port: int) -> frozenset[str]:
    """What a request to this port of this machine may call it in its Host header."""
    return frozenset({f"127.0.0.1:{port}", f"localhost:{port}"})


def basic(login: str) -> str:
    """The Authorization header of NAME:PASSWORD."""
    return "Basic " + base64.b64encode(login.encode()).decode()


def stranger(hosts: Collection[str], method: str, headers: Iterable[tuple[str, str]]) -> tuple[HTTPStatus, str] | None:
    """Why a request is refused wherever it goes; None where it may be from this server's own pages or from no page.

    `headers` in lower case. A link on another page may lead here: browsers call that a navigation of a document.
    """
    got: dict[str, list[str]] = {}
    for name, value in headers:
        got.setdefault(name, []).append(value)
    host = got.get("host", [])
    if len(host) != 1 or host[0].lower() not in hosts:
        return HTTPStatus.BAD_REQUEST, "this server has another name"
    if any(origin.lower() != f"http://{host[0].lower()}" for origin in got.get("origin", [])):
        return HTTPStatus.FORBIDDEN, "requests from other pages are refused"
    fetch = {name: got.get(f"sec-fetch-{name}", []) for name in ("site", "mode", "dest")}
    followed = method == "GET" and fetch["mode"] == ["navigate"] and fetch["dest"] == ["document"]
    if not followed and not set(fetch["site"]) <= {"same-origin", "none"}:
        return HTTPStatus.FORBIDDEN, "requests from other pages are refused"
    return None


class Gate:
    """An ASGI application before another one.

    Args:
        app: What answers those that pass.
        hosts: The names that requests may call this server (`names_of`).
        login: NAME:PASSWORD that every request must bring; empty where the application itself asks for it.
        open_paths: Paths that answer without the login.
        enter: The page that logs a browser in, at `ENTER`; empty: there is none.
    """

    def __init__(self, app: App, hosts: Collection[str], login: str = "", open_paths: Collection[str] = (),
                 enter: str = "") -> None:
        self.app, self.hosts, self.open_paths, self.enter = app, hosts, open_paths, enter
        self.expected = basic(login).encode() if login else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        refused = stranger(self.hosts, scope.get("method", "GET"), headers)
        if refused:
            await _answer(scope, send, *refused)
        elif self.enter and scope["type"] == "http" and scope["path"] == ENTER:
            await _answer(scope, send, HTTPStatus.OK, self.enter, {"Content-Type": "text/html; charset=utf-8"})
        elif scope["path"] not in self.open_paths and not self._knows(headers):
            await _answer(scope, send, HTTPStatus.UNAUTHORIZED, "this server asks for a password",
                          {"WWW-Authenticate": 'Basic realm="instructflow", charset="UTF-8"'})
        else:
            await self.app(scope, receive, _with_headers(send))

    def _knows(self, headers: list[tuple[str, str]]) -> bool:
        if not self.expected:
            return True
        return any(hmac.compare_digest(value.encode("latin-1"), self.expected) for name, value in headers
                   if name == "authorization")


def _with_headers(send: Send) -> Send:
    """Adds `HEADERS` to an answer; the application's own policy stays beside them."""
    ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"x-frame-options"]
            message = {**message, "headers": [*kept, *ours]}
        await send(message)

    return sending


async def _answer(scope: Scope, send: Send, status: HTTPStatus, text: str, more: dict[str, str] | None = None) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before the handshake: the client sees 403
        return
    content = text.encode()
    headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(content)),
               "Cache-Control": "no-store", **(more or {})}
    await _with_headers(send)({"type": "http.response.start", "status": int(status), "headers": [
        (name.lower().encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": content})
