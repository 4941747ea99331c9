"""What the rest of the package asks of a tokenizer."""

import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

MAX_VOCAB = 1 << 24  # the largest vocabularies in use have a million tokens
ENDOFTEXT = "<|endoftext|>"  # starts every document of GPT-2 and of many later models
# The patterns of GPT-2, GPT-4, Llama 3, Qwen and DeepSeek have no piece in which a space follows another character, or
# a line end a letter or digit (it may follow punctuation), so text may be cut there. Python's \S has fewer characters
# than Rust's, and its \w none that is neither letter, digit nor "_": safe.
SEAM = re.compile(r"[^\W_](?=\n)|\S(?= )")


class Encoder(Protocol):
    """Text to token ids. Text that spells a special token is encoded as ordinary characters.

    Attributes:
        seam: where a text may be cut so that the tokens of its parts are its tokens; None where no such place is known.
    """

    @property
    def seam(self) -> re.Pattern[str] | None:
        return SEAM

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """One uint32 array of token ids a text, in the order given, without `eot`."""
        ...

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for what a model reads first: after the token that transformers puts before every text (Llama 3's
        `<|begin_of_text|>`), once, though a text may begin with its name; by default nothing stands there."""
        return self.encode_batch(texts)

    def encode_continuations(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for texts that follow other text: without the space that Llama 2's tokenizer puts before a text."""
        return self.encode_batch(texts)


@runtime_checkable
class Tokenizer(Encoder, Protocol):
    """Text to token ids and back. Text that spells a special token is encoded as ordinary characters.

    Attributes:
        name: `gpt2`, or `bpe-<n_vocab>-<first 8 digits of sha256>`.
        sha256: identity, from what decides its tokens (vocabulary, merges, rules): the same wherever it came from.
        n_vocab: the real vocabulary size, special tokens included.
        eot: id of the token that starts every document and so ends the one before: `<|endoftext|>`, Llama 3's
            `<|begin_of_text|>`, Llama 2's `<s>`.
        stop_ids: the tokens that end a text: `eot`, and those that the files name as eos.
    """

    name: str
    sha256: str
    n_vocab: int
    eot: int
    stop_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `eot`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD. Ids must be below `n_vocab`."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, perhaps only a part of a character; of a special token, its name."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """(n_vocab,) int64: UTF-8 bytes that each token stands for; 0 for special tokens."""
        ...

    def to_json(self) -> str:
        """Contents of `tokenizer.json` in a data folder or checkpoint; `open_tokenizer` reads it back."""
        ...


def with_bytes(data: bytes) -> str:
    r"""`data` as text; what is only a part of a character is shown as its bytes, `\xe3\x81`."""
    return data.decode("utf-8", "backslashreplace")


def quoted(data: bytes) -> str:
    """A token in quotes: its text, or its bytes where they are only a part of a character."""
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)
