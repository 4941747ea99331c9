"""`manifest.json` of a folder of token shards: what is in it, from where, and how to tell that it is intact."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from regpt.errors import UserError, word
from regpt.files import address_of, exists, is_file, is_folder, is_plain_name, refuse_lfs_pointer
from regpt.structured import parse_as, read_small
from regpt.text.tokenizer import MAX_VOCAB

FORMAT_VERSION = 1
SPLITS = ("train", "val")
WORK = ".work"  # in a folder that is not finished
MAX_MANIFEST_BYTES = 256 << 20  # about a million files of text
Count = Annotated[int, Field(ge=0, le=1 << 53)]


@dataclass(frozen=True)
class Shard:
    """One `.bin` file of tokens with its `.idx` file of document starts.

    Attributes:
        file: name of the token file in the folder, such as `train-00000.bin`; the index is `train-00000.idx`.
        split: `train` or `val`.
        tokens: number of tokens in `file`.
        documents: number of document starts in the index.
        sha256: hash of the token file.
        idx_sha256: hash of the index file.
        continues: the last document goes on in the next shard of the split.
        parts_sha256: of conversations: hash of the file with one byte a token, 0 for what is only read, else trained
            on; it is `train-00000.parts`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    file: str
    split: Literal["train", "val"]
    tokens: Count
    documents: Count
    sha256: str
    idx_sha256: str
    continues: bool = False
    parts_sha256: str = ""

    @property
    def idx_file(self) -> str:
        return self.file.removesuffix(".bin") + ".idx"

    @property
    def parts_file(self) -> str:
        return self.file.removesuffix(".bin") + ".parts"

    def files(self, width: int) -> list[tuple[str, int, str]]:
        """Name, bytes and SHA-256 of each of its files; a token has `width` bytes."""
        found = [(self.file, self.tokens * width, self.sha256), (self.idx_file, self.documents * 8, self.idx_sha256)]
        return found + ([(self.parts_file, self.tokens, self.parts_sha256)] if self.parts_sha256 else [])


@dataclass(frozen=True)
class Manifest:
    """The whole folder.

    Attributes:
        tokenizer: name of the tokenizer.
        tokenizer_sha256: its hash.
        vocab_size: its real vocabulary size.
        eot: id of the token that starts every document.
        dtype: little-endian type of the token files.
        shards: every shard, train before val, in order.
        text_bytes: UTF-8 bytes of the documents of each split.
        sources: where the text came from; one object a source, with at least `source`.
        options: the options that shaped the bytes.
        removed: documents and bytes that the options left out, by reason.
        left_out: files that were found and not read, by kind.
        made_with: versions of what wrote the folder; other versions write the same shards.
    """

    __pydantic_config__ = {"extra": "forbid"}

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB)]
    eot: Count
    dtype: Literal["uint16", "uint32"]
    shards: tuple[Shard, ...]
    text_bytes: dict[str, Count] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    removed: dict[str, dict[str, Count]] = field(default_factory=dict)
    left_out: dict[str, Count] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def split(self, name: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, name: str) -> int:
        return sum(shard.tokens for shard in self.split(name))

    def documents(self, name: str) -> int:
        return sum(shard.documents for shard in self.split(name))

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def has_parts(self) -> bool:
        """Whether the documents are conversations, with a part for every token."""
        return bool(self.shards) and all(shard.parts_sha256 for shard in self.shards)

    def to_json(self) -> str:
        content = asdict(self)
        for shard in content["shards"]:
            if not shard["parts_sha256"]:
                del shard["parts_sha256"]
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, with the size of every file checked against it.

    Raises:
        UserError: as in `load_manifest`, or a file that is missing or of another size.
    """
    manifest = load_manifest(folder)
    if wrong := list(wrong_sizes(folder, manifest).values()):
        more = f" ({len(wrong)} files are wrong; regpt data verify {word(folder)} names all)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}; prepare the folder again or restore the file{'s' if more else ''}")
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, whatever the files next to it.

    Raises:
        UserError: no such folder, no manifest (the folder was never finished, or holds no shards), or a manifest of
            another format.
    """
    if address := address_of(folder):
        raise UserError(
            f"{address} is an address and token shards are read from folders of this machine; copy it here and give "
            "that folder (train, eval and replay: --data DIR)"
        )
    path = folder / "manifest.json"
    if not is_file(path):
        raise UserError(f"data folder {str(folder)!r} {without_manifest(folder)}")
    manifest = parse_manifest(read_small(path, "prepare it again", MAX_MANIFEST_BYTES), path)
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.format_version}, this regpt reads {FORMAT_VERSION}; prepare it again"
        )
    return manifest


def without_manifest(folder: Path) -> str:
    """What is wrong with a folder without manifest.json, and what to do."""
    moved = "if it was moved, give its new place (train, eval and replay: --data DIR)"
    make = f"make it with: regpt data prepare SOURCE --out {word(folder)}"
    if exists(folder) and not is_folder(folder):
        return "is a file; give the folder of the shards that holds manifest.json"
    if not is_folder(folder):
        return f"does not exist; {moved}, or {make}"
    names = [path.name for path in folder.iterdir()]
    if names and WORK not in names and not any(name.endswith((".bin", ".idx")) for name in names):
        out = f"{folder}-shards" if folder.name not in ("", "..") else "NEW_DIR"
        prepare = f"regpt data prepare {word(folder)} --out {word(out)}"
        return f"holds no token shards (no manifest.json); if it holds texts, make shards of them with: {prepare}"
    return f"has no manifest.json, so it was never finished; {moved}, or {make}"


def parse_manifest(content: bytes, path: Path) -> Manifest:
    try:
        manifest = parse_as(Manifest, content)
    except ValueError as error:
        raise UserError(f"{path} is not a manifest of token shards ({error}); prepare it again") from None
    if manifest.eot >= manifest.vocab_size:
        raise UserError(f"{path} has eot {manifest.eot} and vocab_size {manifest.vocab_size}; prepare it again")
    for name in (shard.file for shard in manifest.shards):
        if not is_plain_name(name) or not name.endswith(".bin"):
            raise UserError(
                f"{path} names the shard {name!r}, which is not a .bin file in its folder; prepare it again"
            )
    return manifest


def wrong_sizes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """A phrase for each file of `manifest`, by name, that is missing or has another size."""
    width, wrong = manifest.numpy_dtype.itemsize, dict[str, str]()
    for shard in manifest.shards:
        for name, expected, _ in shard.files(width):
            path = folder / name
            found = path.stat().st_size if is_file(path) else None
            if found is not None and found != expected:
                refuse_lfs_pointer(path)
            if found != expected:
                state = "is missing" if found is None else f"has {found:,} bytes instead of {expected:,}"
                wrong[name] = f"shard {path} {state}"
    return wrong
