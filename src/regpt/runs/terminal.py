"""Progress of a training run: a live panel on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from regpt.console.drawing import can_redraw
from regpt.console.lines import write_stream
from regpt.console.text import duration, si, visible

BAR_WIDTH = 60  # in characters
PLAIN_SECONDS = 5.0  # between lines where nothing can be redrawn
EVENTS = {  # that are printed at once, with the keys of their rows
    "batch_ramp": "batches of {batch_tokens:,} tokens in rows of {seq_len:,} from here on",
    "out_of_memory": "out of memory, continuing with micro-batches of {micro_batch_rows} rows: the update is the same",
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
        self.seen = 0
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
        self.seen += 1
        seconds = row["dt_ms"] / 1e3
        rate = self.seconds_a_step
        if rate is None or self.seen <= 3:  # steps that carry compilation and start-up
            self.seconds_a_step = seconds
        else:
            self.seconds_a_step = SMOOTHING * rate + (1 - SMOOTHING) * seconds
        if self.live:
            self.live.update(self.panel(row))
        elif row["step"] in (1, self.steps) or time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.print(f"step {row['step']:>6,}/{self.steps:,}  {self.figures(row)}")

    def figures(self, row: dict[str, Any]) -> str:
        mfu = f"  {row['mfu']:.1%} MFU" if row.get("mfu") else ""
        memory = f"  {row['peak_memory_gib']:.1f} GiB" if row.get("peak_memory_gib") else ""
        flops = f"  {si(row['flops'], 'FLOP')}" if row.get("flops") else ""
        reward = f"  reward {row['reward']:.3f}" if "reward" in row else ""
        left = duration((self.steps - row["step"]) * (self.seconds_a_step or 0))
        return (
            f"loss {row['loss']:.4f}{reward}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  "
            f"{row['tokens_per_s']:,.0f} tokens/s{mfu}{memory}{flops}  left {left}"
        )

    def panel(self, row: dict[str, Any]) -> Panel:
        """Bar, step and figures; a narrow terminal wraps them, and no number is cut."""
        bar = Table.grid()
        bar.add_row(ProgressBar(self.steps, row["step"], width=max(1, min(BAR_WIDTH, self.console.width - 4))))
        texts = [f"step {row['step']:,} of {self.steps:,}", self.figures(row)]
        texts += [f"validation loss {self.val}"] if self.val else []
        body = Group(bar, *(Text(text, overflow="fold") for text in texts))
        return Panel(body, title=Text(visible(self.title)), border_style="dim")
