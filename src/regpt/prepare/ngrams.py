"""Hashes of the word n-grams of a text, by which near duplicates and evaluation items are recognized.

Words are runs of letters and digits in lower case: spacing, punctuation and capitals do not matter (as in GPT-3's
appendix C).
"""

import functools
import re
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from regpt.text.tokenizer import SEAM

WORD = re.compile(r"[^\W_]+")
BLOCK_CHARS = 1 << 20  # of a long document that are split into words at a time
KNOWN_WORDS = 1 << 17  # word hashes in the cache, about 30 MB
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a run is lost; 2^64 divided by the golden ratio


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """(words - n + 1,) uint64: a hash of every run of `n` words; empty where there are fewer words."""
    words = [np.fromiter(map(word_hash, WORD.findall(part)), np.uint64) for part in cut(text.lower(), BLOCK_CHARS)]
    hashes = np.concatenate(words)
    count = max(0, len(hashes) - n + 1)
    runs = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        runs = runs * MULTIPLIER + hashes[i : i + count]
    return runs


@functools.lru_cache(KNOWN_WORDS)
def word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def cut(text: str, limit: int, seam: re.Pattern[str] | None = SEAM) -> Iterator[str]:
    """Yield parts of `text` of about `limit` characters, cut at an encoder's `seam`, so that their tokens concatenated
    are the tokens of `text`; without a seam, all of it."""
    start = 0
    while seam and len(text) - start > limit and (place := seam.search(text, start + limit)):
        yield text[start : place.end()]
        start = place.end()
    yield text[start:] if start else text
