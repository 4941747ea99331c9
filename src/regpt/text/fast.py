"""The same tokens sooner: the package `gigatoken` encodes, the tokenizer it stands in for remains the authority.

`gigatoken` (extra `fast`) looks words up in a cache instead of merging them again. Its only known difference from
tiktoken and tokenizers is the edition of Unicode: characters that were assigned lately are letters to one and unknown
to the other. Text with such a character is encoded by the tokenizer itself, and one text in a thousand is encoded by
both and compared.
"""

import functools
import json
import os
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regpt.errors import UserError
from regpt.files import write_bytes
from regpt.text.tokenizer import Encoder, Tokenizer

if TYPE_CHECKING:
    from regpt.text.bpe import BPETokenizer
    from regpt.text.gpt2 import GPT2Tokenizer

PACKAGE = "gigatoken"
VETTED = "0.10."  # the versions that docs/log.md reports on
# Version 0.10 never empties its cache, which grows with words not seen before: by 35 MB over 500 MB of English, by as
# much over 4 MB of random letters. So the encoder is made anew (50 ms) when the process has grown by so much, but not
# all the time where a huge document is what it grew by.
GROWN_BYTES = 64 << 20
RENEW_S, RENEW_UNSEEN_S = 0.5, 3.0  # of encoding: at the soonest, and where the system does not tell the size
EVERY = 1024  # texts, of which one is compared: a hundredth of one core's time at the speed of sixteen
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


class WrongTokens(UserError):
    """The package makes other tokens than the tokenizer."""


class FastEncoder(Encoder):
    """Encodes as `exact()` does, faster; not for several threads at once.

    `model` is a file that `save_model` wrote. `exact` is called when it is needed first: it takes 20 MB and 0.1 s.
    """

    def __init__(self, model: Path, exact: Callable[[], Encoder]) -> None:
        self._model, self._exact, self._texts = model, functools.cache(exact), 0
        self._renew()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """One uint32 array of token ids a text, in the order given; one thread encodes, whatever `threads` says."""
        if self._spent_s > RENEW_S and self._is_large():
            self._renew()
        start = time.perf_counter()
        encoded = [self._encode(text) for text in texts]
        self._spent_s += time.perf_counter() - start
        return encoded

    def _encode(self, text: str) -> np.ndarray:
        if not text.isascii() and is_disputed(text):
            return self._exact().encode_batch([text])[0]
        found = self._encoder.encode(text)
        self._texts += 1
        if self._texts % EVERY == 0 and not np.array_equal(found, self._exact().encode_batch([text])[0]):
            raise WrongTokens(
                f"the package {PACKAGE} encodes {text[:40]!r}… differently from the tokenizer; do without it: "
                "--encoder exact"
            )
        return found

    def _is_large(self) -> bool:
        now = own_bytes()
        return self._spent_s > RENEW_UNSEEN_S if now is None else now - self._before > GROWN_BYTES

    def _renew(self) -> None:
        self._encoder: Any = None  # before there is another
        self._encoder, self._spent_s = build(self._model), 0.0
        self._before = own_bytes() or 0


def own_bytes() -> int | None:
    """Memory of this process, files that it shares with others left out; None where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def accelerate(tokenizer: Tokenizer, folder: Path) -> Encoder:
    """`tokenizer`, faster where the package is installed in a version that was vetted; otherwise itself. What the
    package reads is written into `folder`."""
    return FastEncoder(save_model(tokenizer, folder), lambda: tokenizer) if can_accelerate(tokenizer) else tokenizer


def can_accelerate(tokenizer: Tokenizer) -> bool:
    from regpt.text.bpe import BPETokenizer
    from regpt.text.gpt2 import GPT2Tokenizer

    return type(tokenizer) in (GPT2Tokenizer, BPETokenizer) and available()


def is_standard(tokenizer: Tokenizer) -> bool:
    """Is it one that `to_json` describes wholly, so that another process can open it?"""
    from regpt.text.bpe import BPETokenizer
    from regpt.text.gpt2 import GPT2Tokenizer
    from regpt.text.library import LibraryTokenizer

    return type(tokenizer) in (GPT2Tokenizer, BPETokenizer, LibraryTokenizer)


def available() -> bool:
    import importlib.metadata  # takes 20 ms, which workers do without

    try:
        return importlib.metadata.version(PACKAGE).startswith(VETTED)
    except importlib.metadata.PackageNotFoundError:
        return False


def encoder_name(tokenizer: Tokenizer, accelerated: bool) -> str:
    """Package and version that turns text into tokens, such as `tiktoken 0.14.0`."""
    import importlib.metadata

    package = PACKAGE if accelerated else "tiktoken" if tokenizer.name == "gpt2" else "tokenizers"
    return f"{package} {importlib.metadata.version(package)}"


def save_model(exact: "Tokenizer | GPT2Tokenizer | BPETokenizer", folder: Path) -> Path:
    """Write what the package reads, without the special tokens: text that spells one is only text."""
    if ranks := getattr(exact, "ranks", None):
        path, content = folder / "model.tiktoken", ranks()
    else:
        described = json.loads(exact.to_json())
        special = {token["content"] for token in described["added_tokens"]}
        described["model"]["vocab"] = {
            token: i for token, i in described["model"]["vocab"].items() if token not in special
        }
        path, content = folder / "model.json", json.dumps({**described, "added_tokens": []}).encode()
    write_bytes(path, content)
    return path


def find_model(folder: Path) -> Path | None:
    """What `save_model` wrote into `folder`."""
    return next((path for path in (folder / "model.tiktoken", folder / "model.json") if path.exists()), None)


def build(model: Path) -> Any:
    """The package's encoder; takes 50 ms."""
    from gigatoken import gigatoken_rs  # type: ignore[import-not-found]

    if model.suffix == ".json":
        return gigatoken_rs.load_hf_json(model.read_text(encoding="utf-8"))
    return gigatoken_rs.BPETokenizer.from_tiktoken(str(model), "gpt2", None)


def is_disputed(text: str) -> bool:
    """Does `text` hold a character whose class may depend on the edition of Unicode, or a lone surrogate?"""
    units = characters_from(text, "utf-16-le", "<u2")  # half the memory, and enough for most texts
    if len(units) == 0 or units.max() < FIRST_SURROGATE:
        return bool(disputed_characters(FIRST_SURROGATE)[units].any())
    units = characters_from(text, "utf-32-le", "<u4")
    return bool(disputed_characters(TABLE_SIZE)[np.minimum(units, TABLE_SIZE - 1)].any())


def characters_from(text: str, encoding: str, dtype: str) -> np.ndarray:
    """Those numbers of `text` in `encoding` that may be disputed."""
    units = np.frombuffer(text.encode(encoding, "surrogatepass"), dtype=dtype)
    return units[np.flatnonzero(units >= FIRST_DISPUTED)].astype(np.int64)


@functools.cache
def disputed_characters(size: int) -> np.ndarray:
    """(size,) bool: unassigned in this Python's Unicode, or assigned by Unicode 17; the last entry of the whole table
    is True, for everything above."""
    unknown = map({"Cn", "Cs"}.__contains__, map(unicodedata.category, map(chr, range(size))))
    table = np.frombuffer(bytearray(unknown), dtype=bool)
    for first, last in UNICODE_17:
        table[first : last + 1] = True
    table[-1] |= size == TABLE_SIZE
    assert not table[:FIRST_DISPUTED].any()
    return table
