"""Ranges of numbers, written next to the value they bound: `steps: Annotated[int, Range(1, MANY)]`.

The sections of the configuration check theirs with `check_ranges`, the command line checks every number of a flag.
And `evenly`, items out of a range of many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from regpt.errors import UsageError

MANY = 2**40  # steps, tokens, rows: beyond any run, and far from where int64 or float64 would lose one
SEED = 2**64 - 1  # what torch.Generator and SplitMix64 tell apart
LONG = 10**9  # seconds: thirty years, within what a clock or a lock takes
LARGE = 1e36  # rates and scores, within float32
PROCESSES = 4096  # of one machine
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, the ends included; with `above` and `below` without them."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """What `value` must be; None where it is."""
        if not (value > self.low if self.above else value >= self.low):  # "not": NaN fails too
            return f"must be above {self.low:,}" if self.above else f"must be {or_more(self.low)}"
        if math.isinf(value):
            return "must be a finite number"
        if not (value < self.high if self.below else value <= self.high):
            return f"must be below {self.high:,}" if self.below else f"must be at most {self.high:,}"
        return None


def or_more(low: float) -> str:
    return f"at least {low:,}" if low else "0 or more"


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` (two or more) of `items`, evenly spaced, the first and the last among them."""
    steps = range(most) if len(items) > most else ()
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in steps] or list(items)


def check_ranges(section: str, config: object) -> None:
    """Raise a UsageError for the first number of the dataclass `config` outside its range."""
    for name, allowed in ranges_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, (int, float)) and (problem := allowed.problem(value)):
            raise UsageError(f"{section}.{name} is {value}, {problem}")


@cache
def ranges_of(kind: type) -> dict[str, Range]:
    """The ranges of a dataclass, by field."""
    assert is_dataclass(kind)
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: range_of(hints[field.name]) for field in fields(kind)}
    return {name: one for name, one in found.items() if one}


def range_of(hint: Any) -> Range | None:
    """The range in a type's annotations."""
    if get_origin(hint) is not Annotated:
        return None
    return next((note for note in get_args(hint)[1:] if isinstance(note, Range)), None)
