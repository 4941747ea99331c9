"""Rows of files → documents: the text of one column, of one inside others (`doc.text`), or of a template of several."""

import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from regpt.compression import Unreadable
from regpt.errors import UsageError, nearest

SHOWN_NAMES = 50  # of columns in a message
HOW = "name it with --text-column, or several with --template"


def not_utf8(where: str, byte: int) -> Unreadable:
    return Unreadable(
        f"{where}: byte 0x{byte:02x} is not valid UTF-8; convert the file to UTF-8, or name its --encoding", "not_utf8"
    )


class Row(NamedTuple):
    """What a document is made of.

    Attributes:
        value: text, an object with named columns, or why there is neither.
        source_bytes: of the file that reading it consumed.
        where: the place for messages.
    """

    value: Any
    source_bytes: float
    where: Callable[[], str]


class Document(NamedTuple):
    """A text, and the bytes of its file that reading it consumed (for progress: they sum to about its size).

    `error` is the reason for a document without text, where such documents are skipped.
    """

    text: str
    source_bytes: float
    error: Unreadable | None = None


class FilePart(NamedTuple):
    """Part of a file: row groups of .parquet, bytes of .jsonl (the lines that start there), 0 to 1 for a whole file.

    `bytes` is its share of the file's size; the shares sum to it.
    """

    start: int
    stop: int
    bytes: int


class Columns:
    """The text of rows: `names` are the columns that it is made of, `alone` whether it is one, unchanged."""

    def __init__(self, column: str, template: str | None) -> None:
        """
        Raises:
            UsageError: a template that has no column, or is not one.
        """
        self._parts = parse_template(template) if template is not None else [("", column)]
        self.alone = template is None
        self.names = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def text(self, row: Any, where: Callable[[], str]) -> str:
        """The text of `row`; a null is empty, and so is a template without any text in it.

        Raises:
            Unreadable: not an object, a column that is missing, or one that is not text.
        """
        if isinstance(row, str):
            return checked(row, where)
        if not isinstance(row, dict):
            raise Unreadable(f"{where()}: not a JSON object, so it has no column {self.names[0]!r}", "no_column")
        values = {name: self._value(row, name, where) for name in self.names}
        if not any(values.values()):
            return ""
        text = "".join(before + (values[name] if name is not None else "") for before, name in self._parts)
        return checked(text, where)

    def _value(self, row: dict[str, Any], name: str, where: Callable[[], str]) -> str:
        try:
            value = row[name] if name in row else pick(row, name)
        except (LookupError, TypeError, ValueError):
            raise Unreadable(f"{where()}: {missing(name, names_in(row))}", "no_column") from None
        if value is None or isinstance(value, str):
            return value or ""
        if not self.alone and isinstance(value, bool | int | float):
            return json.dumps(value)
        raise Unreadable(
            f"{where()}: column {name!r} is not text but {type(value).__name__}; name another with --text-column",
            "not_text",
        )


def checked(text: str, where: Callable[[], str]) -> str:
    """`text`, if all of it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        sentence = f"{where()}: the text has a lone surrogate (\\ud800…), which is no character; repair it"
        raise Unreadable(sentence, "not_text") from None
    return text


def missing(name: str, there: Iterable[str]) -> str:
    names = [found for found, _ in zip(there, range(SHOWN_NAMES + 1))]
    more = ", …" if len(names) > SHOWN_NAMES else ""
    shown = ", ".join(names[:SHOWN_NAMES]) + more or "none"
    return f"no column {name!r}{nearest(name, names)}, there are {shown}; {HOW}"


def pick(value: Any, name: str) -> Any:
    """`doc.text`, `messages.0.content`: the value at a path of keys and numbers; a key may hold dots itself.

    Raises:
        LookupError, TypeError, ValueError: nothing is there.
    """
    if isinstance(value, list):
        key, dot, rest = name.partition(".")
        return pick(value[int(key)], rest) if dot else value[int(key)]
    if not isinstance(value, dict):
        raise TypeError(name)
    if name in value:
        return value[name]
    for key in value:
        if name.startswith(f"{key}."):
            with suppress(LookupError, TypeError, ValueError):
                return pick(value[key], name[len(key) + 1 :])
    raise LookupError(name)


def names_in(row: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The columns of `row`, those inside others by their paths, those of a list by its first element."""
    for name, value in row.items():
        place = f"{name}"
        while isinstance(value, list) and value and len(place) < 100:
            value, place = value[0], f"{place}.0"
        if isinstance(value, dict) and value and len(before) < 100:
            yield from names_in(value, f"{before}{place}.")
        else:
            yield before + name


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Texts, each with the name of the column that follows it; `{{` and `}}` are braces.

    Raises:
        UsageError: no column, or a brace that is not closed.
    """
    how = "write it like '{question}\\n{answer}'"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--template {template!r} is not one ({error}); {how}") from None
    if not any(name for _, name, _, _ in parts):
        raise UsageError(f"--template {template!r} names no column; {how}")
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise UsageError(f"--template {template!r} has more in braces than the names of columns; {how}")
    return [(before, name) for before, name, _, _ in parts]
