"""`regpt bench train`: the trainer of a run, timed over a few steps."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regpt import STARTED
from regpt.config import RunConfig
from regpt.data.loader import check_batch
from regpt.data.prefetch import Prefetcher
from regpt.kernels.masked import mask_kernel
from regpt.model.adapters import adapter_summary, begin_adapters
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, initialize, real_shape, set_weight, slots
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
from regpt.tools.bench.steps import (
    attention_backend,
    library_versions,
    reset_peak,
    speed_of,
    time_steps,
)
from regpt.train.config import PrecisionName
from regpt.train.memory import free_memory, peak_memory_gib
from regpt.train.optim import make_optimizer
from regpt.train.peak import PRODUCT_SIZE, device_figures, matmul_flops
from regpt.train.precision import HALF_TYPES, parameter_dtype
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
def opened_trainer(config: RunConfig, mesh: Mesh, corpus: Corpus) -> Iterator[Trainer]:
    """A trainer as `regpt train` builds it."""
    model = random_base(build_model(config, mesh.device), config.train.seed)
    optimizer = make_optimizer(model, config.optim, mesh.device, config.train.seed)
    with Prefetcher(build_loader(config, corpus, mesh), steps=config.train.steps) as batches:
        trainer = build_trainer(config, mesh, model, optimizer, batches)
        with_chosen_rows(config, trainer)
        yield trainer


def random_base(model: Transformer, seed: int) -> Transformer:
    """Random weights; a frozen base, whose values matter to no time, is drawn tensor by tensor on the device: billions
    take seconds, and a quantized one is never there as a whole."""
    if model.adapter is None:
        return initialize(model, seed)
    for name, slot in slots(model).items():
        value = torch.ones(real_shape(model, name, slot), device=model.device)
        set_weight(model, name, slot, value.normal_(0, model.init_std(name)) if value.dim() > 1 else value)
    begin_adapters(model, seed)
    return model


def bench_train(config: RunConfig, window: Window, *, recipe: str, progress: Progress) -> Report | None:
    """Time the training of `config`, called `recipe`; return the report, None in all processes but the main one."""
    source = config.data.path or " + ".join(config.data.mixture) or INVENTED
    with (
        open_mesh(config.train.device, deterministic=config.train.deterministic) as mesh,
        opened_data(shortened(config, window)) as (config, corpus),
    ):
        progress("building")
        with opened_trainer(config, mesh, corpus) as trainer:
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
                "first_step_s": times.first_end - STARTED,
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
        dtype, masked = HALF_TYPES.get(train.precision, parameter_dtype(train.precision)), config.data.document_mask
        masked_by = mask_kernel(model.ops) if masked or model.config.window else None
        attention = masked_by or attention_backend(model.config, T, dtype, mesh.device, masked=masked)
    return {
        "device": device_name(mesh.device),
        "world_size": mesh.world_size,
        "model": asdict(model.config),
        "parameters": count_parameters(model),
        "adapter": None if model.adapter is None else {**asdict(model.adapter), **adapter_summary(model)},
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
