"""What an error says: one line without a login, that no terminal obeys, which names the disk where it is the disk."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import UserError, disk_problem, one_line, without_secrets

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


def test_a_message_is_short_and_nothing_that_a_terminal_obeys() -> None:
    assert str(UserError("a\x1b[2Jb\nc\u202ed")) == "a\\x1b[2Jb\nc\\u202ed"  # a table may follow
    long = str(UserError(f"p.yaml: sft.lr = {'x' * 100_000}: must be a float > 0"))
    assert len(long) < 2_000
    assert long.startswith("p.yaml: sft.lr = xxx")
    assert long.endswith("xxx: must be a float > 0")


# --- the disk -------------------------------------------------------------------------------------------------------


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__context__ = inner
    return outer


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    chained(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 640 vs 534"),
            OSError(errno.ENOSPC, "No space left on device")),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    Exception("(sqlite3.OperationalError) database or disk is full"),
    ValueError('Error while serializing: I/O error: No space left on device (os error 28)'),
])
def test_a_full_disk_is_known_whoever_says_it(error: Exception) -> None:
    assert disk_problem(error, Path("/there")) == (
        "no space left on the disk of /there; free some and run the same command again")


def test_a_file_that_may_not_be_written_is_named() -> None:
    said = disk_problem(PermissionError(errno.EACCES, "Permission denied", "models/sft"), Path("/there"))
    assert said.startswith("models/sft: cannot be read or written by user ")


@pytest.mark.parametrize("error", [
    OSError("nosuch/tok is not a local folder"), ValueError("28"), FileNotFoundError(2, "No such file", "a.jsonl"),
    RuntimeError("Connection closed by peer"), PermissionError(errno.EPERM, "Operation not permitted"),
    ConnectionRefusedError(errno.ECONNREFUSED, "refused")])
def test_any_other_error_is_not_about_the_disk(error: Exception) -> None:
    assert disk_problem(error, Path("/there")) == ""


@pytest.mark.parametrize(("error", "code", "line"), [
    (UserError("a.jsonl: row 3: no prompt"), 2, "chat: a.jsonl: row 3: no prompt\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/there"), 3,
     "chat: no space left on the disk of /there; free some and run the same command again\n"),
    (KeyboardInterrupt(), 130, "chat: stopped\n"),
])
def test_how_a_command_ends(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line("chat"):
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line("chat"):
        raise ZeroDivisionError


def test_another_pipe_that_broke_is_told() -> None:
    with pytest.raises(BrokenPipeError), one_line("chat"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_an_error_that_was_dealt_with_is_not_the_reason() -> None:
    error = chained(ValueError("a row is wrong"), PermissionError(errno.EACCES, "Permission denied", "cache"))
    error.__suppress_context__ = True
    assert disk_problem(error, Path("/there")) == ""


def test_output_that_nobody_reads_any_more() -> None:
    code = ("from rlhf.errors import one_line\nwith one_line('chat'):\n"
            "    for number in range(100_000): print(number)\n")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; '{sys.executable}' -c \"$0\" | head -n 1", code],
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 141)
