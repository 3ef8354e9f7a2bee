"""The gate before the local servers: who is refused, and that nothing of a refused request reaches the application."""

import asyncio
from typing import Any

import pytest

from flows.gate import ENTER, Gate, basic, names_of

LOGIN = "instructflow:secret"
HOST = "127.0.0.1:4200"
KNOWN = {"authorization": basic(LOGIN)}
FOLLOWED = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


class Application:
    """Counts what reaches it, answers 200."""

    def __init__(self) -> None:
        self.reached = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached += 1
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"x-frame-options", b"ALLOWALL"), (b"content-security-policy", b"default-src 'self'")]})
        await send({"type": "http.response.body", "body": b"told"})


def ask(headers: dict[str, str], path: str = "/api/flows", method: str = "GET", kind: str = "http", login: str = LOGIN,
        more: tuple[tuple[bytes, bytes], ...] = ()) -> tuple[int, dict[str, str], int]:
    """(status or the socket's close code, headers of the answer, requests that reached the application)"""
    application = Application()
    gate = Gate(application, names_of(4200), login, open_paths={"/api/health"}, enter="the page")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": kind, "path": path, "headers": [
        *((name.encode(), value.encode()) for name, value in {"host": HOST, **headers}.items()), *more]}
    if kind == "http":
        scope["method"] = method
    asyncio.run(gate(scope, receive, send))
    first = sent[0]
    got = {name.decode(): value.decode() for name, value in first.get("headers", [])}
    return first.get("status") or first.get("code") or 0, got, application.reached


@pytest.mark.parametrize("host", ["localhost:4200", "127.0.0.1:4200", "LOCALHOST:4200"])
def test_who_knows_the_secret_passes(host: str) -> None:
    assert ask({**KNOWN, "host": host})[::2] == (200, 1)
    own = {**KNOWN, "host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    assert ask(own, method="POST")[::2] == (200, 1)
    assert ask(own, kind="websocket")[2] == 1


@pytest.mark.parametrize("secret", [{}, {"authorization": ""}, {"authorization": basic("instructflow:wrong")},
                                    {"authorization": basic(LOGIN)[:-2]}, {"authorization": "Bearer secret"},
                                    {"authorization": "Basic é"}, {"cookie": LOGIN}])
def test_who_does_not_is_asked_for_it(secret: dict[str, str]) -> None:
    status, headers, reached = ask(secret)
    assert (status, reached) == (401, 0)
    assert headers["www-authenticate"].startswith("Basic ")
    assert ask(secret, kind="websocket")[::2] == (1008, 0)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:4200", "127.0.0.1", "127.0.0.1:4201", "127.0.0.2:4200",
                                  "", "127.0.0.1:4200.evil.example", "[::1]:4200"])
@pytest.mark.parametrize("path", ["/api/flows", "/api/health", ENTER])
def test_another_name_of_the_server_is_refused_secret_or_not(host: str, path: str) -> None:
    assert ask({**KNOWN, "host": host}, path)[::2] == (400, 0)
    assert ask({**KNOWN, "host": host}, path, kind="websocket")[::2] == (1008, 0)


def test_two_names_are_refused() -> None:
    assert ask(KNOWN, more=((b"host", b"evil.example"),))[::2] == (400, 0)


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "http://localhost:4200", "null",
                                    "https://127.0.0.1:4200", "http://127.0.0.1:4200.evil.example", ""])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_page_of_another_origin_is_refused_though_the_browser_brings_the_secret(origin: str, method: str) -> None:
    status, headers, reached = ask({**KNOWN, "origin": origin}, method=method)
    assert (status, reached) == (403, 0)
    assert not [name for name in headers if name.startswith("access-control")]
    assert ask({**KNOWN, "origin": origin}, kind="websocket")[::2] == (1008, 0)


@pytest.mark.parametrize("fetched", ["image", "script", "iframe", "empty", "document"])
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_so_are_its_pictures_scripts_frames_and_forms(fetched: str, site: str) -> None:
    mode = "navigate" if fetched in ("iframe", "document") else "no-cors"
    marks = {"sec-fetch-site": site, "sec-fetch-mode": mode, "sec-fetch-dest": fetched}
    method = "POST" if fetched == "document" else "GET"
    assert ask({**KNOWN, **marks}, method=method)[::2] == (403, 0)


def test_a_link_on_another_page_may_lead_here() -> None:
    assert ask({**KNOWN, **FOLLOWED})[::2] == (200, 1)
    assert ask(FOLLOWED)[::2] == (401, 0)


def test_health_and_the_page_that_logs_in_need_no_secret() -> None:
    assert ask({}, "/api/health")[::2] == (200, 1)
    assert ask({}, ENTER)[::2] == (200, 0)
    for path in ("/api/health/", "/api/health/x", "//api/health", "/API/health", f"{ENTER}/"):
        assert ask({}, path)[::2] == (401, 0), path


def test_where_the_application_asks_itself_only_strangers_are_refused() -> None:
    assert ask({}, login="")[::2] == (200, 1)
    assert ask({"origin": "http://evil.example"}, login="")[::2] == (403, 0)


def test_no_other_origin_may_show_an_answer_in_a_frame() -> None:
    application = Application()
    assert application.reached == 0
    for path, secret in (("/api/flows", KNOWN), (ENTER, {}), ("/api/flows", {})):
        headers = ask(secret, path)[1]
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert headers["content-security-policy"] == "frame-ancestors 'self'"
        assert headers["cross-origin-resource-policy"] == "same-origin"
