"""Errors that a user can mend. The command line tells them in one line and ends with status 2; any other exception is a
bug and shows its traceback."""


class UserError(Exception):
    """Something that the user gave, or the machine lacks. The message says what was wanted, what came, how to mend it."""


class ConfigError(UserError):
    """A configuration, a name or an option that cannot be used."""


class ServerError(UserError):
    """Some requests could not be answered; those that were are in the ledger, and the same call goes on from there."""


class StoreError(UserError):
    """An artifact that cannot be made, read or trusted."""
