"""Lines and tables on stdout, notes on stderr, JSON for scripts."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from regpt.console.text import UNSAFE, message, visible


def print_line(text: object = "") -> None:
    """`text` and a line break on stdout: as it is in a file or pipe, visible on a terminal."""
    write_stream(sys.stdout, f"{text}\n")


def print_rows(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print `rows` under `head` (if any) as lines that can be piped and searched; the columns in `left` are aligned to
    the left, the others to the right."""
    table = [head, *rows] if head else rows
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print_line("  ".join(cells).rstrip())


def print_note(text: object) -> None:
    """A sentence of ours on stderr, after the program's name."""
    write_stream(sys.stderr, f"regpt: {message(text)}\n")


def print_error(text: str) -> None:
    """A traceback or another text of several lines on stderr, whole."""
    write_stream(sys.stderr, visible(text))


def print_json(content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """`content` as one line of JSON on stdout; characters that the console cannot take unchanged as JSON's escapes."""
    text = json.dumps(content, ensure_ascii=False, default=default)
    if not can_take(sys.stdout, text):
        text = json.dumps(content, default=default).replace("\x7f", "\\u007f")
    write_stream(sys.stdout, text + "\n")


def can_take(stream: IO[str] | None, text: str) -> bool:
    """Whether `stream` shows `text` unchanged."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    hostile = is_terminal(stream) and UNSAFE.search(text)
    return not hostile and text.encode(encoding, "replace").decode(encoding) == text


def write_stream(stream: IO[str] | None, text: str) -> None:
    """Write all of `text` at once; drop it where the stream refuses it (rare with `console.streams`)."""
    if stream is None:
        return
    if is_terminal(stream):
        text = visible(text)
    encoding = getattr(stream, "encoding", None)
    with contextlib.suppress(OSError, ValueError):
        try:
            stream.write(text)
        except UnicodeEncodeError:  # not hardened: a notebook, a test
            stream.write(text.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii"))
        stream.flush()


@contextlib.contextmanager
def status(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """`say(text)` shows the current activity on the terminal's error stream; nothing without a terminal."""
    from rich.text import Text

    from regpt.console.drawing import PlainConsole, can_redraw

    console = PlainConsole(stderr=True)
    if quiet or not can_redraw(console):
        yield lambda text: None
        return
    with console.status("starting") as shown:
        yield lambda text: shown.update(Text(visible(text)))


def is_terminal(stream: IO[str] | None) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream is not None and stream.isatty()
    return False
