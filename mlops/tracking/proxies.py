"""Servers of this machine are asked without the proxy that the environment names: it has a 127.0.0.1 of its own."""

from collections.abc import MutableMapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def ask_loopback_directly(environment: MutableMapping[str, str]) -> None:
    """Where the environment names a proxy, adds this machine's addresses to no_proxy and NO_PROXY.

    Both then say the same: some programs read the one and some the other.
    """
    if not any(value and name.lower().endswith("_proxy") and name.lower() != "no_proxy"
               for name, value in environment.items()):
        return
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = listed.replace(",", " ").split()
    if "*" not in names:
        exempt = ",".join([*names, *(name for name in LOOPBACK if name not in names)])
        environment["no_proxy"] = environment["NO_PROXY"] = exempt
