"""The exceptions that end a command with one line: their message."""

import re

SECRETS = (
    (re.compile(r"(://)[^\s/:@'\"]*:(?!\d{1,5}/)[^\s'\"]*@"), r"\1…@"),  # user:password@host, whatever the scheme
    (re.compile(r"(https?://)[^\s/@'\"]+@"), r"\1…@"),  # token@host
    (re.compile(r"([?&][\w.-]*(?:token|password|passwd|secret|signature|credential|api_?key)[\w.-]*=)[^\s&'\"]+", re.I),
     r"\1…"),
    (re.compile(r"\b(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)\s+)[^\s'\"]+", re.I), r"\1…"),
)


def without_secrets(text: str) -> str:
    """The text with what looks like a login replaced by …, above all the one in an address."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: file, row, rule, what to do; it holds no login."""

    def __init__(self, message: object = "") -> None:
        super().__init__(without_secrets(str(message)))


class Interrupted(Exception):
    """Raised by a trainer that received SIGTERM, after it saved its state."""


class TrainingFailed(Exception):
    """Raised by a trainer that diverged (not a number, KL or entropy out of bounds), after it saved its state."""
