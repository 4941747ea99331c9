"""`regpt data import`: token files that the user already has, as a folder of token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from regpt.cli.data_prepare import print_left_out, print_split
from regpt.cli.parse import parse
from regpt.console.lines import print_line
from regpt.errors import word
from regpt.files import exists
from regpt.ranges import MANY, Range

if TYPE_CHECKING:
    from regpt.data.manifest import Manifest


@dataclass(frozen=True)
class ImportArgs:
    """Make token shards from token files of build-nanogpt (.npy), nanoGPT (.bin), llm.c or modded-nanogpt (.bin with a
    header). The tokens stay what they are, in the order given."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Files, folders or globs, in this order; without --val, names with "val" in them are held out."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder to write; it must not exist, unless the same command made it."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="TOKENIZER")] = None
    """The tokenizer that made the tokens: gpt2 (the default), or the folder or file of another."""
    val: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """Hold out these files."""
    format: Annotated[str | None, tyro.conf.arg(metavar="{build-nanogpt,nanogpt,llm.c}")] = None
    """Read every file in this format; default: what each file looks like."""
    shard_tokens: Annotated[int, Range(1, MANY)] = 100_000_000
    """Tokens in each shard but the last."""


def main(args: list[str]) -> int:
    given = parse(ImportArgs, args, prog="regpt data import")
    from regpt.console.drawing import progress_bar
    from regpt.prepare.importer import ImportProgress, import_tokens
    from regpt.text.open import open_tokenizer

    bar = progress_bar(transient=True)
    task = bar.add_task("")

    def show(now: ImportProgress) -> None:
        bar.start()  # with the first news: an error before stands alone
        bar.update(task, completed=now.tokens, total=now.total_tokens, description=f"{now.tokens:,} tokens  {now.file}")

    done = exists(Path(given.out) / "manifest.json")
    try:
        manifest = import_tokens(
            given.paths,
            Path(given.out),
            open_tokenizer(given.tokenizer or "gpt2"),
            val=given.val,
            file_format=given.format,
            guessed_tokenizer=given.tokenizer is None,
            shard_tokens=given.shard_tokens,
            progress=show,
        )
    finally:
        bar.stop()
    if done:
        print_line(f"nothing to do: {given.out} holds the shards of these files already")
    else:
        print_imported(given.out, manifest)
    return 0


def print_imported(out: str, manifest: Manifest) -> None:
    for source in manifest.sources:
        name, tokens, split = source["file"], source["tokens"], source["split"]
        print_line(f"{name}: {tokens:,} tokens in the format of {source['format']}, for {split}")
    print_left_out(manifest.left_out)
    for split, inserted in manifest.options["inserted_eot"].items():
        if inserted:
            print_line(f"{split}: inserted one end-of-text token in front, because a document must start with it")
    for split in ("train", "val"):
        tokens, documents = manifest.tokens(split), manifest.documents(split)
        if tokens:
            print_split(split, documents, tokens, len(manifest.split(split)))
        elif split == "val":
            print_line('val: nothing is held out; no file has "val" in its name and --val names none')
    print_line(f"wrote {out} with the tokenizer {manifest.tokenizer}; look inside with: regpt data info {word(out)}")
