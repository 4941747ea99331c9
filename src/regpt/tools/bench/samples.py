"""How fast a model writes: tokens/s for one text and for many at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from regpt.console.text import counted
from regpt.errors import UsageError
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters
from regpt.sample.generate import generate
from regpt.sample.sampling import SamplingOptions
from regpt.tools.bench.steps import library_versions, percentiles
from regpt.train.peak import driver_name, synchronize

OPTIONS = SamplingOptions(top_k=50)


def bench_sample(
    model: Transformer,
    batches: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report of `regpt bench sample`: every text is a prompt of random tokens and `new_tokens` more.

    For each number of texts in `batches`, `seconds` from the prompts to the last token and `first_token_s` to the first
    are medians of `repeats`. No text ends early.

    Raises:
        UsageError: more tokens than the model reads.
    """
    longest = model.config.max_seq_len
    if prompt_tokens + new_tokens > longest:
        raise UsageError(
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
        generate(model, prompts, new_tokens, options=OPTIONS, generator=generator)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return percentiles(seconds[1:])
