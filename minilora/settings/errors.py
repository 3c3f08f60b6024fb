"""The exception for a user's mistake, and how to read the errors of libraries."""

import re
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A user's mistake, in one line; the commands print it and exit with code 2."""


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise ValueError with the first five problems, if there are any: "cannot inject LoRA: …; …"."""
    if problems:
        raise ValueError(f"cannot {what}: {some(problems)}")


def some(problems: Iterable[str], most: int = 5) -> str:
    """Return the first problems in one line, and the number of the others."""
    problems = list(problems)
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: Exception) -> str:
    """Return a library's whole error without its line breaks, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that there was not enough memory: Python's, or torch's on a GPU or a CPU."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))
