"""Errors of the command line."""


class UserError(Exception):
    """Something that the user of a command can mend: one sentence with what was given and the valid choices."""
