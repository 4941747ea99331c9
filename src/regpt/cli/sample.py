"""`regpt sample`: continue a prompt."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.chat import DrawFlags, Drawing, acceptance
from regpt.cli.parse import check_json, parse
from regpt.console.lines import is_terminal, print_json, print_line, print_note, write_stream
from regpt.console.streams import read_stdin
from regpt.errors import UsageError, UserError
from regpt.ranges import MANY, Range
from regpt.structured import parse_row

if TYPE_CHECKING:
    from regpt.checkpoint.open import OpenModel
    from regpt.engine.engine import Engine
    from regpt.engine.generate import Sample
    from regpt.engine.receipt import Origin
    from regpt.engine.request import Request

MOST_PANELS = 12  # side by side


@dataclass(frozen=True)
class SampleArgs:
    """Continue a prompt several times, or each prompt of a file; every sample is printed after "> "."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or checkpoint folder, the address of one (s3://…), a Hugging Face folder, a GGUF file, or a hub name such
    as gpt2."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Text to continue; - reads it from standard input, less one line break at its end; '' starts a new document."""
    prompts: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Instead: a file with a prompt on each line, or .jsonl with objects that have a prompt; --json writes one line for
    each, in their order, as they are done."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1, 1 << 20)] = 5
    """Samples."""
    max_new_tokens: Annotated[int, Range(1, MANY)] = 30
    """Tokens a sample, fewer where the model ends the text; with the prompt at most the model's length, or see
    --past-context."""
    past_context: Literal["refuse", "slide"] = "refuse"
    """What happens beyond the model's length: slide, each token follows from the last ones that the model can read."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are no part of it."""
    json_schema: Annotated[str, tyro.conf.arg(metavar="FILE|JSON")] = ""
    """Write JSON that this schema describes (extra structured)."""
    regex: Annotated[str, tyro.conf.arg(metavar="PATTERN")] = ""
    """Write text that this regular expression matches as a whole (extra structured)."""
    json: bool = False
    """Print one JSON object with token ids and texts instead."""
    receipt: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write a receipt of the texts to this file, with which regpt verify-receipt writes them again."""
    best_of: Annotated[int | None, tyro.conf.arg(metavar="K"), Range(2, 1000)] = None
    """Rejection sampling, with a model that was trained to answer: so many replies to each prompt (10 to 30 are usual),
    of which the best is kept."""
    reward: Annotated[str, tyro.conf.arg(metavar="RUN|chat:TASK")] = ""
    """With --best-of: a run of regpt finetune reward-124m that judges the replies, or a task whose checker does and
    whose questions are the prompts, such as chat:addition:items=500."""
    write: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """With --best-of: the best replies as conversations, for regpt finetune --data; a file that is there is gone on
    with."""
    draw: Drawing = field(default_factory=DrawFlags)


def main(args: list[str]) -> int:
    """Parse, open the model, write the samples, print them."""
    given = parse(SampleArgs, args, prog="regpt sample")
    if given.best_of is not None or given.reward or given.write:
        return write_best(given)
    if (given.prompt is None) == (not given.prompts):
        both = " (both were given)" if given.prompts else ""
        raise UsageError(f"give a prompt to continue, --prompt TEXT, or a file of them, --prompts FILE{both}")
    check_json(given.receipt or None, "--receipt")
    if given.receipt and given.past_context == "slide":
        raise UsageError("--receipt is of texts within the model's length; leave out --past-context slide")
    prompts = [read_prompt(given.prompt)] if given.prompt is not None else read_prompts(Path(given.prompts))
    from regpt.engine.generate import encode_prompt, engine_for
    from regpt.engine.request import Request

    draw, options = given.draw, given.draw.options()
    with draw.opened(given.model) as opened:
        model, tokenizer, longest = opened.model, opened.tokenizer, opened.model.config.max_seq_len
        slide = given.past_context == "slide"
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        if slide and max(map(len, ids)) + given.max_new_tokens > longest:
            print_note(
                f"the model reads {longest:,} tokens: what comes after them follows from the last {longest:,} alone"
            )
        how = {"options": options, "seed": draw.seed, "slide": slide, "stop": given.stop, "n": given.n}
        described = schema_of(given)
        how["structure"] = structure_of(described, tokenizer, model.config.vocab_size)
        how["stop_ids"] = tokenizer.stop_ids
        requests = [Request(one, given.max_new_tokens, **how) for one in ids]
        names = [one.name for one in fields(options) if one.name != "logit_bias"]
        settings = {name: getattr(draw, name) for name in (*names, "seed", "precision", "kv_cache")} | {
            "stop": given.stop
        }
        about = {"model": given.model, "source": opened.source, "step": opened.step}
        watched = is_terminal(sys.stdout) and not given.json and not given.prompts
        origin, written = origin_of(given, opened) if given.receipt else None, list[list["Sample"]]()
        engine = engine_for(model, requests, tokenizer, **draw.drafting(opened))
        for number, samples in write_all(engine, tokenizer, requests, watched=watched):
            written.append(samples)
            if given.json:
                if draw.draft:
                    stats = engine.stats()
                    about["draft"] = {"model": draw.draft, "proposed": stats.proposed, "accepted": stats.accepted}
                prompt_ids = tokenizer.encode_prompts([prompts[number]])[0].tolist()
                prompt = {"prompt": prompts[number], "prompt_ids": prompt_ids}
                print_json(about | prompt | settings | {"samples": [sample._asdict() for sample in samples]})
            elif not (watched and given.n == 1):
                print_line("\n".join(f"> {sample.text}" for sample in samples))
        if origin:
            write_receipt(Path(given.receipt), origin, requests, written, described)
        if draw.draft and not given.json:
            print_note(acceptance(engine.stats()))
    return 0


def write_best(given: SampleArgs) -> int:
    """Rejection sampling."""
    for name, value in (("--best-of K", given.best_of), ("--reward", given.reward), ("--write FILE", given.write)):
        if not value:
            raise UsageError(f"{name} is missing; --best-of, --reward and --write go together")
    others = {"--prompt": given.prompt is not None, "--json": given.json, "--receipt": given.receipt}
    others |= {"--stop": given.stop, "--json-schema": given.json_schema, "--regex": given.regex}
    others |= {"--draft": given.draw.draft, "--kv-cache": given.draw.kv_cache}
    for name in (name for name, value in others.items() if value):
        raise UsageError(f"{name} does not go with --best-of; leave it out")
    from regpt.runs.rejection import BestOf, keep_best

    prompts = tuple(read_prompts(Path(given.prompts))) if given.prompts else ()
    best_of, options = given.best_of or 0, given.draw.options()
    asked = BestOf(best_of, given.reward, Path(given.write), prompts, given.max_new_tokens, options, given.draw.seed)
    with given.draw.opened(given.model) as opened:
        print_line(keep_best(opened, asked))
    return 0


def origin_of(given: SampleArgs, opened: "OpenModel") -> "Origin":
    """Hashes of the model, for a receipt; a checkpoint under its own name, not its run's."""
    from regpt.engine.receipt import Origin

    hashes = opened.weights_sha256, opened.tokenizer.sha256, None
    name = given.model if opened.step is None else str(opened.files[0].path.parent)
    return Origin(name, *hashes, given.draw.precision, opened.model.device.type, given.draw.kv_cache)


def write_receipt(
    path: Path, origin: "Origin", requests: "list[Request]", written: "list[list[Sample]]", schema: dict[str, str]
) -> None:
    from regpt.engine.receipt import Receipt
    from regpt.files import write_json

    new = [sample.ids[len(one.prompt) :] for one, samples in zip(requests, written) for sample in samples]
    write_json(path, Receipt.of(origin, requests, new, schema).to_json(), "choose another file for --receipt")


def structure_of(schema: dict[str, str], tokenizer: Any, n_vocab: int) -> Any:
    """What makes the structures of the texts; None where they are free."""
    if not schema:
        return None
    from regpt.engine.structured import Structures

    structures = Structures(tokenizer, n_vocab)
    return structures.of_regex(schema["regex"]) if "regex" in schema else structures.of_schema(schema["json_schema"])


def schema_of(given: SampleArgs) -> dict[str, str]:
    """The `regex` or the `json_schema` of the texts; nothing where they are free."""
    if given.json_schema and given.regex:
        raise UsageError("give --json-schema or --regex, not both")
    if given.regex or not given.json_schema:
        return {"regex": given.regex} if given.regex else {}
    schema = given.json_schema
    if not schema.lstrip().startswith("{"):
        if not Path(schema).is_file():
            raise UsageError(f"--json-schema {schema!r} is neither a file nor an object; give one of them")
        schema = Path(schema).read_text(encoding="utf-8", errors="replace")
    return {"json_schema": schema}


def write_all(
    engine: "Engine", tokenizer: Any, requests: "list[Request]", *, watched: bool
) -> "Iterator[tuple[int, list[Sample]]]":
    """The texts of each request, in order, as soon as those before it are done. `watched`: of a single request, on a
    terminal, as they are drawn."""
    from regpt.engine.request import bad_logits

    first = engine.submit(requests[0])
    for one in requests[1:]:
        engine.submit(one)
    texts = [[DrawnText(one, tokenizer) for _ in range(one.n)] for one in requests]
    at, written = 0, 0
    with show_texts(texts[0]) if watched else show_progress(requests) as show:
        while engine.busy:
            for event in engine.step():
                if event.finish_reason == "error":
                    raise bad_logits()
                texts[event.request - first][event.choice].take(event)
                written += event.token is not None
            show(written, sum(text.done for each in texts for text in each))
            while at < len(texts) and all(text.done for text in texts[at]):
                yield at, [text.sample() for text in texts[at]]
                at += 1


class DrawnText:
    """A text that is being written: its tokens, and the pieces of its text, the prompt's first."""

    def __init__(self, request: "Request", tokenizer: Any):
        self.request, self.tokenizer = request, tokenizer
        self.ids, self.done = list(request.prompt), False
        self.text = tokenizer.decode(self.ids[1:] if self.ids[:1] == [tokenizer.eot] else self.ids)

    def take(self, event: Any) -> None:
        if event.token is not None:
            self.ids.append(event.token)
        self.text += event.text
        self.done = event.finish_reason is not None

    def sample(self) -> "Sample":
        from regpt.engine.generate import Sample, make_sample

        # Decoded as a whole, a character that begins in the prompt is one; a stop string is known to the pieces alone.
        whole = make_sample(self.ids, len(self.request.prompt), self.tokenizer)
        return Sample(self.ids, self.text) if self.request.stop else whole


@contextmanager
def show_progress(requests: "list[Request]") -> "Iterator[Callable[[int, int], None]]":
    """A bar with rate and time left, of a file of prompts."""
    from regpt.console.drawing import progress_bar

    if len(requests) == 1:
        yield lambda tokens, done: None
        return
    began = time.perf_counter()
    with progress_bar(transient=True) as bar:
        total = sum(one.n for one in requests)
        task = bar.add_task("reading prompts", total=total)

        def show(tokens: int, done: int) -> None:
            rate = tokens / (time.perf_counter() - began)
            bar.update(task, completed=done, description=f"{done:,} of {total:,} texts  {rate:,.0f} tokens/s")

        yield show


@contextmanager
def show_texts(texts: list[DrawnText]) -> "Iterator[Callable[[int, int], None]]":
    """One text piece by piece; several side by side while they are drawn, gone afterwards."""
    if len(texts) == 1:
        write_stream(sys.stdout, "> ")
        shown = 0

        def stream(tokens: int, done: int) -> None:
            nonlocal shown
            write_stream(sys.stdout, texts[0].text[shown:])
            shown = len(texts[0].text)

        yield stream
        print_line()
        return
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from regpt.console.drawing import PlainConsole

    console = PlainConsole()
    width = max(30, console.width // min(len(texts), 4) - 1)

    def panels() -> Columns:
        return Columns([Panel(Text(text.text), width=width) for text in texts[:MOST_PANELS]])

    with Live(panels(), console=console, transient=True, refresh_per_second=12) as live:
        yield lambda tokens, done: live.update(panels())


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or the field `prompt` of JSON lines.

    Raises:
        UsageError: it is not there.
        UserError: it is not UTF-8, has no prompts, or a line is not an object with one.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}; give one with a prompt on each line, or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    if path.suffix != ".jsonl":
        prompts = lines
    else:
        rows = [parse_row(line.encode()) for line in lines if line.strip()]
        prompts = [row.get("prompt") if row else None for row in rows]
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise UserError(f'line {number} of {path} is no object with a text "prompt"; every line must be one')
    if not prompts:
        raise UserError(f"{path} has no prompts; write one on each line")
    return [str(prompt) for prompt in prompts]


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
