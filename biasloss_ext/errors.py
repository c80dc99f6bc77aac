"""Errors of the command line."""


class UserError(Exception):
    """Something that the user of a command can mend: one sentence with what was given and the valid choices.

    Attributes:
        of_one_process: of many processes this one alone says it; otherwise all raise the same and the first says it.
    """

    of_one_process = False


class SaidElsewhere(UserError):
    """This process ends because of another, which says why."""
