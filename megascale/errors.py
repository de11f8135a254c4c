"""The exceptions that a user may cause, and how they are shown."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, and what would work.

    The command line prints the line and exits with status 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class StorageError(UserError):
    """A file system did not do what it was asked; it may at another time, or on another node."""


class RankError(UserError):
    """Bad input that this rank met and others did not, so that it must speak for itself."""
