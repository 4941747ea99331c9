"""`regpt tokenizer`: train a byte-level BPE, look into any tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.data_prepare import TextFlags, as_meant, download_folder, print_left_out
from regpt.cli.parse import parse, run_subcommand
from regpt.console.lines import print_line, print_note
from regpt.errors import UsageError, UserError, word
from regpt.files import write_text
from regpt.prepare.settings import TEXT_OPTIONS

if TYPE_CHECKING:
    from regpt.prepare.named import Source
    from regpt.prepare.settings import TextOptions
    from regpt.text.tokenizer import Tokenizer

MEASURED_CHARS = 10_000_000  # of the training text, encoded to print the bytes a token


@dataclass(frozen=True)
class TrainArgs:
    """Learn a byte-level BPE from text. A SOURCE is a file, folder or glob of .txt, .md, .jsonl, .json, .csv, .tsv or
    .parquet, a named set (pydocs, tinyshakespeare), or - for stdin."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What to read."""
    vocab_size: int
    """Tokens, the 256 bytes and <|endoftext|> included."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder to write tokenizer.json into."""
    text: TextFlags = TEXT_OPTIONS


def main(args: list[str]) -> int:
    """Call the subcommand."""
    from regpt.cli import tokenizer_inspect

    commands = {
        "train": (train_main, "learn a byte-level BPE from text"),
        "inspect": (tokenizer_inspect.main, "vocabulary, special tokens, how a text splits, bytes per token"),
    }
    return run_subcommand("regpt tokenizer", args, commands)


def train_main(args: list[str]) -> int:
    given = parse(TrainArgs, args, prog="regpt tokenizer train")
    file = Path(given.out) / "tokenizer.json"
    from regpt.prepare.named import list_sources
    from regpt.prepare.readers import check_text
    from regpt.prepare.work import try_place, writing_to
    from regpt.remote.download import RemoteOptions
    from regpt.text.bpe import MAX_WORD, LongWords, train_bpe

    if not given.sources:
        raise UsageError("no SOURCE given; give files, folders, globs or a named set")
    if file.exists():
        raise UserError(f"{file} exists already; choose another --out or delete it")
    try_place(file.parent)
    text = as_meant(given.text)
    check_text(text)
    listing = list_sources(given.sources, options=RemoteOptions(download_folder()), text=text)
    sources = listing.train
    print_left_out(listing.left_out)
    long_words = LongWords()
    tokenizer = train_bpe(shown(sources, text), given.vocab_size, long_words)
    if long_words.count:
        print_line(
            f"words of more than {MAX_WORD:,} characters, cut into pieces to learn from: {long_words.count:,}, the "
            f"longest of {long_words.longest:,} characters"
        )
    with writing_to(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, tokenizer.to_json())
    measured = bytes_per_token(tokenizer, sources, text)
    listing.discard()
    print_line(f"wrote {file}: {tokenizer.n_vocab:,} tokens, {measured:.3f} bytes a token on its training text")
    print_line(f"use it with: regpt data prepare SOURCE --tokenizer {word(given.out)} --out DIR")
    return 0


def shown(sources: list[Source], text: TextOptions) -> Iterator[str]:
    """The texts of `sources`, with a progress bar while they are read and a line while merges are learned."""
    from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

    from regpt.console.drawing import field, progress_bar

    columns = (field("description"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with progress_bar(*columns) as progress:
        task: Any = progress.add_task("counting words", total=sum(source.bytes for source in sources))
        for document in itertools.chain.from_iterable(source.documents(text) for source in sources):
            yield document.text
            progress.advance(task, document.source_bytes)
    print_note("learning merges")


def bytes_per_token(tokenizer: Tokenizer, sources: list[Source], text: TextOptions) -> float:
    """UTF-8 bytes of text for each token, over the first documents of about `MEASURED_CHARS` characters."""
    text_bytes, tokens = 0, 0
    for document in itertools.chain.from_iterable(source.documents(text) for source in sources):
        text_bytes += len(document.text.encode())
        tokens += len(tokenizer.encode(document.text))
        if text_bytes > MEASURED_CHARS:
            break
    return text_bytes / max(1, tokens)
