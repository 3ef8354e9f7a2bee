"""The exceptions whose message is the whole explanation."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: file, row, rule, what to do."""


class Interrupted(Exception):
    """Raised by a trainer after it saved its state because SIGTERM asked it to end."""


class TrainingFailed(Exception):
    """Raised by a trainer whose run went wrong (not a number, KL or entropy out of bounds), after it saved."""
