"""What a data folder holds, in numbers and in a few lines of its text."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from regpt.data.manifest import SPLITS, Manifest
from regpt.data.packed import read_parts
from regpt.data.stream import document_starts, open_stream
from regpt.errors import UserError
from regpt.files import file_sha256, is_file
from regpt.text.folder import TOKENIZER
from regpt.text.open import NAMED, open_tokenizer
from regpt.text.tokenizer import Tokenizer, with_bytes

BLOCK, COUNTED_BLOCKS = 1 << 20, 100  # counting a hundred million tokens takes about a second


@dataclass(frozen=True)
class SplitInfo:
    """One split; `lengths` are its documents' tokens, the end-of-text token included; `trained_tokens` of conversations
    are those of answers and their ends."""

    split: str
    documents: int
    tokens: int
    text_bytes: int
    shards: int
    lengths: np.ndarray
    trained_tokens: int | None = None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token that stands for text."""
        return self.text_bytes / max(1, self.tokens - self.documents)

    def to_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "bytes_per_token": round(self.bytes_per_token, 4),
            "shards": self.shards,
            **({} if self.trained_tokens is None else {"trained_tokens": self.trained_tokens}),
            "document_tokens": {
                "min": int(self.lengths.min()),
                "median": float(np.median(self.lengths)),
                "mean": round(float(self.lengths.mean()), 1),
                "max": int(self.lengths.max()),
            },
            "histogram": [{"from": low, "below": high, "documents": n} for low, high, n in histogram(self.lengths)],
        }


def describe_shards(folder: Path, manifest: Manifest) -> list[SplitInfo]:
    """Every split that has documents."""
    return [
        SplitInfo(
            split=split,
            documents=manifest.documents(split),
            tokens=manifest.tokens(split),
            text_bytes=manifest.text_bytes.get(split, 0),
            shards=len(manifest.split(split)),
            lengths=np.diff(document_starts(folder, manifest, split)),
            trained_tokens=count_trained(folder, manifest, split),
        )
        for split in SPLITS
        if manifest.split(split)
    ]


def count_trained(folder: Path, manifest: Manifest, split: str) -> int | None:
    """Tokens that are trained on; None for plain text."""
    return int(np.count_nonzero(read_parts(folder, manifest.split(split)))) if manifest.has_parts else None


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, below, documents) for each power of two between the shortest and the longest document."""
    exponents = np.frexp(lengths)[1] - 1  # exact floor(log2), lengths being far below 2^53
    counts = np.bincount(exponents)
    return [(1 << i, 2 << i, int(counts[i])) for i in range(int(exponents.min()), len(counts))]


def count_tokens(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    """(V,) int64: how often each token occurs in a split, or in an evenly spread sample of a long one."""
    stream = open_stream(folder, manifest, split, "sequential", 0)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    n_tokens = stream.epoch_tokens
    blocks = -(-n_tokens // BLOCK)
    for block in np.linspace(0, blocks - 1, min(blocks, COUNTED_BLOCKS)).astype(int).tolist():
        tokens = stream.tokens(block * BLOCK, min(BLOCK, n_tokens - block * BLOCK))
        counts += np.bincount(tokens, minlength=manifest.vocab_size)
    return counts


def most_frequent(counts: np.ndarray, n: int) -> list[tuple[int, float]]:
    """(token, share of all tokens) of the `n` most frequent ones that occur, the lower id first among equals."""
    ids = np.argsort(-counts, kind="stable")[:n].tolist()
    return [(i, float(counts[i] / counts.sum())) for i in ids if counts[i]]


def first_texts(folder: Path, manifest: Manifest, split: str, tokenizer: Tokenizer, n: int, tokens: int) -> list[str]:
    """The beginnings of the first `n` documents of a split, decoded: `tokens` tokens of each at most."""
    starts = document_starts(folder, manifest, split)[: n + 1].tolist()
    stream = open_stream(folder, manifest, split, "sequential", 0)
    read = [stream.tokens(start, min(tokens, end - start)).tolist() for start, end in pairwise(starts)]
    return [with_bytes(b"".join(map(tokenizer.token_bytes, ids))) for ids in read]


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that the shards in `folder` were made with.

    Raises:
        UserError: it is not available here, or it is another one than the manifest names.
    """
    named = manifest.tokenizer in NAMED and not is_file(folder / TOKENIZER)
    tokenizer = open_tokenizer(manifest.tokenizer if named else folder)
    if tokenizer.sha256 != tokenizer_identity(folder, manifest):
        raise UserError(
            f"the shards in {folder} were made with {manifest.tokenizer} (SHA-256 {manifest.tokenizer_sha256[:12]}…), "
            f"the tokenizer found is {tokenizer.name} ({tokenizer.sha256[:12]}…); prepare them again"
        )
    if tokenizer.n_vocab != manifest.vocab_size:
        raise UserError(
            f"the manifest of {folder} has {manifest.vocab_size:,} tokens, its tokenizer {tokenizer.name} "
            f"{tokenizer.n_vocab:,}; prepare the folder again"
        )
    return tokenizer


def tokenizer_identity(folder: Path, manifest: Manifest) -> str:
    """SHA-256 of the rules of the tokenizer that the shards in `folder` were made with.

    It is the manifest's; older manifests have the hash of a `tokenizer.json` as it came from elsewhere.
    """
    file = folder / TOKENIZER
    own = is_file(file) and file_sha256(file) == manifest.tokenizer_sha256
    return open_tokenizer(folder).sha256 if own else manifest.tokenizer_sha256
