"""The one exception that a user's mistake raises: its message is the whole explanation."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: file, row, rule, what to do."""
