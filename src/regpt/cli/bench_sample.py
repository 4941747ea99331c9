"""`regpt bench sample`: how fast a model writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt.cli.output import check_json, show
from regpt.cli.parse import parse
from regpt.config import read_config, recipe_names
from regpt.console.lines import status
from regpt.ranges import MANY, Range
from regpt.train.config import InferencePrecision

if TYPE_CHECKING:
    import torch

    from regpt.model.transformer import Transformer


@dataclass(frozen=True)
class BenchSampleArgs:
    """Time how fast a model writes, one text at a time and many at once; the prompts are random tokens."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|RECIPE")]
    """A run folder, a checkpoint folder, a Hugging Face folder, a hub name such as gpt2; or a recipe by name, for its
    model with random weights."""
    batch: Annotated[tuple[int, ...], Range(1, 1 << 20)] = (1, 64)
    """Texts at once; several numbers are timed one after another."""
    prompt_tokens: Annotated[int, Range(1, MANY)] = 128
    """Tokens of each prompt."""
    new_tokens: Annotated[int, Range(1, MANY)] = 128
    """Tokens that each text is continued by."""
    repeats: Annotated[int, Range(1, 1 << 20)] = 5
    """Times that each is written, after once without the clock; the median counts."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: InferencePrecision = "fp32"
    """Number format of the computation."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file; - prints it as JSON instead."""


def main(args: list[str]) -> int:
    """Parse, open the model, write, print."""
    given = parse(BenchSampleArgs, args, prog="regpt bench sample")
    check_json(given.json)
    from regpt.parallel.mesh import choose_device
    from regpt.tools.bench.samples import bench_sample
    from regpt.tools.bench.tables import sample_table
    from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision

    device = choose_device(given.device)
    set_matmul_precision(given.precision)
    with status() as say, autocast(given.precision, device):
        say("opening the model")
        model = open_or_make(given.model, device).to(parameter_dtype(given.precision))
        report = bench_sample(
            model, given.batch, given.prompt_tokens, given.new_tokens, given.repeats, given.precision, say
        )
    show({"kind": "bench sample", "source": given.model} | report, given.json, sample_table)
    return 0


def open_or_make(name: str, device: torch.device) -> Transformer:
    """The model that `name` means; for a recipe's name, its model with random weights."""
    from regpt.checkpoint.open import open_model
    from regpt.model.transformer import Transformer
    from regpt.model.weights import initialize

    if name not in recipe_names():
        return open_model(name, device).model
    config = read_config(name).with_vocab_size()
    return initialize(Transformer(config.model).to(device), config.train.seed).eval()
