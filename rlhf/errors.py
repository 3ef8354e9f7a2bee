"""The exceptions that end a command with one line, and how a command says it: `with one_line("chat"): ...`."""

import errno
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRETS = (
    (re.compile(r"(://)[^\s/:@'\"]*:(?!\d{1,5}/)[^\s'\"]*@"), r"\1…@"),  # user:password@host, whatever the scheme
    (re.compile(r"(https?://)[^\s/@'\"]+@"), r"\1…@"),  # token@host
    (re.compile(r"([?&][\w.-]*(?:token|password|passwd|secret|signature|credential|api_?key)[\w.-]*=)[^\s&'\"]+", re.I),
     r"\1…"),
    (re.compile(r"\b(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)\s+)[^\s'\"]+", re.I), r"\1…"),
)


OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
LONGEST = 2000  # characters of a message's line


def without_secrets(text: str) -> str:
    """The text with what looks like a login replaced by …, above all the one in an address."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def displayed(text: str) -> str:
    """The text as a terminal may show it: what it would obey (escapes, bidi overrides, tag characters) by its code."""
    return OBEYED.sub(lambda match: match.group().encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: file, row, rule, what to do; a table may follow.

    It holds no login and nothing that a terminal obeys; what the user gave is cut where it makes a line too long.
    """

    def __init__(self, message: object = "") -> None:
        lines = without_secrets(displayed(str(message))).split("\n")
        super().__init__("\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST - 500]} … {line[-400:]}"
                                   for line in lines))


class Interrupted(Exception):
    """Raised by a trainer that received SIGTERM, after it saved its state."""


class TrainingFailed(Exception):
    """Raised by a trainer that diverged (not a number, KL or entropy out of bounds), after it saved its state."""


class Unavailable(Exception):
    """Something beside this program that it needs does not answer: nothing is wrong here, and a later try may do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with the second where it only announces that; its kind where it says
    nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


# --- the disk -------------------------------------------------------------------------------------------------------

FULL = re.compile(r"no space left on device|disk quota exceeded|database or disk is full|\(os error 28\)|errno 28\b"
                  r"|PytorchStreamWriter failed writing", re.I)  # as SQLite, safetensors, Arrow and torch say it


def disk_problem(error: BaseException, folder: Path) -> str:
    """One line about the disk where an error, or one that it came from, is about that: full, or not to be written.

    `folder`: where the command works, for errors that name no file. Empty for any other error.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)) or FULL.search(str(link)):
            place = getattr(link, "filename", None) or folder
            return f"no space left on the disk of {place}; free some and run the same command again"
        denied = isinstance(link, OSError) and link.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if isinstance(link, OSError) and denied and link.filename:  # without a file it is a port, a process, ...
            return (f"{link.filename}: cannot be read or written by user {os.getuid()} ({link.strerror}); "
                    "correct its permissions")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return ""


def _reader_gone() -> bool:
    """Whether nobody reads this process's output any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Ends a command with one line on stderr and an exit code: 2 for a user's mistake, 3 for the disk, 130 for Ctrl-C.

    Where nobody reads its output any more (`| head`), it ends without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        if not _reader_gone():
            raise  # another pipe or connection
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not (problem := disk_problem(error, Path.cwd())):
            raise
        print(f"{name}: {problem}", file=sys.stderr)
        raise SystemExit(3) from None
