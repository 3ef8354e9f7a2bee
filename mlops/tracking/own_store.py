"""MLflow's store where no server is named: the database mlflow.db of a checkout, and mlartifacts/ beside it."""

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
_FILE = "sqlite:///file:"


def own_store(root: Path) -> str:
    """Its address. A ? in the path would begin the options, and the database would be another file."""
    path = root.resolve() / DATABASE
    return f"{_FILE}{quote(str(path))}?uri=true" if "?" in str(path) else f"sqlite:///{path}"


def artifacts_beside(uri: str) -> str | None:
    """The address of the artifacts beside a database of this machine; None for another store."""
    if not uri.startswith("sqlite:"):
        return None
    path = unquote(urlsplit(uri.removeprefix(_FILE)).path) if uri.startswith(_FILE) else uri.removeprefix("sqlite:///")
    return (Path(path).resolve().parent / ARTIFACTS).as_uri()
