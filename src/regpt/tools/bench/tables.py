"""The reports of `regpt bench` as tables for a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from regpt.console.text import counted


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: figure and value."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def train_table(report: dict[str, Any]) -> Table:
    """The report of `regpt bench train`."""
    ms, world, memory = report["step_ms"], report["world_size"], report["peak_memory_gib"]
    product, listed, found, kernels = report["product"], report["data_sheet"], report["versions"], report["kernels"]
    each = f" ({report['tokens_per_s_per_device']:,.0f} each of {world})" if world > 1 else ""
    sheet = f"{report['mfu']:.1%} of {listed['tflops']:,.4g} TFLOP/s, dense {listed['precision']}" if listed else None
    whose = {"gpu": " on the GPU", "process": " of the process"}[report["peak_memory_of"]]
    whose += ", the largest of all processes" if world > 1 else ""
    attention = f", attention {report['attention']}" if report["attention"] else ""
    names = [f"{name} {found[name]}" for name in ("torch", "cuda", "cudnn", "triton", "python") if found[name]]
    rows = {
        "tokens/s": f"{report['tokens_per_s']:,.0f}{each}",
        "a step": f"{ms['median']:,.1f} ms (p10 {ms['p10']:,.1f}, p90 {ms['p90']:,.1f}, spread {ms['spread']:.1%}), "
        f"{counted(report['steps'], 'step')} after {report['warmup']}",
        "MFU, data sheet": sheet or "this device has none in the table",
        "of a product": f"{report['share_of_product']:.1%} of {product['tflops']:,.4g} TFLOP/s that a {product['n']}³ "
        f"{product['precision']} product reached here",
        "peak memory": "not counted on this system" if memory is None else f"{memory:.2f} GiB{whose}",
        "first step after": f"{report['first_step_s']:.1f} s, compilation included",
        "batch": f"{report['batch_tokens']:,} tokens: {report['accumulation']} × {world} × "
        f"{counted(report['micro_batch_rows'], 'row')} of {report['seq_len']}; {report['data']}",
        "active": f"{report['precision']}, {kernels['name']} kernels ({kernels['reason']})"
        f"{', compiled' if report['compile'] else ''}{attention}, {'fused ' if report['fused_adamw'] else ''}AdamW",
        "versions": ", ".join(names),
    }
    return pairs(
        f"{report['recipe']}: {report['parameters']:,} parameters on {world} × {report['device']}", rows.items()
    )
