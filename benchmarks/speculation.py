"""Speculation: tokens/s with drafts against without, in turns, and how many of their tokens are drawn.

python benchmarks/speculation.py runs/1 --drafts ngram runs/small runs/1@600 --text book.txt
python benchmarks/speculation.py gpt2-124m --drafts same --precision bf16 --batch 1 8   # random weights: upper bound
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from sampling import open_or_make, random_prompts, synchronize_all

from regpt.checkpoint.open import open_model
from regpt.cli.chat import DrawFlags
from regpt.config import recipe_names
from regpt.console.lines import print_json
from regpt.engine.engine import PAGE_SIZE, Engine
from regpt.engine.fast import half_copy
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request
from regpt.parallel.mesh import choose_device
from regpt.train.config import InferencePrecision
from regpt.train.precision import HALF_TYPES, autocast, parameter_dtype, set_matmul_precision


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[str]
    """A MODEL, or a recipe by name, for its model with random weights."""
    drafts: tuple[str, ...] = ("ngram",)
    """ngram, a MODEL, a checkpoint RUN@STEP, or same: the model itself."""
    draft_tokens: tuple[int, ...] = (4,)
    """Tokens proposed a step."""
    batch: tuple[int, ...] = (1,)
    """Texts at once."""
    text: Path | None = None
    """Prompts are places of this text; without it random tokens."""
    prompt_tokens: int = 64
    """Tokens of each prompt."""
    new_tokens: int = 64
    """Tokens that each text is continued by."""
    temperature: float = 1.0
    """0 is greedy."""
    repeats: int = 3
    """Times that all are written in turns, each time with other prompts, after once without the clock."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: InferencePrecision = "fp32"
    """Number format of the computation."""


def main(given: Args) -> None:
    device = choose_device(given.device)
    set_matmul_precision(given.precision)
    random_weights = given.model in recipe_names()
    opened = None if random_weights else open_model(given.model, device)
    model = open_or_make(given.model, device) if opened is None else opened.model
    halved = given.precision in HALF_TYPES and device.type == "cuda"
    model = half_copy(model, HALF_TYPES[given.precision]) if halved else model.to(parameter_dtype(given.precision))
    options = {"plain": {}}
    for name in given.drafts:
        flags = DrawFlags(draft=name, precision=given.precision, device=given.device)
        found: Any = {"draft": model} if name == "same" else flags.drafting(opened)  # pyright: ignore[reportArgumentType]
        options |= {f"{name} {k}": {**found, "draft_tokens": k} for k in given.draft_tokens}
    with autocast("fp32" if halved else given.precision, device):
        for batch in given.batch:
            prompts = make_prompts(given, model, opened, batch * (given.repeats + 1))
            for row in in_turns(given, model, options, batch, prompts):
                print_json(row)


def make_prompts(given: Args, model: Any, opened: Any, n: int) -> list[list[int]]:
    if given.text is None:
        return random_prompts(model, n, given.prompt_tokens)
    tokens = opened.tokenizer.encode(given.text.read_text(encoding="utf-8"))
    starts = torch.linspace(0, len(tokens) - given.prompt_tokens, n).long().tolist()
    return [list(tokens[start : start + given.prompt_tokens]) for start in starts]


def in_turns(
    given: Args, model: Any, options: dict[str, dict[str, Any]], batch: int, prompts: list[list[int]]
) -> list[dict[str, Any]]:
    """A row for each draft: tokens/s by the median, the ratio to no draft, acceptance, tokens a step and text, and
    texts that differ from those without a draft."""
    each = -(-(given.prompt_tokens + given.new_tokens) // PAGE_SIZE) * PAGE_SIZE
    engines = {
        name: Engine(model, max_rows=batch, cache_tokens=batch * each, prefix_cache=False, **one)
        for name, one in options.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[list[int]]] = {name: [] for name in engines}
    draw = SamplingOptions(given.temperature)
    for turn in range(given.repeats + 1):
        part = prompts[turn * batch : (turn + 1) * batch]
        for name, engine in engines.items():
            synchronize_all()
            began = time.perf_counter()
            found = engine.run([Request(one, given.new_tokens, draw, seed) for seed, one in enumerate(part)])
            synchronize_all()
            seconds[name].append(time.perf_counter() - began)
            texts[name] += [new for (new,) in found]
    rows = []
    for name, engine in engines.items():
        stats, rate = engine.stats(), batch * given.new_tokens / median(seconds[name][1:])
        ratios = [plain / own for plain, own in zip(seconds["plain"][1:], seconds[name][1:])]
        row = {"draft": name, "batch": batch, "tokens_per_s": round(rate, 1), "ratio": round(median(ratios), 3)}
        if stats.proposed:
            row["accepted"] = round(stats.accepted / stats.proposed, 3)
            row["tokens_a_step"] = round(stats.new_tokens / stats.steps / batch, 2)
        rows.append(row | {"differing": sum(a != b for a, b in zip(texts["plain"], texts[name])), "of": len(prompts)})
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
