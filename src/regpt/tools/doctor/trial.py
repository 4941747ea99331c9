"""One trial: what was tried, whether it works, and a line about it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "no", "note"]
LONGEST = 160  # characters of an error that are shown


@dataclass(frozen=True)
class Trial:
    """A result.

    Attributes:
        group: heading that it is shown under.
        name: what was tried.
        status: ok: works; no: does not, `detail` says why; note: nothing that could work or not.
        detail: one line.
        value, unit: a measured rate, where there is one.
    """

    group: str
    name: str
    status: Status
    detail: str
    value: float | None = None
    unit: str | None = None


Attempt = Callable[[], str | tuple[str, float, str]]


def attempt(group: str, name: str, function: Attempt) -> Trial:
    """`function()` as a trial: it returns a line, or a line, a value and its unit; whatever it raises is a no."""
    try:
        found = function()
    except Exception as error:  # the doctor's task: any failure of what is tried is its result
        return Trial(group, name, "no", first_line(error))
    line, value, unit = (found, None, None) if isinstance(found, str) else found
    return Trial(group, name, "ok", line, value, unit)


def attempts(group: str, tried: Iterable[tuple[str, Attempt]]) -> Iterator[Trial]:
    for name, function in tried:
        yield attempt(group, name, function)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, shortened."""
    said = (str(error).strip().splitlines() or [""])[0]
    line = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
