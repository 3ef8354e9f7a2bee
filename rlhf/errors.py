"""The exceptions that end a command with one line: their message."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: file, row, rule, what to do."""


class Interrupted(Exception):
    """Raised by a trainer that received SIGTERM, after it saved its state."""


class TrainingFailed(Exception):
    """Raised by a trainer that diverged (not a number, KL or entropy out of bounds), after it saved its state."""
