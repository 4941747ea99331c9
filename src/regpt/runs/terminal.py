"""Progress of a training run: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from regpt.console.lines import write_stream
from regpt.console.tables import can_redraw
from regpt.console.text import duration, si, visible

BAR_WIDTH, CURVE_WIDTH, CURVE_HEIGHT = 30, 60, 6  # in characters; a Braille character holds 2 × 4 dots
PLAIN_SECONDS = 5.0  # between lines where nothing can be redrawn
EVENTS = {  # that are said at once, with the keys of their rows
    "out_of_memory": "out of memory, going on with {micro_batch_rows} rows at once: the same update in smaller parts",
    "loss_scale": "loss scale {loss_scale:g} ({reason})",
    "non_finite": "loss {loss}, gradient norm {grad_norm}: the update was not applied (train.on_non_finite {policy})",
    "spike": "a spike: loss {loss:.4f}, {score:.1f} deviations above the median (train.on_spike {policy})",
    "rewind": "went back {updates} updates to {checkpoint}, and on with the next batch",
}
SMOOTHING = 0.9  # of the rate that gives the time left


class Terminal:
    """Follows the rows of a run. Use as a context; in processes that print nothing, pass `enabled=False`."""

    def __init__(self, title: str, steps: int, console: Console, enabled: bool = True):
        self.title, self.steps, self.console, self.enabled = title, steps, console, enabled
        self.losses: list[float] = []
        self.val = ""
        self.seconds_a_step: float | None = None
        self.live = (
            Live(console=console, refresh_per_second=8, transient=False) if enabled and can_redraw(console) else None
        )
        self.last_line = -PLAIN_SECONDS

    def __enter__(self) -> "Terminal":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays above the panel."""
        if self.enabled:
            self.print(text)

    def print(self, text: str) -> None:
        if self.live:
            self.console.print(Text(visible(text)), soft_wrap=True)
        else:
            write_stream(self.console.file, f"{text}\n")

    def row(self, row: dict[str, Any]) -> None:
        """Show one row of metrics.jsonl."""
        if not self.enabled:
            return
        if row["kind"] == "val" and "source" not in row:
            bits = "" if row.get("bpb") is None else f"  {row['bpb']:.4f} bits per byte"
            average = f"  {row['loss_ema']:.4f} of the average" if "loss_ema" in row else ""
            self.val = f"{row['loss']:.4f} after step {row['step']:,}{bits}{average}"
            self.say(f"validation loss {self.val}")
        elif row["kind"] == "train":
            self.train_row(row)
        elif row.get("name") in EVENTS:
            when = f"step {row['at_step']:,}" if "at_step" in row else f"after step {row['step']:,}"
            self.say(f"{when}: {EVENTS[row['name']].format(**row)}")

    def train_row(self, row: dict[str, Any]) -> None:
        self.losses.append(row["loss"])
        seconds = row["dt_ms"] / 1e3
        rate = self.seconds_a_step
        # The first step carries compilation and start-up: it says nothing of the rate.
        self.seconds_a_step = (
            seconds if rate is None or len(self.losses) <= 3 else SMOOTHING * rate + (1 - SMOOTHING) * seconds
        )
        if self.live:
            self.live.update(self.panel(row))
        elif row["step"] in (1, self.steps) or time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.print(f"step {row['step']:>6,}/{self.steps:,}  {self.figures(row)}")

    def figures(self, row: dict[str, Any]) -> str:
        mfu = f"  {row['mfu']:.1%} MFU" if row.get("mfu") else ""
        memory = f"  {row['peak_memory_gib']:.1f} GiB" if row.get("peak_memory_gib") else ""
        flops = f"  {si(row['flops'], 'FLOP')}" if row.get("flops") else ""
        return (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  "
            f"{row['tokens_per_s']:,.0f} tokens/s{mfu}{memory}{flops}  left {self.left(row['step'])}"
        )

    def left(self, step: int) -> str:
        """Time left at the present rate."""
        return duration((self.steps - step) * (self.seconds_a_step or 0))

    def panel(self, row: dict[str, Any]) -> Panel:
        """Step, figures and curve; what a narrow terminal has no room for is left out, and no number is cut."""
        step = Text(f"step {row['step']:,} of {self.steps:,}")
        room = self.console.width - 4  # within the frame
        bar = ProgressBar(self.steps, row["step"], width=max(1, min(BAR_WIDTH, room - len(step) - 2)))
        drawn = Text("\n".join(curve(self.losses, CURVE_WIDTH, CURVE_HEIGHT)), style="cyan", no_wrap=True)
        table = Table.grid(padding=(0, 2))
        table.add_row(step, *([bar] if room > len(step) + 4 else []))
        body = Group(
            table,
            Text(self.figures(row), overflow="fold"),
            Text(f"validation loss {self.val}" if self.val else "", overflow="fold"),
            *([drawn] if Measurement.get(self.console, self.console.options, drawn).maximum <= room else []),
        )
        return Panel(body, title=Text(visible(self.title)), border_style="dim")


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """`values` as `height` lines of Braille dots, the highest and the lowest value named at the right."""
    columns, rows = 2 * width, 4 * height
    n = min(columns, len(values))
    means = []
    for i in range(n):  # mean of an equal share of the values for each column of dots
        part = values[i * len(values) // n : (i + 1) * len(values) // n]
        means.append(sum(part) / len(part))
    top, bottom = max(means), min(means)
    scale = (rows - 1) / (top - bottom) if top > bottom else 0.0
    cells = [[0] * width for _ in range(height)]
    for x, value in enumerate(means):
        y = round((top - value) * scale)
        cells[y // 4][x // 2] |= BRAILLE[x % 2][y % 4]
    lines = ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
    lines[0] += f" {top:.2f}"
    lines[-1] += f" {bottom:.2f}"
    return lines


BRAILLE = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # U+2800: bits by column and row
