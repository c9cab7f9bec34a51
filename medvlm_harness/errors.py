"""Errors that a user can mend, each one clear line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "first_line", "near_matches"]


class UserError(ValueError):
    """Wrong input: the message says what was expected, what came, and how to mend it.

    The command line prints it as `error: ...` with exit status 2 and no traceback.
    """


def first_line(error: BaseException) -> str:
    r"""What another library says of an error, in one line; the error's kind where it says nothing.

    >>> first_line(ValueError("no such file\nand much more")), first_line(EOFError())
    ('no such file', 'EOFError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def near_matches(name: str, known: Iterable[str]) -> str:
    """A suffix for an error message: the names closest to an unknown one, else all of a short list.

    >>> near_matches("iu_cxr_zeroshoot", ["iu_cxr_zeroshot", "iu_cxr_view"])
    ' Did you mean iu_cxr_zeroshot?'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f" Did you mean {', '.join(close)}?"
    return f" Known: {', '.join(names)}." if 0 < len(names) <= 40 else ""
