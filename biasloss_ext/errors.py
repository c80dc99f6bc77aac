"""Errors of the command line."""


class UserError(Exception):
    """An error that the user of a command can fix: one sentence with what was given and the valid choices.

    Attributes:
        of_one_process: only this one of several processes reports it; otherwise all raise it, and the first reports it.
    """

    of_one_process = False


class SaidElsewhere(UserError):
    """This process ends because of another process, which reports why."""
