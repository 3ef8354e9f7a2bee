"""Users and passwords leave the addresses of servers: an address is printed, logged and stored, a password must not be.

`http://user:password@host` in MLFLOW_TRACKING_URI or PREFECT_API_URL goes on as `http://host` with the variables that
MLflow and Prefect have for a login; processes that are started later inherit that.
"""

from collections.abc import MutableMapping
from urllib.parse import unquote, urlsplit


def split_login(url: str) -> tuple[str, str, str]:
    """(the address without a login, user, password); of an address without a password nothing is taken away."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.username or not parts.password:
        return url, "", ""
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return bare, unquote(parts.username), unquote(parts.password)


def without_login(url: str) -> str:
    """The address of a git repository without user and password; an SSH user stays, it is no secret."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("http", "https"):
        return parts._replace(netloc=host).geturl()
    return parts._replace(netloc=f"{parts.username}@{host}").geturl() if parts.password else url


def move_logins(environment: MutableMapping[str, str]) -> None:
    """Moves the logins from the addresses of MLflow and Prefect to the variables that these read."""
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        try:
            url, user, password = split_login(environment.get(name, ""))
        except ValueError:
            continue  # no address; who uses it says so
        if not user:
            continue
        environment[name] = url
        if name == "PREFECT_API_URL":
            environment["PREFECT_API_AUTH_STRING"] = f"{user}:{password}"
        else:
            environment.update({"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password})
