"""`regpt bench train` and `regpt bench ladder`: the trainer of a run, timed over a few steps."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regpt.config import RunConfig
from regpt.data.loader import check_batch
from regpt.data.prefetch import Prefetcher
from regpt.errors import UserError, first_line
from regpt.kernels.masked import mask_kernel
from regpt.model.ops import PLAIN
from regpt.model.weights import count_parameters, initialize
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.runs.build import (
    Corpus,
    build_loader,
    build_model,
    build_trainer,
    choose_kernels,
    open_shards,
    with_chosen_rows,
)
from regpt.runs.folder import device_name, source_commit
from regpt.tools.bench.data import MEAN_LENGTH, invent_shards, invented_lengths
from regpt.tools.bench.ladder import EXPLICIT, LADDER, RECIPE, LadderRung, Setup, is_lectures, lacks_tf32, unfused
from regpt.tools.bench.steps import (
    attention_backend,
    computing_dtype,
    library_versions,
    percentiles,
    reset_peak,
    speed_of,
    time_steps,
)
from regpt.train.config import PrecisionName
from regpt.train.memory import free_memory, peak_memory_gib
from regpt.train.optim import make_optimizer
from regpt.train.peak import PRODUCT_SIZE, device_figures, matmul_flops, synchronize
from regpt.train.trainer import Trainer

Progress = Callable[[str], None]
Report = dict[str, Any]
INVENTED = "invented tokens"
GPU_PRODUCT = 8192  # large enough for a data centre's GPU to show its best
PRODUCT_SECONDS = 0.5  # long enough for it to slow down to what its power supply allows


@dataclass(frozen=True)
class Window:
    """Which steps are timed: `steps` of them, after `warmup` others."""

    steps: int
    warmup: int


def shortened(config: RunConfig, window: Window) -> RunConfig:
    """`config` for so many steps; the learning rate follows no schedule that could be too long for them, and any
    tokenizer will do: tokens are not read as text. Of a batch ramp the first stage is timed."""
    train = replace(config.train, steps=window.warmup + window.steps, batch_ramp=())
    optim = replace(config.optim, schedule="constant", decay_steps=None)
    return replace(config, train=train, optim=optim, data=replace(config.data, tokenizer=""))


def check_bench(config: RunConfig, window: Window, processes: int) -> None:
    """Raise what `bench_train` would for data or a batch that do not fit, before any process is started."""
    config = shortened(config, window)
    data = config.data
    check_batch(data.seq_len, config.train.batch_tokens, config.train.first_rows, processes)
    if data.path or data.mixture:
        build_loader(config, open_shards(config), Mesh(0, processes, torch.device("cpu")))


@contextlib.contextmanager
def opened_data(config: RunConfig) -> Iterator[tuple[RunConfig, Corpus]]:
    """The data that `config` names; without any, invented tokens in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="regpt-bench-", ignore_cleanup_errors=True) as folder:
        if not config.data.path and not config.data.mixture:
            shards = Path(folder) / "shards"
            tokens = 4 * config.train.batch_tokens + 1_000_000  # enough for every order, little to write
            config = config.with_vocab_size()
            invent_shards(shards, invented_lengths(tokens // MEAN_LENGTH), config.model.vocab_size)
            config = replace(config, data=replace(config.data, path=str(shards)))
        corpus = open_shards(config)
        yield config.with_vocab_size(corpus.vocab_size), corpus


@contextlib.contextmanager
def opened_trainer(config: RunConfig, mesh: Mesh, corpus: Corpus, setup: Setup | None = None) -> Iterator[Trainer]:
    """A trainer as `regpt train` builds it, with the attention and the AdamW of a ladder's `setup` where given."""
    setup = setup or {}
    ops = EXPLICIT if setup.get("attention") == "explicit" else PLAIN
    model = initialize(build_model(config, mesh.device, ops), config.train.seed)
    optimizer = make_optimizer(model, config.optim, mesh.device)
    if setup.get("adamw") == "default":
        optimizer = unfused(optimizer)
    with Prefetcher(build_loader(config, corpus, mesh), steps=config.train.steps) as batches:
        trainer = build_trainer(config, mesh, model, optimizer, batches)
        with_chosen_rows(config, trainer)
        yield trainer


def bench_train(
    config: RunConfig, window: Window, *, recipe: str, imported_s: float, progress: Progress
) -> Report | None:
    """Time the training of `config`; the report, None in all processes but the main one.

    Args:
        recipe: its name as typed.
        imported_s: seconds from the start of the process to this call.
    """
    source = config.data.path or " + ".join(config.data.mixture) or INVENTED
    began = time.perf_counter()
    with open_mesh(config.train.device, deterministic=config.train.deterministic) as mesh:
        opened_s = time.perf_counter() - began
        with opened_data(shortened(config, window)) as (config, corpus):
            progress("building")
            started = time.perf_counter()
            with opened_trainer(config, mesh, corpus) as trainer:
                synchronize(mesh.device)
                built_s = opened_s + time.perf_counter() - started
                times = time_steps(trainer, window.warmup, progress)
                report = {
                    "kind": "bench train",
                    "recipe": recipe,
                    "data": source,
                    **describe(trainer, config, mesh),
                    "steps": window.steps,
                    "warmup": window.warmup,
                    **speed_of(times, config.train.batch_tokens, trainer.flops_per_token, mesh.world_size),
                    "peak_memory_gib": greatest(mesh, peak_memory_gib(mesh.device)),
                    "peak_memory_of": "gpu" if mesh.device.type == "cuda" else "process",
                    "first_step": times.first_step(imported_s, built_s),
                    "loss": [row["loss"] for row in (times.rows[0], times.rows[-1])],
                }
            del trainer  # its memory is needed for the product
            start_afresh(mesh.device)
            progress("a large matrix product")
            report |= utilisation(report["flops_per_s"], mesh, config.train.precision)
    return report if mesh.is_main else None


def describe(trainer: Trainer, config: RunConfig, mesh: Mesh) -> Report:
    """Describe the model, the device and the path of a benchmark."""
    model, train, rows, T = trainer.model, trainer.config, trainer.micro_batch.rows, config.data.seq_len
    kernels = choose_kernels(config, model, mesh.device)
    attention = None  # where the fused kernels compute it: their reason names its library
    if kernels.name == "plain":
        dtype, masked = computing_dtype(train.precision), config.data.document_mask
        masked_by = mask_kernel(model.ops) if masked or model.config.window else None
        attention = masked_by or attention_backend(model.config, T, dtype, mesh.device, masked=masked)
    return {
        "device": device_name(mesh.device),
        "world_size": mesh.world_size,
        "model": asdict(model.config),
        "parameters": count_parameters(model),
        "seq_len": T,
        "batch_tokens": train.batch_tokens,
        "micro_batch_rows": rows,
        "accumulation": train.batch_tokens // (rows * T * mesh.world_size),
        "precision": train.precision,
        "kernels": asdict(kernels),
        "compile": train.compile and kernels.name == "plain",
        "pad_vocab": train.pad_vocab,
        "document_mask": config.data.document_mask,
        "attention": attention,
        "fused_adamw": bool(trainer.optimizer.defaults.get("fused")),
        "versions": {**library_versions(), "commit": source_commit()},
    }


def utilisation(flops_per_s: float, mesh: Mesh, precision: PrecisionName) -> Report:
    """The share of the FLOP/s of all devices: by their data sheet, and by a large product measured on each at once."""
    on_gpu = mesh.device.type == "cuda"
    wide = "fp8" if precision == "fp8" else "bf16"
    n, product = (GPU_PRODUCT, wide) if on_gpu else (PRODUCT_SIZE[mesh.device.type], precision)
    reached = matmul_flops(mesh.device, product, n, seconds=PRODUCT_SECONDS)
    measured = mesh.sum(torch.tensor(reached / 1e12, device=mesh.device)).item()
    sheet = device_figures(mesh.device)
    listed = sheet.peak(precision) / 1e12 * mesh.world_size if sheet else None
    named = sheet.mfu_precision(precision) if sheet else None
    return {
        "data_sheet": {"tflops": listed, "precision": named, "source": sheet.source} if sheet else None,
        "mfu": flops_per_s / listed / 1e12 if listed else None,
        "product": {"n": n, "precision": product, "tflops": measured},
        "share_of_product": flops_per_s / measured / 1e12,
    }


def greatest(mesh: Mesh, value: float | None) -> float | None:
    """The largest `value` of all processes; None where nothing counts it."""
    return max(float(one) for one in mesh.gather(str(value or 0.0).encode())) or None


def start_afresh(device: torch.device) -> None:
    """Drop compiled graphs, free memory, and count its peak from here."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch.compiler.reset()
    free_memory(device)
    reset_peak(device)


# ---- the ladder ------------------------------------------------------------------------------------------------------


def bench_ladder(
    config: RunConfig, window: Window, *, name: str, rows: int, progress: Progress, rungs: Sequence[LadderRung] = LADDER
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
        "kind": "bench ladder",
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
