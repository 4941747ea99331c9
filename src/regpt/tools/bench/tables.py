"""The reports of `regpt bench` as tables for a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def train_table(report: dict[str, Any]) -> Table:
    """The report of `regpt bench train`."""
    title = f"{report['recipe']}: {report['parameters']:,} parameters on {report['world_size']} × {report['device']}"
    return pairs(title, [*speed_rows(report), *start_rows(report), *active_rows(report)])


def speed_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    ms, processes = report["step_ms"], report["world_size"]
    each = f" ({report['tokens_per_s_per_device']:,.0f} each of {processes})" if processes > 1 else ""
    product, memory, listed = report["product"], report["peak_memory_gib"], report["data_sheet"]
    sheet = f"{report['mfu']:.1%} of {listed['tflops']:,.4g} TFLOP/s, dense {listed['precision']}" if listed else None
    measured = f"{product['tflops']:,.4g} TFLOP/s that a {product['n']}³ {product['precision']} product reached here"
    return [
        ("tokens/s", f"{report['tokens_per_s']:,.0f}{each}"),
        (
            "a step",
            f"{ms['median']:,.1f} ms (p10 {ms['p10']:,.1f}, p90 {ms['p90']:,.1f}, spread {ms['spread']:.1%}), "
            f"{report['steps']} steps after {report['warmup']}",
        ),
        ("MFU, data sheet", sheet or "this device has none in the table"),
        ("of a product", f"{report['share_of_product']:.1%} of {measured}"),
        ("peak memory", "not counted on this system" if memory is None else f"{memory:.2f} GiB{memory_of(report)}"),
    ]


def memory_of(report: dict[str, Any]) -> str:
    whose = {"gpu": " on the GPU", "process": " of the process"}[report["peak_memory_of"]]
    return whose + (", the largest of all processes" if report["world_size"] > 1 else "")


def start_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    first = report["first_step"]
    cache = f" ({first['compile_cache']} cache)" if first["compile_cache"] else ""
    parts = (
        f"imports {first['imports_s']:.1f}, building {first['building_s']:.1f}, "
        f"compilation {first['compile_s']:.1f}{cache}, the rest of the update {first['update_s']:.1f}"
    )
    return [("first step after", f"{first['total_s']:.1f} s: {parts}")]


def active_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    found = report["versions"]
    replaced = ", ".join(f"{name} by {op}" for name, op in report["replaced_ops"].items()) or "plain PyTorch"
    names = [f"{name} {found[name]}" for name in ("torch", "cuda", "cudnn", "triton", "python") if found[name]]
    return [
        (
            "batch",
            f"{report['batch_tokens']:,} tokens: {report['accumulation']} × {report['world_size']} × "
            f"{report['micro_batch_rows']} rows of {report['seq_len']}; {report['data']}",
        ),
        (
            "active",
            f"{report['precision']}{', compiled' if report['compile'] else ''}, attention {report['attention']}, "
            f"{'fused ' if report['fused_adamw'] else ''}AdamW, operations: {replaced}",
        ),
        ("versions", ", ".join(names)),
    ]
