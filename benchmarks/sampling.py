"""How fast a model writes: tokens/s for one text and for many at once.

    python benchmarks/sampling.py runs/124m --precision bf16
    python benchmarks/sampling.py gpt2-124m --batch 1 8 64        # the recipe's model with random weights

Each text is a prompt of random tokens, continued by the function that `regpt sample` uses. The median of `--repeats`
counts, after one that is not timed. Prints a table; `--json` keeps it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tables import columns, figure_of

from regpt.checkpoint.open import open_model
from regpt.config import read_config, recipe_names
from regpt.console.lines import status
from regpt.console.text import counted
from regpt.engine.generate import generate
from regpt.engine.processing import SamplingOptions
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, initialize
from regpt.parallel.mesh import choose_device
from regpt.tools.bench.steps import library_versions, percentiles
from regpt.train.config import InferencePrecision
from regpt.train.peak import driver_name, synchronize
from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision

OPTIONS = SamplingOptions(top_k=50)


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[str]
    """A run folder, a checkpoint folder, a Hugging Face folder, a hub name such as gpt2; or a recipe by name, for its
    model with random weights."""
    batch: tuple[int, ...] = (1, 64)
    """Texts at once; several numbers are timed one after another."""
    prompt_tokens: int = 128
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens that each text is continued by."""
    repeats: int = 5
    """Times that each is written, after once without the clock; the median counts."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: InferencePrecision = "fp32"
    """Number format of the computation."""
    json: Path | None = None
    """Also write the report to this file."""


def main(given: Args) -> None:
    device = choose_device(given.device)
    set_matmul_precision(given.precision)
    with status() as say, autocast(given.precision, device):
        say("opening the model")
        model = open_or_make(given.model, device).to(parameter_dtype(given.precision))
        report = bench_sample(model, given.batch, given.prompt_tokens, given.new_tokens, given.repeats, say)
    report = {"kind": "sampling", "source": given.model, "precision": given.precision, **report}
    Console(width=160).print(sample_table(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def open_or_make(name: str, device: torch.device) -> Transformer:
    """The model `name`; for a recipe's name, its model with random weights."""
    if name not in recipe_names():
        return open_model(name, device).model
    config = read_config(name).with_vocab_size()
    return initialize(make_model(config.model).to(device), config.train.seed).eval()


def bench_sample(
    model: Transformer,
    batches: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report: every text is a prompt of random tokens and `new_tokens` more.

    For each number of texts in `batches`, `seconds` from the prompts to the last token and `first_token_s` to the first
    are medians of `repeats`. No text ends early.

    Raises:
        SystemExit: more tokens than the model reads.
    """
    longest = model.config.max_seq_len
    if prompt_tokens + new_tokens > longest:
        raise SystemExit(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} are together more than the "
            f"{longest} tokens that the model reads; try --prompt-tokens {longest // 2} --new-tokens {longest // 2}"
        )
    rows = []
    for batch in batches:
        progress(f"{batch} at once")
        whole = time_generation(model, batch, prompt_tokens, new_tokens, repeats)
        first = time_generation(model, batch, prompt_tokens, 1, repeats)
        row = {"batch": batch, "seconds": whole["median"], "first_token_s": first["median"], "spread": whole["spread"]}
        rows.append(row | {"tokens_per_s": batch * new_tokens / whole["median"]})
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if model.device.type == "cpu" else ""
    return {
        "model": asdict(model.config),
        "parameters": count_parameters(model),
        "device": driver_name(model.device) + threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "batches": rows,
        "versions": library_versions(),
    }


def time_generation(
    model: Transformer, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """`percentiles` of the seconds of `repeats` generations after one that is not timed."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, prompt_tokens)
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator, device=device)  # (B, P)
    seconds = list[float]()
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        generate(model, prompts, new_tokens, options=OPTIONS)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return percentiles(seconds[1:])


def sample_table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    model = f"{report['source']} ({report['parameters']:,} parameters) on {report['device']}, {report['precision']}"
    title = f"{model}; prompts of {report['prompt_tokens']} tokens, {report['new_tokens']} new ones"
    rows = [
        (
            str(row["batch"]),
            f"{row['tokens_per_s']:,.0f}",
            figure_of(row["seconds"] / report["new_tokens"] * 1e3),
            figure_of(row["first_token_s"] * 1e3),
            f"{row['spread']:.1%}",
        )
        for row in report["batches"]
    ]
    return columns(title, ("texts at once", "tokens/s", "ms a token", "first token, ms", "spread"), rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
