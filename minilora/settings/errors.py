"""A mistake of the user's, and what a library says of one."""

import re
from collections.abc import Sequence


class UserError(Exception):
    """A mistake of the user's, told in one line; the commands print it and exit with 2."""


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise ValueError for problems, the first five of them, if there are any: "cannot inject LoRA: …; …"."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"cannot {what}: " + "; ".join(problems[:5]) + more)


def first_line(error: Exception) -> str:
    """Return what an error of a library's says first; its kind, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there was not enough memory, as Python or as torch says it on a GPU and on a CPU."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))
