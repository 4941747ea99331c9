"""`regpt sample`: continue a prompt."""

import sys
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import is_terminal, print_json, print_line, print_note, write_stream
from regpt.console.streams import read_stdin
from regpt.errors import UsageError, UserError
from regpt.ranges import MANY, Range
from regpt.train.config import InferencePrecision


@dataclass(frozen=True)
class SampleArgs:
    """Continue a prompt several times; every sample is printed after "> "."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or checkpoint folder, the address of one (s3://…), a Hugging Face folder, a GGUF file, or a hub name such
    as gpt2."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """Text to continue; - reads it from standard input, less one line break at its end; '' starts a new document."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1, 1 << 20)] = 5
    """Samples."""
    max_new_tokens: Annotated[int, Range(1, MANY)] = 30
    """Tokens a sample, fewer where the model ends the text; with the prompt at most the model's length, or see
    --past-context."""
    past_context: Literal["refuse", "slide"] = "refuse"
    """What happens beyond the model's length: slide, each token follows from the last ones that the model can read."""
    top_k: Annotated[int, Range(0, MANY)] = 50
    """Draw from the k likeliest tokens; 0 from all, 1 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability, after top-k; 1 from all."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 safer, above 1 more surprising text."""
    seed: int = 1337
    """The same seed gives the same samples on the same machine."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best")] = ""
    """Of a run: the checkpoint of this step, or best, that of the lowest validation loss; default: the newest."""
    ema: bool = False
    """With the moving average of the weights, which train.ema_decay keeps."""
    json: bool = False
    """Print one JSON object with token ids and texts instead."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: InferencePrecision = "fp32"
    """Number format of the computation."""


def main(args: list[str]) -> int:
    """Parse, open the model, write the samples, print them."""
    given = parse(SampleArgs, args, prog="regpt sample")
    prompt = read_prompt(given.prompt)
    from regpt.checkpoint.best import at_step
    from regpt.checkpoint.open import open_model
    from regpt.engine.generate import encode_prompt, stream_sample, write_samples
    from regpt.engine.processing import SamplingOptions
    from regpt.parallel.mesh import choose_device
    from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision

    options = SamplingOptions(given.temperature, given.top_k, given.top_p)  # refused before a model is read
    device = choose_device(given.device)
    opened = open_model(at_step(given.model, given.step), device, ema=given.ema)
    set_matmul_precision(given.precision)
    model = opened.model.to(parameter_dtype(given.precision))
    longest = model.config.max_seq_len
    slide = given.past_context == "slide"
    if slide and len(encode_prompt(opened.tokenizer, prompt)) + given.max_new_tokens > longest:
        print_note(f"the model reads {longest:,} tokens: what comes after them follows from the last {longest:,} alone")
    drawn: dict[str, Any] = {
        "max_new_tokens": given.max_new_tokens,
        "options": options,
        "seed": given.seed,
        "slide": slide,
    }
    with autocast(given.precision, device):
        if given.n == 1 and not given.json and is_terminal(sys.stdout):
            for piece in chain(["> "], stream_sample(model, opened.tokenizer, prompt, **drawn)):
                write_stream(sys.stdout, piece)
            print_line()
            return 0
        samples = write_samples(model, opened.tokenizer, prompt, n=given.n, **drawn)
    if not given.json:
        print_line("\n".join(f"> {sample.text}" for sample in samples))
        return 0
    settings = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "seed", "precision")}
    print_json(
        {
            "model": given.model,
            "source": opened.source,
            "step": opened.step,
            "prompt": prompt,
            "prompt_ids": opened.tokenizer.encode_prompts([prompt])[0].tolist(),
            **settings,
            "samples": [sample._asdict() for sample in samples],
        }
    )
    return 0


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input where it is `-`.

    Raises:
        UserError: standard input is not UTF-8.
        UsageError: neither is the prompt on the command line.
    """
    if prompt == "-":
        try:
            text = read_stdin().decode("utf-8")  # the same on Windows, whatever its code page
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
        return text.removesuffix("\n").removesuffix("\r")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # the shell passed bytes that are no text
        raise UsageError(f"the prompt {prompt!r} is not UTF-8; convert it, or give it by --prompt - ") from None
    return prompt
