"""JSON, JSON lines and TOML that others wrote, read within limits of size, depth and whole numbers.

A damaged or crafted file costs bounded time and memory, and what is wrong with it is a short `ValueError`, whatever
Python's parsers do: recursion without end, whole numbers that they refuse to print, time that is quadratic.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from regpt.errors import UserError
from regpt.files import is_file, refuse_lfs_pointer

T = TypeVar("T")
MAX_BYTES = 64 << 20  # tokenizers of 250,000 tokens have 17 MB; a state of 1,024 processes has 14 MB
MAX_LINE_BYTES = 16 << 20  # of one row of JSON lines: the largest samples and item scores have kilobytes
MAX_TOML_BYTES = 1 << 20  # recipes have some kilobytes
MAX_DEPTH = 100  # lists and tables inside each other; our own files have six
MAX_CONTAINERS = 2_000_000  # lists and tables; a tokenizer of a million merges has as many
MAX_INTEGER = 10**40  # 128 bits; any larger one may be infinite as a float
MAX_DOTS = 100  # in a key of TOML: the parser is quadratic in them
MARK = "\ufeff"  # of byte order: some editors of Windows write it in front of UTF-8
STRING = re.compile(r'"(?:[^"\\]|\\.?)*(?:"|$)' + r"|'[^']*(?:'|$)")  # in one line; one without an end, to the line's


def parse_json(data: bytes | str) -> Any:
    """The value that JSON in UTF-8 describes, with or without a byte-order mark.

    Raises:
        ValueError: something else, or something beyond the limits of this module.
    """
    text = data if isinstance(data, str) else data.decode()
    refuse_many(text)
    return parsed(json.loads, text.removeprefix(MARK))


def refuse_many(data: bytes | str) -> None:
    """Raise a ValueError for JSON of more lists and objects than `MAX_CONTAINERS`, each of which takes 64 bytes."""
    many = data.count("[") + data.count("{") if isinstance(data, str) else data.count(b"[") + data.count(b"{")
    if many > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")


def parse_toml(data: bytes | str) -> dict[str, Any]:
    """The table that TOML in UTF-8 describes, with or without a byte-order mark.

    Raises:
        ValueError: something else, or something beyond the limits of this module.
    """
    if len(data) > MAX_TOML_BYTES:
        raise ValueError(f"more than {MAX_TOML_BYTES >> 20} MiB")
    text = (data if isinstance(data, str) else data.decode()).removeprefix(MARK)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MAX_DOTS and STRING.sub("", line).partition("#")[0].count(".") > MAX_DOTS:
            raise ValueError(f"a key of more than {MAX_DOTS} parts in line {number}")
    return parsed(tomllib.loads, text)


def parsed(parser: Callable[[str], Any], text: str) -> Any:
    """`parser(text)` within the limits of this module, its errors short."""
    try:
        value = parser(text)
    except RecursionError:
        raise ValueError(f"lists or tables more than {MAX_DEPTH} deep") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError):
        raise
    except ValueError as error:
        raise ValueError(shorter(error)) from None
    check_limits(value)
    return value


def shorter(error: ValueError) -> str:
    """What a parser says of a value that it cannot make: Python's limit of digits, or a date that is none."""
    return f"a whole number of more than {len(str(MAX_INTEGER)) - 1} digits" if "digits" in str(error) else str(error)


def check_limits(value: Any) -> None:
    """Raise a ValueError for lists and tables that are too deep, or a whole number that is too large."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(one, int) and abs(one) >= MAX_INTEGER for one in level):
            raise ValueError(f"a whole number of more than {len(str(MAX_INTEGER)) - 1} digits")
        containers = [one for one in level if isinstance(one, (dict, list))]
        if not containers:
            return
        level = [inner for one in containers for inner in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"lists or tables more than {MAX_DEPTH} deep")


def read_small(path: Path, remedy: str, at_most: int = MAX_BYTES) -> bytes:
    """The bytes of a file of `at_most` bytes; `remedy` ends the sentence about any other.

    Raises:
        UserError: no such file, no plain file, a larger one, or a Git LFS pointer.
    """
    try:
        size = path.stat().st_size
        if is_file(path) and size <= at_most:
            refuse_lfs_pointer(path)
            with path.open("rb") as file:
                return file.read(size)  # no more, where it has grown meanwhile
    except UserError:
        raise
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {str(path)!r} ({what}); {remedy}") from None
    if not is_file(path):
        raise UserError(f"cannot read {str(path)!r} (it is not a file); {remedy}")
    raise UserError(f"{str(path)!r} has more than {at_most >> 20} MiB, too much for its kind; {remedy}")


def read_json(path: Path, remedy: str, at_most: int = MAX_BYTES) -> Any:
    """The value in the JSON file `path`; `remedy` as in `read_small`.

    Raises:
        UserError: no such file, a larger one, or something else in it.
    """
    data = read_small(path, remedy, at_most)
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}); {remedy}") from None


def read_object(path: Path, remedy: str, at_most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`; arguments and errors as in `read_json`, also for other JSON."""
    content = read_json(path, remedy, at_most)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no JSON object; {remedy}")
    return content


def json_lines(path: Path, holding: bytes = b"") -> Iterator[tuple[int, dict[str, Any] | None, bool]]:
    """The lines of a JSON Lines file that hold something: number, object, and whether a line break ends them.

    The object is None for a line that is no JSON object within the limits. Lines without the bytes `holding` are left
    out unread. Memory is that of the longest line, `MAX_LINE_BYTES` at most.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            whole = len(line) <= MAX_LINE_BYTES
            end = line
            while not end.endswith(b"\n") and len(end) > MAX_LINE_BYTES:
                end = file.readline(MAX_LINE_BYTES + 1)
            if (line.strip() if whole else True) and holding in line:
                yield number, parse_row(line) if whole else None, end.endswith(b"\n")


def parse_as(kind: type[T], data: bytes | str) -> T:
    """The `kind`, a dataclass, that JSON describes strictly; a ValueError about the first key that does not fit."""
    from pydantic import TypeAdapter, ValidationError  # only here: it is slow to import

    refuse_many(data)
    try:
        return TypeAdapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line as a JSON object, or None."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
