"""Errors meant for the person at the command line."""


class DataError(Exception):
    """Bad input or a user's mistake: the message is printed as it is, without a traceback.

    The command line treats any exception with an `exit_code` so.
    """

    exit_code = 2
