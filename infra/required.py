"""What a server must be given before it starts: each value once, said in one line where it is missing or weak."""

from collections.abc import Mapping
from urllib.parse import urlsplit

PLACEHOLDERS = ("change", "placeholder", "example", "todo", "your-", "your_", "password", "<", "xxxx")
SHORTEST = 12  # characters of a secret


def require(program: str, environment: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises SystemExit with one line for the first name that is not set; `wanted` says what each is."""
    for name, what in wanted.items():
        if not environment.get(name):
            raise SystemExit(f"{program}: {name} is not set: {what}")


def require_secret(program: str, name: str, secret: str) -> None:
    """Raises SystemExit with one line where the secret is short or what an example file would say."""
    lowered = secret.lower()
    if len(secret) < SHORTEST:
        raise SystemExit(f"{program}: {name} is too short: {SHORTEST} characters at least, "
                         "`openssl rand -hex 24` makes one")
    if len(set(lowered)) < 4 or any(lowered.startswith(word) for word in PLACEHOLDERS):
        raise SystemExit(f"{program}: {name} is a placeholder: `openssl rand -hex 24` makes a secret")


def require_database(program: str, name: str, url: str) -> None:
    """Raises SystemExit with one line where a database on the network has no good password in its address."""
    try:
        parts = urlsplit(url)
        password = parts.password or ""
    except ValueError:
        raise SystemExit(f"{program}: {name} is no address: postgresql://USER:PASSWORD@HOST/NAME") from None
    if parts.scheme.startswith("postgresql"):
        require_secret(program, f"the password in {name}", password)
