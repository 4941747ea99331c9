"""Tables of figures for the scripts next to this one."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def columns(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Table:
    """Columns of figures aligned to the right; without a heading, of notes."""
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0), caption=caption)
    table.caption_justify = "left"
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def figure_of(value: float | None) -> str:
    """Three digits of a number below a hundred, all before the point above; nothing for None."""
    if value is None:
        return ""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}"
