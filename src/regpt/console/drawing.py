"""Consoles, progress bars and coloured cells, drawn by rich: data is never read as markup."""

import re
from collections.abc import Iterable
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from regpt.console.lines import is_terminal
from regpt.console.text import visible

CELLS = ("black on cyan", "black on yellow")  # of neighbours in a line
PARTS = ("dim", "black on green", "black on yellow")  # of conversations: context, answer, format tokens


class PlainConsole(Console):
    """A console that shows strings as they are: no markup, emoji codes or colours of words; control characters as
    `visible` has them."""

    def __init__(self, *, file: IO[str] | None = None, stderr: bool = False):
        super().__init__(
            file=file,
            stderr=stderr,
            markup=False,
            emoji=False,
            emoji_variant=None,
            highlight=False,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def can_redraw(console: Console) -> bool:
    """Whether lines can be overwritten: a terminal that is not dumb."""
    return console.is_terminal and not console.is_dumb_terminal


def print_cells(texts: list[str], notes: list[str], separator: str, console: Console | None = None) -> None:
    """`texts` next to each other, each note below its text: on a terminal in two alternating colours, wrapped between
    texts; in a file or pipe on two lines with `separator` between texts."""
    console = console or PlainConsole()
    if not is_terminal(console.file):
        console.print(separator.join(texts), " ".join(notes), sep="\n", soft_wrap=True)
        return
    upper, lower = Text(), Text()
    for k, (text, note) in enumerate(zip(map(visible, texts), notes)):
        width = max(cell_len(text), cell_len(note)) + 1
        if upper.cell_len and upper.cell_len + width > console.width:
            console.print(upper, lower, sep="\n", soft_wrap=True)
            upper, lower = Text(), Text()
        upper.append(text, CELLS[k % 2]).append(" " * (width - cell_len(text)))
        lower.append(note.ljust(width), "dim")
    console.print(upper, lower, sep="\n", soft_wrap=True)


def print_parts(texts: Iterable[tuple[str, int]], console: Console | None = None) -> None:
    """The texts of a conversation: on a terminal what is trained on in colour, in a file or pipe in brackets, [[an
    answer]] and {{what ends it}}; parts as in `PARTS`."""
    console = console or PlainConsole()
    if not is_terminal(console.file):
        marks = (("", ""), ("[[", "]]"), ("{{", "}}"))
        console.print("".join(marks[part][0] + text + marks[part][1] for text, part in texts), soft_wrap=True)
        return
    line = Text()
    for text, part in texts:
        line.append(visible(text), PARTS[part])
    console.print(line, soft_wrap=True)


def progress_bar(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """A progress bar on stderr, with a text after it and the time left, or with these `columns`: nothing where no line
    can be overwritten, so that logs stay clean."""
    console = PlainConsole(stderr=True)
    columns = columns or (BarColumn(), field("description"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, disable=not can_redraw(console))


def field(name: str) -> TextColumn:
    """A column of a progress bar: `description`, or a field of its task; it wraps where the terminal is narrow."""
    shown = "{task.description}" if name == "description" else f"{{task.fields[{name}]}}"
    return TextColumn(shown, markup=False, table_column=Column(overflow="fold"))


def print_markdown(text: str, console: Console | None = None) -> None:
    """Markdown of ours: drawn on a terminal, as it is in a file or pipe."""
    console = console or PlainConsole()
    if is_terminal(console.file):
        console.print(Markdown(re.sub(r"</?(?:details|summary)>", "", text)))
    else:
        console.print(text, soft_wrap=True, end="")
