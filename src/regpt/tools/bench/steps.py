"""Times of a trainer's steps, and what was active meanwhile: attention backend, number format, versions."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend

import regpt
from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.tools.measure import installed
from regpt.train.trainer import Row, Trainer


@dataclass(frozen=True)
class StepTimes:
    """Times of a trainer's updates.

    Attributes:
        first_s: seconds of the first update, compilation included.
        steady_ms: milliseconds of each update after the warm-up, from the end of the one before.
        first_end: when it was finished, by `time.perf_counter`.
        rows: the trainer's own row of metrics of every update.
    """

    first_s: float
    steady_ms: tuple[float, ...]
    first_end: float
    rows: tuple[Row, ...]


def time_steps(trainer: Trainer, warmup: int, progress: Callable[[str], None] = lambda text: None) -> StepTimes:
    """Run `trainer` to its last step through its own loop; the first `warmup` steps are not counted as steady.

    The clock is read after each update: it holds everything that a run spends on a step, the loader's work too. What
    the device still does then (the optimizer's update) counts towards the next step.
    """
    assert 0 < warmup < trainer.config.steps
    clock = [time.perf_counter()]
    rows: list[Row] = []
    fitted = [trainer.micro_batch.rows]

    def log(row: Row) -> None:
        clock.append(time.perf_counter())
        rows.append(row)
        if trainer.micro_batch.rows != fitted[-1]:  # repeated after it ran out of memory, whose peak means nothing
            fitted.append(trainer.micro_batch.rows)
            reset_peak(trainer.mesh.device)
        progress(f"step {len(rows)} of {trainer.config.steps}")

    progress("first step")
    trainer.fit(Timed(log))
    steady = [(end - begin) * 1e3 for begin, end in zip(clock[warmup:], clock[warmup + 1 :])]
    return StepTimes(clock[1] - clock[0], tuple(steady), clock[1], tuple(rows))


def reset_peak(device: torch.device) -> None:
    """Count the peak of a GPU's memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Timed:
    """Actions of a run that keeps nothing: `log` is all that happens."""

    def __init__(self, note: Callable[[Row], None]):
        self.note = note

    def log(self, row: Row) -> None:
        self.note(row)

    def validate(self, step: int) -> None:
        pass

    sample = save = validate

    def stop_requested(self) -> bool:
        return False

    def examine(self) -> Row:
        return {}

    def rewind(self) -> None:
        raise UserError("an update cannot be rewound, there is no run folder; set train.on_non_finite skip")


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, mean, extremes, and the relative distance of the percentiles (`spread`)."""
    names = ("median", "p10", "p90", "min", "max")
    found = dict(zip(names, np.percentile(times, (50, 10, 90, 0, 100)).tolist()))
    return found | {"mean": fmean(times), "spread": (found["p90"] - found["p10"]) / found["median"]}


def speed_of(times: StepTimes, tokens: int, flops_per_token: int, world_size: int) -> dict[str, Any]:
    """Milliseconds a step, tokens/s (all processes; each) and FLOP/s (all), from the median of the steady steps."""
    ms = percentiles(times.steady_ms)
    tokens_per_s = tokens / ms["median"] * 1e3
    return {
        "step_ms": ms,
        "steps_ms": [round(value, 3) for value in times.steady_ms],
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / world_size,
        "flops_per_token": flops_per_token,
        "flops_per_s": tokens_per_s * flops_per_token,
    }


# ---- what is active: asked for where it runs, not guessed ------------------------------------------------------------


def attention_backend(
    config: ModelConfig, seq_len: int, dtype: torch.dtype, device: torch.device, *, masked: bool = False
) -> str:
    """What torch's scaled_dot_product_attention computes attention of this shape with: flash, cudnn, math, …; causal,
    or `masked` as for documents."""
    shape = (1, config.n_head, seq_len, config.n_embd // config.n_head)  # (B, H, T, D)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device).tril() if masked else None
    choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]  (nothing public says it)
    choice = choose(q, q, q, attn_mask=mask, dropout_p=0.0, is_causal=not masked)
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def library_versions() -> dict[str, str | int | None]:
    """Of regpt, Python and what computes."""
    return {
        "regpt": regpt.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "triton": installed("triton"),
        "system": platform.platform(),
    }
