"""What the terminal says of a row."""

import io

from rich.console import Console

from regpt.runs.terminal import Terminal

ROW = {
    "kind": "train",
    "step": 1,
    "loss": 10.9,
    "lr": 1e-4,
    "grad_norm": 2.0,
    "dt_ms": 1000.0,
    "tokens_per_s": 524288.0,
    "mfu": 0.4529,
    "flops": 4.4808e14,
    "peak_memory_gib": 28.9,
}


def shown(row: dict) -> str:
    out = io.StringIO()
    Terminal("run", 10, Console(file=out, width=200)).row(row)
    return out.getvalue()


def test_a_step_shows_its_costs():
    line = shown(ROW)
    for part in ("loss 10.9000", "524,288 tokens/s", "45.3% MFU", "28.9 GiB", "448 TFLOP", "left 9.0 s"):
        assert part in line


def test_what_nothing_counts_is_left_out():
    line = shown(ROW | {"mfu": None, "peak_memory_gib": None})
    assert "MFU" not in line
    assert "GiB" not in line
