"""How fast a model writes: tokens/s for one text and for many at once.

    python benchmarks/sampling.py runs/124m --precision bf16
    python benchmarks/sampling.py gpt2-124m --batch 1 8 64        # the recipe's model with random weights

    python benchmarks/sampling.py gpt2-124m --precision bf16 --batch 1 64 256 --hugging-face
    python benchmarks/sampling.py gpt2-tiny --identity 10000
    python benchmarks/sampling.py gpt2-124m --identity 1000 --precision bf16      # how often a batch changes a text

Each text is a prompt of random tokens, continued by the engine that `regpt sample` uses; under bf16 and fp16 on CUDA
with weights of that format. The median of `--repeats` counts, after two that are not timed. Prints a table; `--json`
keeps it. `--hugging-face` times `generate` of transformers on the same model in the same run. `--identity N` writes N
texts in batches, pages and chunks of several sizes, and counts those that differ from the text written alone.

    python benchmarks/sampling.py gpt2-124m --device cpu --peers --prompt-tokens 16 --new-tokens 240

`--peers` times one greedy text of GPT-2 on a CPU by the engine in float32 and int8, transformers, llama.cpp in F32 and
Q8_0, and the lecture's loop, in turns, so that other load on the machine meets each: tokens/s of each one's best round,
and medians over the rounds of the engine's tokens/s divided by theirs.
"""

import contextlib
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tables import columns, figure_of

from regpt.checkpoint.open import open_model
from regpt.config import read_config, recipe_names
from regpt.console.lines import print_json, status
from regpt.console.text import counted
from regpt.data.manifest import read_manifest
from regpt.data.rows import open_rows
from regpt.engine.cache import PrefillView, ragged, upload
from regpt.engine.engine import PAGE_SIZE, Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.products import quantize
from regpt.engine.reference import generate_uncached
from regpt.engine.request import Request
from regpt.errors import UserError
from regpt.hf.gguf_models import export_gguf
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, initialize
from regpt.parallel.mesh import choose_device
from regpt.text.open import open_tokenizer
from regpt.tools.bench.steps import library_versions, percentiles
from regpt.tools.llama_cpp import LlamaServer
from regpt.train.config import WritingPrecision
from regpt.train.peak import driver_name
from regpt.train.precision import set_matmul_precision, writing

OPTIONS = SamplingOptions(top_k=50)
LOSS_ROWS = 100


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
    precision: WritingPrecision = "fp32"
    """Number format of the computation."""
    kv_cache: Literal["", "fp8"] = ""
    """Format of keys and values, default: that of the computation."""
    hugging_face: bool = False
    """Time transformers' generate, too: GPT-2 only, with a static cache and compiled on CUDA, else with its cache."""
    profile: bool = False
    """Also print the kernels of the step of the last batch by time; CUDA only."""
    peers: bool = False
    """Instead: one text on a CPU by everybody, in turns."""
    identity: int = 0
    """Instead: write so many texts in four ways, and count the differences."""
    loss: Path | None = None
    """Instead: the loss on validation tokens of this folder of shards, read through the cache, with keys and values in
    the format of the computation and in fp8."""
    json: Path | None = None
    """Also write the report to this file."""


def main(given: Args) -> None:
    device = choose_device(given.device)
    set_matmul_precision(given.precision)
    with status() as say:
        say("opening the model")
        model = open_or_make(given.model, device)
        context = writing(model, given.precision, device)
    how = {"narrow_cache": given.kv_cache == "fp8"}
    with status() as say, context:
        if given.loss:
            found = {f"kv {name or 'as computed'}": cached_loss(model, given.loss, name) for name in ("", "fp8")}
            print_json({"precision": given.precision, "tokens": LOSS_ROWS * model.config.max_seq_len, **found})
            return
        if given.identity:
            print_json(count_differences(model, given.identity, say, **how))
            return
        sizes = given.prompt_tokens, given.new_tokens, given.repeats
        if given.peers:
            print_json(in_turns(model, *sizes, say))
            return
        report = bench_sample(model, given.batch, *sizes, say, **how)
        if given.profile:
            print_json(profile_step(model, given.batch[-1], given.prompt_tokens, **how))
    report = {"kind": "sampling", "source": given.model, "precision": given.precision, **report}
    Console(width=160).print(sample_table(report))
    if given.hugging_face:
        peer = theirs(model, given.batch, given.prompt_tokens, given.new_tokens, given.repeats, device)
        report["hugging_face"] = peer
        for row, other in zip(report["batches"], peer):
            print_json({**other, "ours": row["tokens_per_s"], "ratio": row["tokens_per_s"] / other["tokens_per_s"]})
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
    **options: Any,
) -> dict[str, Any]:
    """The report: every text is a prompt of random tokens and `new_tokens` more.

    For each number of texts in `batches`, `seconds` from the prompts to the last token and `first_token_s` to the first
    are medians of `repeats`. No text ends early. `options` are the engine's.

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
        whole = time_generation(model, batch, prompt_tokens, new_tokens, repeats, **options)
        first = time_generation(model, batch, prompt_tokens, 1, repeats, **options)
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
    model: Transformer, batch: int, prompt_tokens: int, new_tokens: int, repeats: int, **options: Any
) -> dict[str, float]:
    """`percentiles` of the seconds of `repeats` generations after two that are not timed: compiled, captured."""
    engine = make_engine(model, batch, prompt_tokens + new_tokens, **options)
    return timed(lambda: write_texts(engine, random_prompts(model, batch, prompt_tokens), new_tokens), repeats)


def profile_step(model: Transformer, batch: int, prompt_tokens: int, **options: Any) -> dict[str, Any]:
    """A captured step in the middle of a text: microseconds by itself, one after another, and of its kernels."""
    engine = make_engine(model, batch, prompt_tokens + 200, **options)
    for seed, prompt in enumerate(random_prompts(model, batch, prompt_tokens + 64)):
        engine.submit(Request(prompt, 128, OPTIONS, seed))
    while len(engine.active) < batch or engine.prefilling:
        engine.step()
    engine.step()
    _, (graph, _) = max(engine.decode_step.captured.items(), key=lambda one: one[0][0])
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    for _ in range(20):
        graph.replay()
    after.record()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        graph.replay()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda one: -one.device_time_total)
    kernels = {f"{one.count} x {one.key[:48]}": round(one.device_time_total, 1) for one in found[:16]}
    return {"step": before.elapsed_time(after) / 20 * 1e3, "sum": sum(kernels.values()), "kernels": kernels}


def timed(write: Callable[[], object], repeats: int) -> dict[str, float]:
    seconds = list[float]()
    for _ in range(repeats + 2):
        synchronize_all()
        started = time.perf_counter()
        write()
        synchronize_all()
        seconds.append(time.perf_counter() - started)
    return percentiles(seconds[2:])


def synchronize_all() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_prompts(model: Transformer, batch: int, prompt_tokens: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=source).tolist()


def make_engine(model: Transformer, batch: int, tokens: int, **options: Any) -> Engine:
    """An engine for so many texts at once; the prompts of two repeats are alike, so none is kept."""
    cache_tokens = batch * -(-tokens // PAGE_SIZE) * PAGE_SIZE
    return Engine(model, max_rows=batch, cache_tokens=cache_tokens, prefix_cache=False, **options)


def write_texts(engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> list[list[list[int]]]:
    return engine.run([Request(prompt, new_tokens, OPTIONS, seed) for seed, prompt in enumerate(prompts)])


def theirs(
    model: Transformer, batches: Sequence[int], prompt_tokens: int, new_tokens: int, repeats: int, device: torch.device
) -> list[dict[str, float]]:
    """Tokens/s of transformers' GPT-2 with the weights' shapes and format."""
    peer = their_model(model)
    cache = {"cache_implementation": "static"} if device.type == "cuda" else {}
    found = []
    for batch in batches:
        idx = torch.tensor(random_prompts(model, batch, prompt_tokens), device=device)
        given = {"attention_mask": torch.ones_like(idx), "do_sample": True, "top_k": OPTIONS.top_k, **cache}

        def write(idx: torch.Tensor = idx, given: dict[str, Any] = given) -> object:
            return peer.generate(idx, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, **given)

        for _ in range(2):  # compiled, then captured
            write()
        found.append({"batch": batch, "tokens_per_s": batch * new_tokens / timed(write, repeats)["median"]})
    return found


def their_model(model: Transformer) -> Any:
    """transformers' GPT-2 of this shape, format and device, with weights of its own."""
    own = Path(__file__).parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != own]  # transformers imports a package `kernels`
    import transformers

    shape = model.config.resolved()
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.max_seq_len, n_embd=shape.n_embd, n_layer=shape.n_layer,
        n_head=shape.n_head, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made: Any = transformers.GPT2LMHeadModel(config)
    return made.to(model.device, model.dtype).eval()


def in_turns(
    model: Transformer, prompt_tokens: int, new_tokens: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Tokens/s of everybody, `rounds` turns each after one without the clock; the lecture's loop has one turn."""
    greedy, (prompt,) = SamplingOptions(temperature=0), random_prompts(model, 1, prompt_tokens)
    idx, peer, tokens = torch.tensor([prompt]), their_model(model), prompt_tokens + new_tokens
    engines = {"engine": make_engine(model, 1, tokens)}
    with contextlib.suppress(UserError):  # no compiler
        engines["engine int8"] = make_engine(quantize(copy.deepcopy(model)), 1, tokens)
    ways: dict[str, Callable[[], object]] = {
        name: partial(engine.run, [Request(prompt, new_tokens, greedy)]) for name, engine in engines.items()
    }
    given = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    ways["transformers"] = partial(peer.generate, idx, attention_mask=torch.ones_like(idx), **given)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("f32", "q8_0"):
            export_gguf(model, open_tokenizer("gpt2"), path := Path(folder) / f"{kind}.gguf", kind)
            server = LlamaServer(path, tokens)
            ways[f"llama.cpp {kind}"] = partial(
                server.complete, prompt, new_tokens, cache_prompt=False, ignore_eos=True
            )
        seconds = {name: list[float]() for name in ways}
        for turn in range(rounds + 1):
            for name, write in ways.items():
                say(f"{name}, round {turn} of {rounds}")
                seconds[name].append(seconds_of(write))
    seconds = {name: each[1:] for name, each in seconds.items()}
    say("the lecture's loop")
    loop = seconds_of(partial(generate_uncached, model, idx, new_tokens, greedy, 0))
    return {
        "tokens_per_s": {name: new_tokens / min(each) for name, each in seconds.items()} | {"loop": new_tokens / loop},
        "ratios": {
            f"{own} / {name}": statistics.median(b / a for a, b in zip(seconds[own], each))
            for own in engines
            for name, each in (seconds | {"loop": [loop] * rounds}).items()
            if name not in engines
        },
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def seconds_of(write: Callable[[], object]) -> float:
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


WAYS = (
    {"max_rows": 1, "page_size": 16},
    {"max_rows": 3, "page_size": 16, "chunk_tokens": 7},
    {"max_rows": 16, "page_size": 5, "prefix_cache": True},
    {"max_rows": 64, "page_size": 32, "chunk_tokens": 100, "prefix_cache": True},
)


@torch.no_grad()
def cached_loss(model: Transformer, folder: Path, kv_cache: str) -> float:
    """Mean cross-entropy, in nats, of `LOSS_ROWS` validation rows, each read in two chunks of which the second sees the
    first in the cache."""
    T = model.config.max_seq_len
    rows = open_rows(folder, read_manifest(folder), "val", "sequential", 0, T)
    engine = Engine(model, max_rows=1, cache_tokens=T, narrow_cache=kv_cache == "fp8", graphs=False)
    pages, _ = engine.pages.reserve([], T) or ([], 0)
    total = 0.0
    for row in rows.read(0, LOSS_ROWS).tolist():
        for start in (0, T // 2):
            tokens, targets = row[start : start + T // 2], row[start + 1 : start + T // 2 + 1]
            idx, spans = ragged([(tokens, start, pages, None)], model.device)
            hidden = engine.decode_step.read(idx, PrefillView(engine.pages, spans, engine.prefill_kernel))
            logits = engine.decode_step.logits(hidden).float()
            total += torch.nn.functional.cross_entropy(logits, upload(targets, model.device), reduction="sum").item()
    return total / (LOSS_ROWS * T)


def count_differences(model: Transformer, n: int, say: Callable[[str], None], **options: Any) -> dict[str, Any]:
    """Texts of `n` prompts of 1 to 32 tokens, up to 16 new ones, drawn in several manners, written in four `WAYS`."""
    source = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 33, (n,), generator=source).tolist()
    rows = torch.randint(model.config.vocab_size, (n, 32), generator=source)
    rows[::4, :20] = rows[0, :20]  # a quarter begins alike
    manners = (
        SamplingOptions(),
        SamplingOptions(0),
        SamplingOptions(0.8, 200, 0.9),
        SamplingOptions(1.2, 0, min_p=0.01),
    )
    requests = [
        Request(row[:size], 1 + i % 16, manners[i % 4], i) for i, (row, size) in enumerate(zip(rows.tolist(), sizes))
    ]
    texts, again = [], []
    for way in WAYS:
        say(f"{way}")
        engine = Engine(model, cache_tokens=64 * way["max_rows"], **{"prefix_cache": False, **way}, **options)
        texts.append(engine.run(requests))
        again.append(engine.stats().recomputed)
    alone = [text for (text,) in texts[0]]
    parted = [[first_difference(a, b) for a, (b,) in zip(alone, other)] for other in texts[1:]]
    differing = [sum(at < len(text) for at, text in zip(each, alone)) for each in parted]
    compared = [sum(min(at + 1, len(text)) for at, text in zip(each, alone)) for each in parted]
    report = {"texts": n, "tokens": sum(map(len, alone)), "differing": differing, "drawn_again": again}
    return report | {"differing_per_token": [count / of for count, of in zip(differing, compared)]}


def first_difference(text: Sequence[int], other: Sequence[int]) -> int:
    """Where two texts part; after it they have different beginnings and cannot be compared."""
    return next((at for at, (a, b) in enumerate(zip(text, other)) if a != b), len(text))


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
