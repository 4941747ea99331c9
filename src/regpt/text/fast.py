"""The same tokens sooner: the package `gigatoken` encodes, the tokenizer it stands in for remains the authority.

`gigatoken` (extra `fast`) looks words up in a cache instead of merging them again. Its only known difference from
tiktoken and tokenizers is the edition of Unicode: characters that were assigned lately are letters to one and unknown
to the other. Text with such a character is encoded by the tokenizer itself, as is one text in a thousand, to compare
the two: a difference is an error, never a wrong shard.
"""

import functools
import importlib.metadata
import json
import tempfile
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regpt.errors import UserError
from regpt.text.bpe import ENDOFTEXT, BPETokenizer
from regpt.text.gpt2 import GPT2Tokenizer
from regpt.text.tokenizer import Tokenizer

PACKAGE = "gigatoken"
VETTED = "0.10."  # the versions that docs/log.md reports on
COMPARE_EVERY = 1024  # texts: about 1 % of the time
COMPARE_CHARS = 1 << 18
# Version 0.10 never empties its cache. It grows with words not seen before, and those are what takes time, so time
# bounds it: 3 s are about 1 GB of English and 0.3 GB of memory, or 30 MB of random letters and as much memory.
RENEW_S = 3.0
# Letters and digits of Unicode 17, which gigatoken 0.10 knows and tiktoken 0.14 and tokenizers 0.23 do not. Found by
# encoding every code point; a Python of Unicode 16 or older reports them as unassigned anyway.
UNICODE_17 = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED)),
    *((0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
FIRST_DISPUTED, FIRST_SURROGATE = 0x378, 0xD800  # U+0378 has been unassigned in every edition
TABLE_SIZE = 0x40000  # above it: tags, private use and nothing yet; too rare to tell apart, all counts as disputed


class FastTokenizer:
    """`exact`, encoding faster; not for several threads at once."""

    def __init__(self, exact: GPT2Tokenizer | BPETokenizer) -> None:
        self.exact = exact
        self.name, self.sha256, self.n_vocab, self.eot = exact.name, exact.sha256, exact.n_vocab, exact.eot
        self._encoder = build(exact)
        self._spent_s, self._texts = 0.0, 0

    def encode(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.exact.decode(ids)

    def byte_lengths(self) -> np.ndarray:
        return self.exact.byte_lengths()

    def to_json(self) -> str:
        return self.exact.to_json()

    def _encode(self, text: str) -> np.ndarray:
        if not text.isascii() and is_disputed(text):
            return self.exact.encode_batch([text])[0]
        if self._spent_s > RENEW_S:
            self._encoder, self._spent_s = build(self.exact), 0.0
        start = time.perf_counter()
        ids = self._encoder.encode(text)
        self._spent_s += time.perf_counter() - start
        if self._texts % COMPARE_EVERY == 0 and len(text) <= COMPARE_CHARS:
            self._compare(text, ids)
        self._texts += 1
        return ids

    def _compare(self, text: str, ids: np.ndarray) -> None:
        if not np.array_equal(ids, self.exact.encode_batch([text])[0]):
            raise UserError(
                f"the package {PACKAGE} encodes {text[:40]!r}… differently from the tokenizer {self.name}; "
                "do without it: --encoder exact"
            )


def accelerate(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, faster where the package is installed in a version that was vetted; otherwise itself."""
    return FastTokenizer(tokenizer) if can_accelerate(tokenizer) else tokenizer  # type: ignore[arg-type]


def can_accelerate(tokenizer: Tokenizer) -> bool:
    return is_standard(tokenizer) and available()


def is_standard(tokenizer: Tokenizer) -> bool:
    """Is it one that `to_json` describes wholly, so that another process can open it?"""
    return type(tokenizer) in (GPT2Tokenizer, BPETokenizer)


def available() -> bool:
    try:
        return importlib.metadata.version(PACKAGE).startswith(VETTED)
    except importlib.metadata.PackageNotFoundError:
        return False


def encoder_name(tokenizer: Tokenizer, accelerated: bool) -> str:
    """Package and version that turns text into tokens, such as `tiktoken 0.14.0`."""
    package = PACKAGE if accelerated else "tiktoken" if isinstance(tokenizer, GPT2Tokenizer) else "tokenizers"
    return f"{package} {importlib.metadata.version(package)}"


def build(exact: GPT2Tokenizer | BPETokenizer) -> Any:
    """The package's encoder, without the special token: text that spells it is only text. Takes 50 ms."""
    from gigatoken import gigatoken_rs  # type: ignore[import-not-found]

    if isinstance(exact, BPETokenizer):
        content = json.loads(exact.to_json())
        content["model"]["vocab"].pop(ENDOFTEXT, None)
        return gigatoken_rs.load_hf_json(json.dumps({**content, "added_tokens": []}))
    with tempfile.TemporaryDirectory() as folder:  # it reads ranks from a file only
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(exact.ranks())
        return gigatoken_rs.BPETokenizer.from_tiktoken(str(path), "gpt2", None)


def is_disputed(text: str) -> bool:
    """Does `text` hold a character whose class may depend on the edition of Unicode, or a lone surrogate?"""
    units = characters_from(text, "utf-16-le", "<u2")  # half the memory, and enough for most texts
    if len(units) and units.max() >= FIRST_SURROGATE:
        units = characters_from(text, "utf-32-le", "<u4")
    return bool(disputed_characters()[np.minimum(units, TABLE_SIZE - 1)].any())


def characters_from(text: str, encoding: str, dtype: str) -> np.ndarray:
    """Those numbers of `text` in `encoding` that may be disputed."""
    units = np.frombuffer(text.encode(encoding, "surrogatepass"), dtype=dtype)
    return units[np.flatnonzero(units >= FIRST_DISPUTED)].astype(np.int64)


@functools.cache
def disputed_characters() -> np.ndarray:
    """(TABLE_SIZE,) bool: unassigned in this Python's Unicode, or assigned by Unicode 17; the last entry is True, for
    everything above."""
    table = np.array([unicodedata.category(chr(i)) in ("Cn", "Cs") for i in range(TABLE_SIZE)])
    for first, last in UNICODE_17:
        table[first : last + 1] = True
    table[-1] = True
    assert not table[:FIRST_DISPUTED].any()
    return table
