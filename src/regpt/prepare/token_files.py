"""Token files that other projects wrote → arrays of tokens, mapped from disk.

`build-nanogpt` is `.npy`: one array of integers (its fineweb.py). `nanogpt` is `.bin` without a header: uint16, or
uint32 where the vocabulary has more than 65,536 tokens (its data/*/prepare.py). `llm.c`, which modded-nanogpt writes
too, is `.bin` with a header of 256 int32: a magic number, a version, the number of tokens (dev/data/data_common.py).
Nothing of these is a pickle, and a pickle next to them is not opened.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from regpt.errors import UserError, nearest, word
from regpt.files import identity, is_file
from regpt.prepare.listing import Wanted, find_local, printable, split_once
from regpt.prepare.sources import sha256_of

FORMATS = ("build-nanogpt", "nanogpt", "llm.c")
SUFFIXES = (".npy", ".bin")
HEADER = np.dtype("<i4")
HEADER_BYTES = 1024
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, dtype; for GPT-2, for Llama 3
EVALUATION_MAGIC = 20240522  # HellaSwag and MMLU: questions, not text
# Version of the format: what reads its header, of 10,000 characters at most; version 3 has names of fields.
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
SNIFFED = 4096  # tokens that are looked at for a wrong width
# A file that is named may have any ending: it is recognized by its content.
TOKEN_FILES = Wanted(
    lambda name: int(name.lower().endswith(SUFFIXES)), lambda name: True, ", ".join(SUFFIXES), deep=False
)


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens: `tokens` numbers of `dtype` after `offset` bytes.

    `source` is what the user typed, `file` the path inside that folder or the name as given.
    """

    source: str
    file: str
    path: Path
    format: str
    dtype: str
    offset: int
    tokens: int

    def record(self, split: str) -> dict[str, Any]:
        """What the manifest stores before the file is read."""
        return {
            "source": self.source,
            "file": self.file,
            "bytes": self.path.stat().st_size,
            "sha256": sha256_of(self.path),
            "split": split,
            "format": self.format,
            "tokens": self.tokens,
        }

    def array(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.tokens,))


def find_token_files(
    given: Sequence[str], val: Sequence[str], forced: str | None, n_vocab: int, left_out: Counter[str]
) -> tuple[list[TokenFile], list[TokenFile]]:
    """The files of every PATH for training, and those of `val`: files, folders (not what is deeper inside) or globs;
    those of a folder sorted by name. Each once; `left_out` counts the others.

    Raises:
        UserError: nothing there, or a file that is not of these formats.
    """
    if forced and forced not in FORMATS:
        raise UserError(f"--format is {forced!r}{nearest(forced, FORMATS)}, must be one of {', '.join(FORMATS)}")
    for source in (*given, *val):
        if is_file(Path(source) / "manifest.json"):
            raise UserError(
                f"{source} holds token shards of regpt already; use it as it is: regpt train … --data {word(source)}"
            )
    found = [
        [(source, file.path, file.name) for source in names for file in find_local(source, TOKEN_FILES, left_out)]
        for names in (given, val)
    ]
    train, held_out = split_once(found[0], found[1], lambda file: identity(file[1]), left_out)

    def opened(files: Sequence[tuple[str, Path, str]]) -> list[TokenFile]:
        return [open_token_file(printable(source), name, path, forced, n_vocab) for source, path, name in files]

    return opened(train), opened(held_out)


def check_vocabulary(files: Sequence[TokenFile]) -> None:
    """Raise a UserError when a file is next to nanoGPT's meta.pkl: its tokens are of a vocabulary of its own."""
    for file in files:
        if (file.path.parent / "meta.pkl").exists():
            raise UserError(
                f"{file.path} lies beside meta.pkl, so its tokens are not GPT-2's; a pickle is never opened here: "
                "give the tokenizer that made them with --tokenizer, or prepare the text anew"
            )


def open_token_file(source: str, name: str, path: Path, forced: str | None, n_vocab: int) -> TokenFile:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
        kind = forced or recognized(path, head)
        if kind == "build-nanogpt":
            dtype, offset, tokens = npy_layout(path)
        elif kind == "llm.c":
            dtype, offset, tokens = header_layout(path, head, size)
        else:
            dtype, offset, tokens = raw_layout(path, size, n_vocab, bool(forced))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    if not tokens:
        raise UserError(f"{path} holds no tokens; leave it out")
    return TokenFile(source, name, path, kind, dtype, offset, tokens)


def recognized(path: Path, head: bytes) -> str:
    """The format of a file that begins with `head`.

    Raises:
        UserError: another kind of file, or one that may be of two formats.
    """
    force = f"--format {{{','.join(FORMATS)}}}"
    if path.suffix == ".npy" or head.startswith(NPY):
        return "build-nanogpt"
    if head.startswith(ZIP):
        raise UserError(
            f"{path} is a zip archive, such as a PyTorch checkpoint, not tokens; leave it out or say {force}"
        )
    numbers = np.frombuffer(head[:8], HEADER) if len(head) >= 8 else np.zeros(2, HEADER)
    if numbers[0] == EVALUATION_MAGIC:
        raise UserError(f"{path} is an evaluation file of llm.c: it holds questions, not text; leave it out")
    if numbers[0] in HEADERS:
        if numbers[1] == HEADERS[int(numbers[0])][0]:
            return "llm.c"
        raise UserError(
            f"{path} begins with llm.c's number {numbers[0]} but says version {numbers[1]}: it is of another version "
            f"or tokens without a header; say which with {force}"
        )
    if path.suffix != ".bin":
        raise UserError(f"{path} has no header of llm.c and does not end in .npy or .bin; say what it is with {force}")
    return "nanogpt"


def npy_layout(path: Path) -> tuple[str, int, int]:
    """Type, offset and number of tokens of NumPy's format; only the header is read, objects are refused."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in NPY_HEADERS:
                raise ValueError(f"version {version} of the format")
            shape, _, dtype = NPY_HEADERS[version](file)
            offset = file.tell()
    except (ValueError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError) as error:  # nested brackets
        why = (str(error).splitlines() or ["nested too deeply"])[0]
        raise UserError(f"{path} is damaged or not a .npy file of numbers ({why})") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(
            f"{path} is an array of {dtype} in shape {shape}; tokens are one list of integers, as of uint16"
        )
    tokens = int(shape[0])
    expected, size = offset + tokens * dtype.itemsize, path.stat().st_size
    if tokens < 0 or size != expected:
        raise UserError(f"{path} is damaged: it has {size:,} bytes, its header says {expected:,}; copy it again")
    return dtype.str, offset, tokens


def header_layout(path: Path, head: bytes, size: int) -> tuple[str, int, int]:
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path} is damaged: its {size} bytes are fewer than the {HEADER_BYTES} of llm.c's header")
    magic, version, tokens = (int(number) for number in np.frombuffer(head, HEADER)[:3])
    known, dtype = HEADERS.get(magic, (None, ""))
    if version != known:
        kinds = " or ".join(f"{number} version {version}" for number, (version, _) in HEADERS.items())
        raise UserError(f"{path} has no header of llm.c: it begins with {magic} version {version} instead of {kinds}")
    expected = HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if tokens < 0 or size != expected:
        raise UserError(
            f"{path} is damaged: its header says {tokens:,} tokens, which are {expected:,} bytes, but it has {size:,}; "
            "copy it again"
        )
    return dtype, HEADER_BYTES, tokens


def raw_layout(path: Path, size: int, n_vocab: int, forced: bool) -> tuple[str, int, int]:
    """Tokens without a header; a width that is plainly wrong is noticed."""
    width = 2 if n_vocab <= 1 << 16 else 4
    if size % width:
        raise UserError(
            f"{path} has {size:,} bytes, no multiple of {width}: it was cut or holds no tokens of uint{8 * width}; "
            "copy it again"
        )
    if size and width == 2 and not forced:
        first = np.fromfile(path, "<u2", count=SNIFFED)
        if len(first) >= 4 and not first[1::2].any() and first.any():
            raise UserError(
                f"every second number of {path} is 0, as in a file of uint32, which nanoGPT does not write; "
                "if they are tokens of uint16, say --format nanogpt"
            )
    return f"<u{width}", 0, size // width
