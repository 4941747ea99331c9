"""Files of benchmark items: JSON lines (also .gz and .zst), checked item by item."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from regpt.compression import JSONL, decompressed, lines_of, packing_of
from regpt.errors import UserError
from regpt.files import is_file
from regpt.structured import parse_json

Kind = TypeVar("Kind")
NAMES = {str: "text", int: "a whole number", list: "a list"}


class Item(NamedTuple):
    """One line of a file; `where` names it in messages."""

    where: str
    row: dict[str, Any]

    def get(self, key: str, kind: type[Kind]) -> Kind:
        """The value of `key`; a UserError unless it is there and of that kind."""
        if key not in self.row:
            raise UserError(f"{self.where}: the item has no {key!r}, it has {', '.join(self.row) or 'nothing'}")
        value = self.row[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key!r} is {shown(value)}, must be {NAMES[kind]}")
        return value

    def texts(self, key: str, at_least: int) -> list[str]:
        """A list of texts, each with something in it."""
        values = self.get(key, list)
        if len(values) < at_least:
            raise UserError(f"{self.where}: {key!r} holds {len(values)}, an item needs at least {at_least}")
        for number, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{self.where}: {key!r}[{number}] is {shown(value)}, must be text that is not empty")
        return values

    def text(self, key: str) -> str:
        """A text with something in it."""
        value = self.get(key, str)
        if not value.strip():
            raise UserError(f"{self.where}: {key!r} is empty")
        return value

    def label(self, key: str, choices: int) -> int:
        """The number of the right choice, counted from 0; also written as a text of digits."""
        given = self.row.get(key)
        digits = isinstance(given, str) and given.isascii() and given.isdigit()
        value = int(given) if digits else self.get(key, int)  # pyright: ignore[reportArgumentType]
        if not 0 <= value < choices:
            raise UserError(f"{self.where}: {key!r} is {value}, must be 0 to {choices - 1}, as there are {choices}")
        return value


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}…"


def read_items(path: Path) -> list[Item]:
    """The objects of a .jsonl, .jsonl.gz or .jsonl.zst file, in order.

    Raises:
        UserError: not there, of another kind, damaged, empty, or a line that is no JSON object.
    """
    if not path.name.lower().endswith(JSONL):
        raise UserError(f"{str(path)!r} is of a kind that holds no items; allowed are {', '.join(JSONL)}")
    if not is_file(path):
        raise UserError(f"the file of items {str(path)!r} does not exist; give an existing one")
    try:
        with path.open("rb") as raw, decompressed(raw, path, packing_of(path.name)) as stream:
            lines = enumerate(lines_of(stream, path), start=1)
            items = [parse(line, path, number) for number, line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    if not items:
        raise UserError(f"{path} holds no item; it needs one JSON object a line")
    return items


def parse(line: bytes, path: Path, number: int) -> Item:
    where = f"{path}, line {number}"
    try:
        row = parse_json(line)
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise UserError(f"{where}: byte {byte} is not valid UTF-8; convert the file to UTF-8") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); the file needs one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; the file needs one a line")
    return Item(where, row)


def hash_of(texts: Iterable[Sequence[str] | str]) -> str:
    """SHA-256 of the items of a task: results on equal items can be compared."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
