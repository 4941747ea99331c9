"""Arguments of the Python interface, checked by their annotations: a wrong name or type is a `UsageError`."""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np

from regpt.errors import UsageError, UserError, nearest
from regpt.files import at_home

P = ParamSpec("P")
R = TypeVar("R")

SHOWN = 200  # characters of a wrong value in a message
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    types.NoneType: "None",
    PathLike: "a path",
    Mapping: "a dict",
    Callable: "a function",
    Iterable: "a list",
}
FLAG = re.compile(  # `--max-items`, or `max-items is …` at the beginning; a command to type stays as it is
    r"(regpt [a-z]+ [^,;()]*)|(?:--(?!fork-from)|^(?=[a-z-]+ is ))([a-z]+(?:-[a-z]+)*)(?![\w.-])"
)
HAS_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose arguments are checked before it is called; what goes into its `**options` it checks itself.

    Its errors name arguments as Python does: `max_items` for `--max-items`.
    """
    signature = inspect.signature(function)
    own = [name for name, one in signature.parameters.items() if one.kind not in HAS_VARIABLE and name != "self"]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"{function.__name__}: {error}; it takes {', '.join(own)}") from None
        hints = hints_of(function)
        for name in own:
            if name in given.arguments:
                given.arguments[name] = check_argument(name, given.arguments[name], hints[name])
        try:
            return function(*given.args, **given.kwargs)
        except UserError as error:
            error.args = (FLAG.sub(in_python, str(error)), *error.args[1:])
            raise

    return call


def in_python(flag: re.Match[str]) -> str:
    """A match of `FLAG` as Python spells it."""
    return flag[1] or flag[2].replace("-", "_")


def check_options(function: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The options `given`, each checked.

    Raises:
        UsageError: an option of `given` that `hints` does not know, or whose type is another one.
    """
    for name in given:
        if name not in hints:
            known = ", ".join(sorted(hints))
            raise UsageError(f"{function} has no option {name!r}{nearest(name, hints)}; there is: {known}")
    return {name: check_argument(name, value, hints[name]) for name, value in given.items()}


@functools.cache
def hints_of(owner: Any) -> dict[str, Any]:
    """Types of a function's parameters, or of a dataclass's fields."""
    return typing.get_type_hints(owner)


def check_argument(name: str, value: Any, hint: Any) -> Any:
    """`value`, NumPy's numbers as Python's own, the home folder for `~` of a path.

    Raises:
        UsageError: it is not of the type `hint`.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if not fits(value, hint):
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
        literal = typing.get_origin(hint) is Literal and isinstance(value, str)
        close = nearest(value, typing.get_args(hint)) if literal else ""
        raise UsageError(f"{name} is {shown}{close}, must be {words(hint)}")
    if isinstance(value, str) and takes_path(hint):
        if not value:
            raise UsageError(f"{name} is empty, must be {words(hint)}")
        return at_home(value)
    return value


def takes_path(hint: Any) -> bool:
    return any(typing.get_origin(one) is PathLike for one in typing.get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; a whole number is a number, True is neither.

    The elements of an iterable are not looked at, as looking may use it up.
    """
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inside)
    if kind is Literal:
        return isinstance(value, str) and value in inside
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if isinstance(value, str | bytes):
        return kind is type(value)
    if kind in (Sequence, list, tuple):
        return isinstance(value, Sequence) and all(fits(one, inside[0]) for one in value)
    return isinstance(value, kind)


def words(hint: Any) -> str:
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(repr, inside))}"
    if kind in (types.UnionType, typing.Union):
        each = list(dict.fromkeys(map(words, inside)))
        return f"{', '.join(each[:-1])} or {each[-1]}"
    if kind in (Sequence, list, tuple):
        return f"a list of {words(inside[0])}"
    return WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
