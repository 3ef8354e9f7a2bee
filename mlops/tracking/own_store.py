"""MLflow's store where no server is named: the database mlflow.db of a checkout, and mlartifacts/ beside it."""

import json
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
CHECKED_BYTES = 2**28  # a larger database is not read as a whole
_FILE = "sqlite:///file:"


def own_store(root: Path) -> str:
    """Its address. A ? in the path would begin the options, and the database would be another file."""
    path = root.resolve() / DATABASE
    return f"{_FILE}{quote(str(path))}?uri=true" if "?" in str(path) else f"sqlite:///{path}"


def with_driver(uri: str) -> str:
    """A PostgreSQL address that names the driver that is installed; SQLAlchemy 2.0 would look for psycopg2."""
    return f"postgresql+psycopg{uri.removeprefix('postgresql')}" if uri.startswith("postgresql://") else uri


def keep_private(root: Path) -> None:
    """Makes the checkout's database and artifacts their owner's alone, from the start or afterwards."""
    try:
        os.close(os.open(root / DATABASE, os.O_RDWR | os.O_CREAT, 0o600))
        (root / ARTIFACTS).mkdir(mode=0o700, exist_ok=True)
        for path, mode in ((root / DATABASE, 0o600), (root / ARTIFACTS, 0o700)):
            if path.stat().st_mode & 0o077:
                path.chmod(mode)
    except OSError:
        pass  # MLflow says what is wrong with it


def damage(root: Path) -> str:
    """What is wrong with the checkout's database, where MLflow uses it, and what to do, in one line; empty if well."""
    path = root / DATABASE
    if os.environ.get("MLFLOW_TRACKING_URI") or not path.is_file() or not path.stat().st_size:
        return ""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            database.execute("SELECT count(*) FROM sqlite_master")
            if path.stat().st_size < CHECKED_BYTES:
                said = database.execute("PRAGMA quick_check(1)").fetchone()[0]
                if said != "ok":
                    raise sqlite3.DatabaseError(" ".join(said.split()))
    except sqlite3.DatabaseError as error:
        if re.search("locked|unable to open|readonly", str(error)):
            return ""  # MLflow says so itself
        return (f"{path}: is damaged ({error}): `mv {DATABASE} {DATABASE}.damaged`; the next run makes a new one, "
                "sends what is on disk and registers the champion again")
    return ""


def champion_lost(root: Path, registry: str) -> bool:
    """Whether the checkout's database lacks the champion that metrics/promote.json says was promoted.

    A clone has that file, and no champion, until it has the promoted model too.
    """
    record, promoted = root / "metrics" / "promote.json", root / "models" / "promoted" / "config.json"
    if not registry or os.environ.get("MLFLOW_TRACKING_URI") or not record.is_file() or not promoted.is_file():
        return False
    if not json.loads(record.read_text(encoding="utf-8")).get("promote/passed"):
        return False
    query = "SELECT count(*) FROM registered_model_aliases WHERE name = ? AND alias = 'champion'"
    try:
        with closing(sqlite3.connect(f"file:{quote(str((root / DATABASE).resolve()))}?mode=ro", uri=True)) as database:
            return not database.execute(query, (f"{registry}-policy",)).fetchone()[0]
    except sqlite3.OperationalError as error:  # no such file, no such table; not: it is locked
        return "locked" not in str(error)


def artifacts_beside(uri: str) -> str | None:
    """The address of the artifacts beside a database of this machine; None for another store."""
    if not uri.startswith("sqlite:"):
        return None
    path = unquote(urlsplit(uri.removeprefix(_FILE)).path) if uri.startswith(_FILE) else uri.removeprefix("sqlite:///")
    return (Path(path).resolve().parent / ARTIFACTS).as_uri()
