"""A mistake of the user's, and what a library says of one."""


class UserError(Exception):
    """A mistake of the user's, told in one line; the commands print it and exit with 2."""


def first_line(error: Exception) -> str:
    """Return what an error of a library's says first; its kind, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
