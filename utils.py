"""Processes, gathers, meters and the progress line."""


class UserError(Exception):
    """Something a person can cause and mend; the message says in one line what was got, expected and to do."""
