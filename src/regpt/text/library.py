"""Any other BPE of a `tokenizer.json` (Llama, Qwen, Gemma, Mistral, Pythia, …), through the `tokenizers` library.

Text becomes the library's tokens; what a document starts with, which tokens end a text and the identity are read from
the content (`text/spec.py`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer

from regpt.text.gpt2 import without_surrogates
from regpt.text.spec import SPACE, BPESpec, Json
from regpt.text.tokenizer import SEAM

# Normalizers that change neither side of a seam by what is on the other: none composes with a space or a line end.
LOCAL = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
CHARACTERS = ("a", "1", ".", "'", "日", "\u0301", "_", "\n", " ", "\t")  # one of each class that patterns distinguish
GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
PIECE_SEAM = re.compile(rf"[^\W_](?=\n)|[^\s{SPACE}](?= )")  # `SEAM` where a space is also spelled as SPACE


class LibraryTokenizer:
    """A BPE as the contents of its `tokenizer.json` describe it, encoded by the `tokenizers` library.

    `sha256` is that of what decides its tokens, in one spelling; `name` is `bpe-<n_vocab>-<first 8 digits of sha256>`.
    """

    def __init__(self, spec: BPESpec) -> None:
        self.spec = spec
        self.sha256 = hashlib.sha256(self.spec.canonical().encode()).hexdigest()
        self.n_vocab = max(self.spec.vocab.values()) + 1  # ids may have holes
        self.eot = self.spec.vocab[self.spec.start]
        self.stop_ids = self.spec.stop_ids()
        self.name = f"bpe-{self.n_vocab}-{self.sha256[:8]}"

    @functools.cached_property
    def _library(self) -> Tokenizer:
        return build_library(self.spec)

    @functools.cached_property
    def _continuing(self) -> Tokenizer:
        return build_library(self.spec.without_prefix()) if self.spec.prefix else self._library

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        return self.spec.token_bytes(self.n_vocab)

    def within(self, rows: int) -> LibraryTokenizer:
        """The same without the special tokens whose ids are `rows` or more, which a model of `rows` tokens lacks."""
        return LibraryTokenizer(self.spec.within(rows))

    def encode(self, text: str) -> list[int]:
        return encode_text(self._library, text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return encode_texts(self._library, texts, threads)

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self.spec.template:
            return self.encode_batch(texts)
        first = np.array([self.eot], dtype=np.uint32)
        rest = self.encode_batch([text.removeprefix(self.spec.start) for text in texts])
        return [np.concatenate((first, ids)) for ids in rest]

    def encode_continuations(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_texts(self._continuing, texts)

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join(map(self._bytes.__getitem__, map(int, ids))).decode("utf-8", "replace")
        return text[1:] if self.spec.prefix and text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def byte_lengths(self) -> np.ndarray:
        lengths = np.fromiter(map(len, self._bytes), dtype=np.int64)
        lengths[list(self.spec.special.values())] = 0
        return lengths

    def to_json(self) -> str:
        return json.dumps(self.spec.to_content(), ensure_ascii=False) + "\n"

    @property
    def seam(self) -> re.Pattern[str] | None:
        return self._seam

    @functools.cached_property
    def _seam(self) -> re.Pattern[str] | None:
        return find_seam(self.spec, self._library)


def build_library(spec: BPESpec) -> Tokenizer:
    """The library's tokenizer; text that spells a special token is only text to it, and no token is added."""
    tokenizer = Tokenizer.from_str(json.dumps({**spec.to_content(), "post_processor": None}))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`; surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:  # as a terminal passes bytes that are not UTF-8
        text = without_surrogates(text)
    return tokenizer.encode_batch_fast([text])[0].ids  # unlike `encode`: no offsets, and without the GIL


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
    """One uint32 array of token ids a text."""

    def encode(text: str) -> np.ndarray:
        return np.array(encode_text(tokenizer, text), dtype=np.uint32)

    if threads == 1:
        return [encode(text) for text in texts]
    with ThreadPoolExecutor(threads) as pool:  # the library releases the GIL
        return list(pool.map(encode, texts))


def find_seam(spec: BPESpec, library: Tokenizer) -> re.Pattern[str] | None:
    """Where text may be cut so that its parts' tokens are its tokens; None where no such place is known."""
    plain = [token for token in spec.added if not token["special"]]
    eating = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in plain)
    if spec.prefix or eating or not all(map(is_local, spec.normalizer)):
        return None
    if spec.byte_level:
        crossing, tokens = re.compile(r"\S[ \n]"), [token["content"] for token in plain]
        return None if any(map(crossing.search, tokens)) or not splits_at_seams(library) else SEAM
    crossing = re.compile(rf"[^\s{SPACE}][{SPACE} ]|[^\W_]\n")
    whole = spec.pre_tokenizer in ([], [GEMMA_SPLIT])
    return PIECE_SEAM if whole and not any(map(crossing.search, spec.vocab)) else None


def is_local(step: Json) -> bool:
    return step["type"] in LOCAL or (step["type"] == "Replace" and step["pattern"] == {"String": " "})


def splits_at_seams(library: Tokenizer) -> bool:
    """Whether pre-tokenization divides at every seam, tried with all neighbourhoods of two characters."""

    @functools.cache
    def pieces(text: str) -> list[str]:
        return [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(text)]

    lefts = ["".join(pair) for pair in itertools.product(CHARACTERS, repeat=2)]
    rights = ["".join(three) for three in itertools.product(" \n", CHARACTERS, CHARACTERS)]
    tried = ((left, right) for left, right in itertools.product(lefts, rights) if SEAM.match(left[1] + right[0]))
    return all(pieces(left + right) == pieces(left) + pieces(right) for left, right in tried)
