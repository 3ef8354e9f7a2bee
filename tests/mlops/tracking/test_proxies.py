"""Servers of this machine are asked without the proxy of the environment."""

import urllib.request

import httpx
import pytest

from mlops.tracking.proxies import ask_loopback_directly


@pytest.mark.parametrize(("environment", "exempt"), [
    ({}, None),
    ({"http_proxy": ""}, None),
    ({"no_proxy": "example.org"}, None),
    ({"http_proxy": "http://proxy:3128"}, "127.0.0.1,localhost,::1"),
    ({"ALL_PROXY": "socks5://proxy:1080"}, "127.0.0.1,localhost,::1"),
    ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org, localhost"}, "example.org,localhost,127.0.0.1,::1"),
    ({"http_proxy": "http://proxy:3128", "NO_PROXY": "a.org", "no_proxy": "b.org"}, "b.org,127.0.0.1,localhost,::1"),
])
def test_what_is_exempt(environment: dict[str, str], exempt: str | None) -> None:
    before = dict(environment)
    ask_loopback_directly(environment)
    ask_loopback_directly(environment)
    assert environment == before | ({"no_proxy": exempt, "NO_PROXY": exempt} if exempt else {})


def test_everything_exempt_stays_so() -> None:
    environment = {"http_proxy": "http://proxy:3128", "no_proxy": "*"}
    ask_loopback_directly(environment)
    assert environment == {"http_proxy": "http://proxy:3128", "no_proxy": "*"}


def test_programs_obey_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"}
    ask_loopback_directly(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert not urllib.request.proxy_bypass("example.org")
    with httpx.Client() as client:  # with SOCKS it needs a package of its own
        direct = client._transport_for_url(httpx.URL("http://127.0.0.1:4200"))
        assert direct is client._transport
        assert client._transport_for_url(httpx.URL("http://example.org")) is not client._transport
