"""Text → hashes of its runs of n words: what near duplicates and test questions are recognised by.

Words are runs of letters and digits in lower case, so that spacing, punctuation and capitals do not matter (GPT-3,
appendix C, compares texts so).
"""

import re
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

WORD = re.compile(r"[^\W_]+")
SPACE = re.compile(r"\s")
BLOCK_CHARS = 1 << 20  # of a long document that are a list of words at a time
KNOWN_WORDS = 1 << 18  # codes kept, about 30 MB
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a run is lost; 2^64 divided by the golden ratio


class WordCodes:
    """A random-looking 64-bit number for every word: the BLAKE2b hash of its UTF-8 form."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, text: str) -> np.ndarray:
        """(words,) uint64."""
        blocks = [np.fromiter(map(self._code, WORD.findall(block)), dtype=np.uint64) for block in cut(text.lower())]
        return np.concatenate(blocks)

    def _code(self, word: str) -> int:
        if (code := self._known.get(word)) is None:
            code = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
            if len(self._known) >= KNOWN_WORDS:
                self._known.clear()
            self._known[word] = code
        return code


def cut(text: str) -> Iterator[str]:
    """`text` in blocks that end between words."""
    start = 0
    while len(text) - start > BLOCK_CHARS and (space := SPACE.search(text, start + BLOCK_CHARS)):
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]


def grams(codes: np.ndarray, n: int) -> np.ndarray:
    """(words - n + 1,) uint64: a hash of every run of `n` words; none when there are fewer words."""
    count = max(0, len(codes) - n + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        hashes = hashes * MULTIPLIER + codes[i : i + count]
    return hashes
