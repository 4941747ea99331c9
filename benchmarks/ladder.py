"""The ladder of "Let's reproduce GPT-2 (124M)" (Karpathy 2024): the same step, made faster by one change at a time.

    python benchmarks/ladder.py                                   # a GPU: GPT-2 124M, 16 rows of 1024, the lecture's
    python benchmarks/ladder.py --device cpu                      # a CPU: gpt2-tiny
    python benchmarks/ladder.py --model gpt2-350m --rows 8 --json ladder.json --picture ladder.png

Each rung trains the same model on invented tokens, and keeps the changes of those before it. A rung is an entry of
`LADDER`. Prints a table; `--json` keeps everything, `--picture` draws it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tables import columns, figure_of
from torch import Tensor

from regpt.config import RunConfig, read_config
from regpt.console.lines import status
from regpt.console.text import counted
from regpt.data.prefetch import Prefetcher
from regpt.errors import UserError, first_line
from regpt.model.config import ModelConfig
from regpt.model.ops import PLAIN
from regpt.model.weights import initialize
from regpt.parallel.mesh import Mesh, choose_device, open_mesh
from regpt.runs.bench import INVENTED, Report, Window, opened_data, shortened, start_afresh
from regpt.runs.build import Corpus, build_loader, build_model, build_trainer, with_chosen_rows
from regpt.runs.folder import device_name, source_commit
from regpt.tools.bench.steps import library_versions, percentiles, time_steps
from regpt.train.memory import peak_memory_gib
from regpt.train.optim import make_optimizer
from regpt.train.trainer import Trainer

CPU_ROWS = 8  # where the recipe leaves them to the device
LECTURE_NOTE = 'lecture: milliseconds on one A100 in "Let\'s reproduce GPT-2 (124M)" (Karpathy 2024)'
# Okabe & Ito's blue (2008), told apart by colour-blind readers, and greys that differ from it in lightness too.
HERE, LECTURE, TEXT, FAINT = "#0072B2", "#BBBBBB", "#222222", "#666666"


@dataclass(frozen=True)
class Args:
    model: str = ""
    """Recipe whose model is trained; default: gpt2-124m on a GPU, gpt2-tiny on a CPU."""
    rows: int = 0
    """Rows a step; default: 16 on a GPU, as in the lecture, the recipe's train.micro_batch_rows on a CPU."""
    steps: int = 20
    """Steps of each rung that are timed."""
    warmup: int = 3
    """Steps before them."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    json: Path | None = None
    """Also write the report to this file."""
    picture: Path | None = None
    """Also draw it into this file, .png or .svg."""


def main(given: Args) -> None:
    on_gpu = choose_device(given.device).type == "cuda"
    name = given.model or ("gpt2-124m" if on_gpu else "gpt2-tiny")
    config = read_config(name).with_vocab_size()
    config = replace(config, train=replace(config.train, device=given.device))
    own = config.train.micro_batch_rows
    rows = given.rows or (LECTURE_ROWS if on_gpu else CPU_ROWS if own == "auto" else own)
    with status() as say:
        report = bench_ladder(config, Window(given.steps, given.warmup), name=name, rows=rows, progress=say)
    Console(width=160).print(ladder_table(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if given.picture:
        draw(report, given.picture)


# ---- the rungs -------------------------------------------------------------------------------------------------------

LECTURE_MODEL = ModelConfig()  # GPT-2 124M
LECTURE_ROWS, LECTURE_SEQ_LEN = 16, 1024
RECIPE = object()  # a change to the value that the recipe itself has
Setup = Mapping[str, object]


@dataclass(frozen=True)
class LadderRung:
    """One change, or several that belong together.

    Attributes:
        name: of the change.
        changes: values from here on, by configuration key (`train.precision`; `RECIPE` for the recipe's own value), and
            `attention`, `explicit` (softmax(q·kᵀ)·v written out) or `torch` (scaled_dot_product_attention), and
            `adamw`, `default` (PyTorch's own choice) or `fused`.
        lecture_ms: milliseconds on the lecture's A100 for 16,384 tokens of GPT-2 124M.
    """

    name: str
    changes: Setup
    lecture_ms: float | None = None


START = {"train.precision": "fp32", "train.compile": False, "train.kernels": "plain", "train.pad_vocab": False}
LADDER = (
    LadderRung("float32", START | {"attention": "explicit", "adamw": "default"}, 1000),
    LadderRung("TF32", {"train.precision": "tf32"}, 333),
    LadderRung("bfloat16", {"train.precision": "bf16"}, 300),
    LadderRung("torch.compile", {"train.compile": True}, 130),
    LadderRung("flash attention", {"attention": "torch"}, 96),
    LadderRung("padded vocabulary", {"train.pad_vocab": True}, 93),
    LadderRung("fused AdamW", {"adamw": "fused"}, 90),
    LadderRung("fused kernels", {"train.kernels": "fused"}),
    LadderRung("the recipe's batch", {"train.batch_tokens": RECIPE, "train.micro_batch_rows": RECIPE}),
)


def is_lectures(model: ModelConfig, tokens: int, seq_len: int) -> bool:
    """True when a ladder does the work of the lecture's, so that their times can be compared."""
    return model == LECTURE_MODEL and seq_len == LECTURE_SEQ_LEN and tokens == LECTURE_ROWS * LECTURE_SEQ_LEN


def lacks_tf32(device: torch.device) -> bool:
    """Whether `device` ignores the switch for TensorFloat-32, which needs an NVIDIA GPU of Ampere or newer."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√D)·v (Vaswani et al. 2017, eq. 1), every product written out: the form before flash attention.

    Arguments and result as in `regpt.model.ops.attention`. Memory: several times B·H·T·S numbers.
    """
    T, S = q.size(-2), k.size(-2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(q.size(-1)))  # (B, H, T, S)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)  # autocast computes it in float32
    return weights @ v  # (B, H, T, D)


EXPLICIT = replace(PLAIN, attention=explicit_attention)


def unfused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same AdamW over the same parameters in PyTorch's own default form, as in a script that does not ask for
    `fused`: several kernels over lists of tensors on a GPU (foreach), one tensor after another on a CPU."""
    groups = [{**group, "fused": None} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups, lr=optimizer.defaults["lr"])


# ---- climbing --------------------------------------------------------------------------------------------------------


def bench_ladder(
    config: RunConfig,
    window: Window,
    *,
    name: str,
    rows: int,
    progress: Callable[[str], None],
    rungs: Sequence[LadderRung] = LADDER,
) -> Report:
    """Time `rungs` on `rows` rows a step of the model of `config`, one after another in this process.

    Each rung keeps the changes of those before it. One that fails, or would change nothing, is skipped with the reason.
    """
    T = config.data.seq_len
    first = changed(config, {"train.batch_tokens": rows * T, "train.micro_batch_rows": rows})
    done: list[Report] = []
    with open_mesh(config.train.device) as mesh, opened_data(shortened(first, window)) as (first, corpus):
        state: Setup = {}
        for number, rung in enumerate(rungs, start=1):
            progress(f"rung {number} of {len(rungs)}, {rung.name}")
            own = {key: value_in(config, key) if value is RECIPE else value for key, value in rung.changes.items()}
            setup = {**state, **own}
            found = climb_rung(first, setup, mesh, corpus, window) if setup != state else {"skipped": "no change here"}
            if "ms" in found:
                times, state = [row["ms"] for row in done if "ms" in row] or [found["ms"]], setup
                found |= {"factor": times[-1] / found["ms"], "total": times[0] / found["ms"]}
            done.append({"name": rung.name, "lecture_ms": rung.lecture_ms, **found})
    return {
        "kind": "ladder",
        "model_name": name,
        "model": asdict(config.model),
        "device": device_name(mesh.device),
        "data": INVENTED,
        "rows": rows,
        "seq_len": T,
        "tokens": rows * T,
        "steps": window.steps,
        "warmup": window.warmup,
        "lectures": is_lectures(config.model, rows * T, T),
        "rungs": done,
        "versions": {**library_versions(), "commit": source_commit()},
    }


def climb_rung(first: RunConfig, setup: Setup, mesh: Mesh, corpus: Corpus, window: Window) -> Report:
    """Figures of a rung; `ms` is the time of a step's tokens of `first`, whatever the rung's own batch."""
    if setup.get("train.precision") == "tf32" and lacks_tf32(mesh.device):
        return {"skipped": "TensorFloat-32 needs an NVIDIA GPU of the Ampere generation or newer"}
    start_afresh(mesh.device)
    config = changed(first, setup)
    try:
        with opened_trainer(config, mesh, corpus, setup) as trainer:
            wanted = trainer.micro_batch.rows
            times = time_steps(trainer, window.warmup)
    except (RuntimeError, ImportError, UserError) as error:  # a format, a compiler or kernels missing here
        return {"skipped": f"not on this device: {first_line(error)}"}
    ms = percentiles(times.steady_ms)
    share = first.train.batch_tokens / config.train.batch_tokens
    return {
        "setup": dict(setup),
        **{key: ms[name] * share for key, name in {"ms": "median", "p10": "p10", "p90": "p90"}.items()},
        "spread": ms["spread"],
        "tokens_per_s": config.train.batch_tokens / ms["median"] * 1e3,
        "batch_tokens": config.train.batch_tokens,
        "rows": trainer.micro_batch.rows,
        "rows_wanted": wanted,
        "first_step_s": times.first_s,
        "peak_memory_gib": peak_memory_gib(mesh.device) if mesh.device.type == "cuda" else None,
        "loss": times.rows[-1]["loss"],
    }


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with other values, by keys such as `train.precision`; keys of no section are left out."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def value_in(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@contextlib.contextmanager
def opened_trainer(config: RunConfig, mesh: Mesh, corpus: Corpus, setup: Setup) -> Iterator[Trainer]:
    """A trainer as `regpt train` builds it, with the attention and the AdamW of `setup`."""
    ops = EXPLICIT if setup.get("attention") == "explicit" else PLAIN
    model = initialize(build_model(config, mesh.device, ops), config.train.seed)
    optimizer = make_optimizer(model, config.optim, mesh.device)
    if setup.get("adamw") == "default":
        optimizer = unfused(optimizer)
    with Prefetcher(build_loader(config, corpus, mesh), steps=config.train.steps) as batches:
        trainer = build_trainer(config, mesh, model, optimizer, batches)
        with_chosen_rows(config, trainer)
        yield trainer


# ---- table and picture -----------------------------------------------------------------------------------------------


def ladder_table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    rungs, lectures = report["rungs"], report["lectures"]
    memory = any(rung.get("peak_memory_gib") for rung in rungs)
    headings = ["ms", "p10–p90", "× before", "× first", "tokens/s", *["GiB"] * memory]

    def cells(rung: dict[str, Any]) -> list[str]:
        if "ms" not in rung:
            return [""] * len(headings)
        range_ms = f"{figure_of(rung['p10'])}–{figure_of(rung['p90'])}"
        factors = [f"{rung['factor']:.2f}", f"{rung['total']:.2f}", f"{rung['tokens_per_s']:,.0f}"]
        return [figure_of(rung["ms"]), range_ms, *factors, *([f"{rung['peak_memory_gib']:.1f}"] if memory else [])]

    rows = [
        [rung["name"], *cells(rung), *[figure_of(rung["lecture_ms"])] * lectures, rung_note(rung, report["tokens"])]
        for rung in rungs
    ]
    timed = f"{counted(report['tokens'], 'token')}, median of {counted(report['steps'], 'step')}"
    title, caption = f"{report['model_name']} on {report['device']}: {timed}", LECTURE_NOTE if lectures else None
    return columns(title, ["rung", *headings, *["lecture"] * lectures, ""], rows, caption)


def rung_note(rung: dict[str, Any], tokens: int) -> str:
    """Why a rung was skipped, or how its work differs from that of the others."""
    if "skipped" in rung:
        return rung["skipped"]
    notes = []
    if rung["rows"] != rung["rows_wanted"]:
        notes.append(f"out of memory with {counted(rung['rows_wanted'], 'row')} at once, so {rung['rows']}")
    if rung["batch_tokens"] != tokens:
        notes.append(f"steps of {rung['batch_tokens']:,} tokens, {rung['rows']} rows at once; ms of {tokens:,} of them")
    return "; ".join(notes)


def draw(report: Report, path: Path) -> None:
    """Milliseconds for the same tokens, rung by rung."""
    rungs, compared = report["rungs"], report["lectures"]
    figure = Figure(figsize=(9.5, 1.7 + 0.55 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    for place, rung in enumerate(rungs):
        lecture = rung["lecture_ms"] if compared else None
        top, ms, note = (place - 0.12 if lecture else place), rung.get("ms", 0), rung.get("skipped", "").split(":")[0]
        figures = f"{ms:,.4g} ms   {rung['total']:.2f}×   {rung['tokens_per_s']:,.0f} tokens/s" if ms else note
        if rung.get("rows") != rung.get("rows_wanted"):
            figures += f"   {rung['rows']} rows at once"  # the rest did not fit into memory
        axes.barh(top, ms, height=0.46, color=HERE)
        write(axes, ms, top, figures, 10, TEXT if ms else FAINT)
        if lecture:
            axes.barh(place + 0.24, lecture, height=0.2, color=LECTURE)
            write(axes, lecture, place + 0.24, f"{lecture:,.0f}", 8, FAINT)
    longest = max((rung["lecture_ms"] or 0 for rung in rungs), default=0) if compared else 0
    axes.set_xlim(0, max(longest / 0.94, max(rung.get("ms", 1.0) for rung in rungs) / 0.5))  # room for the figures
    axes.set_ylim(len(rungs) - 0.5, -0.5)  # the first rung on top
    axes.set_yticks(range(len(rungs)), [rung["name"] for rung in rungs], fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    source = '\ngrey: on one A100, in the lecture "Let\'s reproduce GPT-2 (124M)" (Karpathy 2024)' if compared else ""
    work = f"milliseconds for {report['tokens']:,} tokens: forward, backward and update{source}"
    axes.set_xlabel(work, color=FAINT, loc="left")
    title = f"{report['model_name']} on {report['device']}: time for the same work, and times as fast as the first"
    axes.set_title(title, loc="left", fontsize=11, color=TEXT)
    figure.savefig(path, dpi=150)


def write(axes, x: float, y: float, words: str, size: int, color: str) -> None:
    """`words` after the end of a bar."""
    axes.annotate(words, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=size, color=color)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
