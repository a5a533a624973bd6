"""The one exception that a user's mistake raises, wherever it is found."""


class SpecQuantError(Exception):
    """A problem the user can mend. Its message is one line: what is wrong and what to do about it.

    The command line prints it to stderr and exits with 2; anything else that escapes is a bug of ours.
    """
