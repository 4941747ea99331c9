"""Pieces of HTML: escaped text, values, tables, dates."""

import json
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from regpt.report.read import Row, flatten

# NUL … US and DEL as the pictures Unicode has for them; newline and tab stay. Half a surrogate pair is no text.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def printable(value: Any) -> str:
    """`value` as text that a browser shows as it is: control characters by their pictures."""
    return str(value).translate(VISIBLE)


def text(value: Any) -> str:
    """`value` as HTML text, safe between tags and inside a quoted attribute."""
    return escape(printable(value), quote=True)


def value_html(value: Any) -> str:
    """A value as TOML or JSON writes it, but strings without quotes."""
    if isinstance(value, str):
        return text(value) if value else '<span class="empty">empty</span>'
    if value is None:
        return '<span class="empty">none</span>'
    return text(json.dumps(value, ensure_ascii=False, default=str))


def date(seconds: float) -> str:
    """`30 July 2026, 14:03 UTC`: the same wherever the page is opened."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):  # not a time of this calendar
        return text(seconds)
    return f'<time datetime="{moment.isoformat(timespec="seconds")}">{moment.day} {moment:%B %Y, %H:%M} UTC</time>'


def grouped(document: Row) -> list[tuple[str, Any]]:
    """`flatten`, with the digits of large counts in groups: 3,210,041."""
    return [(key, f"{value:,}" if type(value) is int else value) for key, value in flatten(document)]


def sheet(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """A card with names and values."""
    cells = "".join(f'<tr><th scope="row">{text(key)}</th><td>{value_html(value)}</td></tr>' for key, value in rows)
    return f'<div class="card sheet"><h3>{text(title)}</h3><table>{cells}</table></div>'


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A card with a table of cells that are HTML already; all columns but the first to the right where `numbers`."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    kind = "grid numbers" if numbers else "grid"
    table = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card scroll">{table}</div>'


def section_html(title: str, content: str) -> str:
    return f"<section><h2>{text(title)}</h2>{content}</section>" if content else ""


def command_html(argv: Any) -> str:
    words = [printable(word) for word in argv] if isinstance(argv, list) else []
    return f'<pre class="card command"><code>{escape(shlex.join(words))}</code></pre>' if words else ""


def embed_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in: ASCII only, `<`, `>` and `&` escaped.

    ASCII covers U+2028 and U+2029, which end a line in JavaScript.
    """
    plain = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
