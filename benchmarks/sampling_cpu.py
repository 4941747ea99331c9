"""How fast a model writes one text on a CPU: the engine, the lecture's loop, transformers and llama.cpp, in turns.

    python benchmarks/sampling_cpu.py gpt2-124m            # the recipe's model with random weights, float32

Greedy, from 16 tokens to `--tokens`. All take turns, round after round, so that other load on the machine meets each;
the best round of each counts. Prints one JSON object.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from regpt.config import read_config
from regpt.console.lines import print_json
from regpt.engine.engine import Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.reference import generate_uncached
from regpt.engine.request import Request
from regpt.hf.gguf_models import export_gguf
from regpt.model.families import make_model
from regpt.model.weights import initialize
from regpt.text.open import open_tokenizer
from regpt.tools.llama_cpp import LlamaServer

GREEDY = SamplingOptions(temperature=0)
PROMPT = list(range(100, 116))


@dataclass(frozen=True)
class Args:
    recipe: tyro.conf.Positional[str] = "gpt2-124m"
    """A recipe of GPT-2, for its model with random weights."""
    tokens: int = 256
    """Length of the text, prompt included."""
    rounds: int = 3
    """Turns; the lecture's loop has one."""
    threads: int = 2
    """Of everybody."""


def main(given: Args) -> None:
    own = Path(__file__).parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != own]  # transformers imports a package `kernels`
    import transformers

    torch.set_num_threads(given.threads)
    config = read_config(given.recipe).with_vocab_size()
    model = initialize(make_model(config.model), config.train.seed).eval()
    new = given.tokens - len(PROMPT)
    shape = config.model.resolved()
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.max_seq_len,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    idx = torch.tensor([PROMPT])
    engine = Engine(model, max_rows=1, prefix_cache=False)
    ways: dict[str, Callable[[], object]] = {
        "engine": lambda: engine.run([Request(PROMPT, new, GREEDY)]),
        "transformers": lambda: peer.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, min_new_tokens=new, do_sample=False
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_tokenizer("gpt2")
        for kind in ("f32", "q8_0"):
            path = Path(folder) / kind
            export_gguf(model, tokenizer, path, kind)
            server = LlamaServer(next(path.glob("*.gguf")) if path.is_dir() else path, given.tokens)
            ways[f"llama.cpp {kind}"] = lambda server=server: server.complete(
                PROMPT, new, cache_prompt=False, ignore_eos=True
            )
        best = dict.fromkeys(ways, 1e9)
        for _ in range(given.rounds):
            for name, write in ways.items():
                best[name] = min(best[name], seconds(write))
        best["lecture's loop"] = seconds(lambda: generate_uncached(model, idx, new, GREEDY, 0))
    rates = {name: new / each for name, each in best.items()}
    ratios = {f"engine / {name}": rates["engine"] / rate for name, rate in rates.items() if name != "engine"}
    print_json({"tokens_per_s": rates, **ratios, "recomputed": engine.stats().recomputed})


def seconds(write: Callable[[], object]) -> float:
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
