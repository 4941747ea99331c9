"""Tables as plain lines: as long as they are, so that they can be piped and searched."""

from collections.abc import Sequence

from regpt.console.lines import print_line


def print_rows(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print `rows` under `head`; the columns in `left` are aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print_line("  ".join(cells).rstrip())
