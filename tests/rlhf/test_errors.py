"""What an error says holds no login."""

import pytest

from rlhf.errors import UserError, without_secrets

HIDDEN = [
    ("MLflow at http://ada:pass@host:5000/x is away", "MLflow at http://…@host:5000/x is away"),
    ("postgresql+asyncpg://u:p@ss/word@db/x", "postgresql+asyncpg://…@db/x"),
    ("fatal: Authentication failed for 'https://oauth2:glpat-1@git.example/a.git/'",
     "fatal: Authentication failed for 'https://…@git.example/a.git/'"),
    ("https://ghp_token@github.com/a/b", "https://…@github.com/a/b"),
    ("http://:p@host http://u:@host", "http://…@host http://…@host"),
    ("(url: /api?x=1&access_token=abc&y=2)", "(url: /api?x=1&access_token=…&y=2)"),
    ("https://s3/x?X-Amz-Credential=a&X-Amz-Signature=b", "https://s3/x?X-Amz-Credential=…&X-Amz-Signature=…"),
    ("{'Authorization': 'Basic YTpi'}", "{'Authorization': 'Basic …'}"),
]
KEPT = ["http://127.0.0.1:4200/api", "ssh://git@host/a.git", "git@github.com:a/b.git", "http://host:80/mail/a@b.c",
        "s3://bucket/a@v1", "sqlite:////tmp/mlflow.db", "sft.jsonl:3: prompt: too short", "a@b.c: 1", "key=value",
        "https://host/path@v1", "see https://a.b/c and mail d@e.f"]


@pytest.mark.parametrize(("text", "hidden"), HIDDEN)
def test_logins_are_hidden(text: str, hidden: str) -> None:
    assert without_secrets(text) == hidden
    assert str(UserError(text)) == hidden


@pytest.mark.parametrize("text", KEPT)
def test_nothing_else_is(text: str) -> None:
    assert without_secrets(text) == text
