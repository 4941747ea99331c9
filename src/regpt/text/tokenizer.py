"""What the rest of the package asks of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

ENDOFTEXT = "<|endoftext|>"  # starts every document


class Encoder(Protocol):
    """Text to token ids. Text that spells a special token is encoded as ordinary characters."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """One uint32 array of token ids a text, in the order given, without `eot`."""
        ...


@runtime_checkable
class Tokenizer(Encoder, Protocol):
    """Text to token ids and back. Text that spells a special token is encoded as ordinary characters.

    Attributes:
        name: `gpt2`, or `bpe-<n_vocab>-<first 8 digits of sha256>`.
        sha256: identity, from what decides its tokens (vocabulary, merges, rules): the same wherever it came from.
        n_vocab: the real vocabulary size, special tokens included.
        eot: id of `<|endoftext|>`, which starts every document.
    """

    name: str
    sha256: str
    n_vocab: int
    eot: int

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
