"""Errors that a user can mend; everything else is a defect of ours and keeps its traceback."""

import difflib
import importlib
import os
import shlex
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """One sentence: what was given, what is allowed, how to fix it; the command line prints it."""

    exit_code = 1


class UsageError(UserError):
    """A `UserError` in what was typed: a flag, a key, a value, a name."""

    exit_code = 2


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean X?)` for the allowed name closest to `given`, or nothing when none is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def word(place: object) -> str:
    """`place` as one word of a command that is to be typed: in quotes where a shell would take it apart."""
    text = str(place)
    return shlex.quote(text) if os.name == "posix" else f'"{text}"' if " " in text else text  # cmd knows no '


def import_extra(module: str, purpose: str, extra: str) -> Any:
    """The module `module` of a package of the extra `extra`.

    Raises:
        UserError: it is not installed; `purpose`, such as "a fit needs SciPy", begins the sentence.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose}; install it with: pip install 'regpt[{extra}]'") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
