"""Errors meant for the person at the command line, and the exit codes of a rank."""

# Everything is saved; the same command goes on from here (EX_TEMPFAIL of sysexits.h).
STOPPED_ON_REQUEST = 75
# A rank failed because another did; a launcher looks for the other one.
LOST_RANK = 70
# A person has to look, another attempt would end alike (EX_DATAERR); a launcher makes 1 of it.
CANNOT_GO_ON = 65


class UserError(Exception):
    """A mistake of the user's: the message is printed as it is, without a traceback.

    The command line treats any exception with an `exit_code` so.
    """

    exit_code = 2


class TrainingError(Exception):
    """Training cannot go on, and a person has to look: told without a traceback."""

    exit_code = 1


class AttemptError(Exception):
    """This attempt cannot go on, but another one can: told without a traceback."""

    exit_code = 1


class FencedError(TrainingError):
    """A newer attempt of the run has begun: this one must not change the run directory any more."""
