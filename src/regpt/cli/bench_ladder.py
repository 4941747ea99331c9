"""`regpt bench ladder`: what makes training fast, change by change, on this device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt.cli.output import OTHER_JSON, check_folder, check_json, show
from regpt.cli.parse import parse
from regpt.config import read_config
from regpt.console.lines import print_note, status
from regpt.errors import UsageError
from regpt.files import write_json
from regpt.ranges import MANY, Range

CPU_ROWS = 8  # where the recipe leaves it to the device


@dataclass(frozen=True)
class BenchLadderArgs:
    """Climb the lecture's ladder on this device: float32, TF32, bfloat16, torch.compile, flash attention, padded
    vocabulary, fused AdamW, and what this package adds. Each rung trains the same model on invented tokens."""

    model: Annotated[str, tyro.conf.arg(metavar="RECIPE|FILE")] = ""
    """Recipe whose model is trained; default: gpt2-124m on a GPU, gpt2-tiny on a CPU."""
    rows: Annotated[int, Range(0, MANY)] = 0
    """Rows a step; default: 16 on a GPU, as in the lecture, the recipe's train.micro_batch_rows on a CPU."""
    steps: Annotated[int, Range(1, MANY)] = 20
    """Steps of each rung that are timed."""
    warmup: Annotated[int, Range(1, MANY)] = 3
    """Steps before them."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.png|.svg")] = None
    """Also draw the ladder into this file."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file, rung by rung; - prints it as JSON instead."""


def main(args: list[str]) -> int:
    given = parse(BenchLadderArgs, args, prog="regpt bench ladder")
    check_json(given.json)
    from regpt.data.picture import check_picture
    from regpt.parallel.mesh import choose_device, under_launcher
    from regpt.runs.bench import Window
    from regpt.runs.bench_ladder import bench_ladder
    from regpt.tools.bench.ladder import LADDER, LECTURE_ROWS
    from regpt.tools.bench.tables import draw_ladder, ladder_table

    if given.out:
        check_picture(Path(given.out))
        check_folder("--out", given.out)
    if under_launcher():
        raise UsageError("regpt bench ladder runs in one process; start it without torchrun")
    window, on_gpu = Window(given.steps, given.warmup), choose_device(given.device).type == "cuda"
    name = given.model or ("gpt2-124m" if on_gpu else "gpt2-tiny")
    config = read_config(name).with_vocab_size()
    config = replace(config, train=replace(config.train, device=given.device))
    own = config.train.micro_batch_rows
    rows = given.rows or (LECTURE_ROWS if on_gpu else CPU_ROWS if own == "auto" else own)
    target = None if given.json in (None, "-") else Path(given.json)
    keep = partial(write_json, target, remedy=OTHER_JSON) if target else lambda report: None
    with status() as say:
        report = bench_ladder(config, LADDER, window, name=name, rows=rows, progress=say, keep=keep)
    show(report, given.json, ladder_table)
    if given.out:
        draw_ladder(report, Path(given.out))
        print_note(f"drawn: {given.out}")
    return 0
