"""Long words of a training text: cut, because what a BPE costs to learn grows with the square of a word's length.

A word is what GPT-2's pattern takes as one piece: letters, digits or signs in a row. Those beyond `MAX_WORD` characters
are no language (a DNA sequence, base64, minified code) and hold every pair thousands of times.
"""

import re
from collections.abc import Iterable, Iterator

from tokenizers import pre_tokenizers

MAX_WORD = 1000  # characters
BLOCK = MAX_WORD // 2  # a run of MAX_WORD characters contains a whole block, so looking at blocks finds them all
KINDS = (re.compile(r"[^\W_]*"), re.compile(r"[\W_]*"))  # every word is of one of them: letters and digits, or neither


class LongWords:
    """Cuts words beyond `MAX_WORD` characters and counts them.

    Attributes:
        count: words that were cut.
        longest: characters of the longest of them.
    """

    def __init__(self) -> None:
        self.count, self.longest = 0, 0
        self._words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def cut(self, texts: Iterable[str]) -> Iterator[str]:
        """`texts`, divided inside their long words; a text without any as it is."""
        for text in texts:
            done = 0
            for place in self._places(text):
                yield text[done:place]
                done = place
            yield text[done:] if done else text

    def _places(self, text: str) -> Iterator[int]:
        """Where to cut `text`, in order."""
        for start, end in long_runs(text):
            for _, (first, last) in self._words.pre_tokenize_str(text[start:end]):
                if last - first > MAX_WORD:
                    self.count, self.longest = self.count + 1, max(self.longest, last - first)
                    yield from range(start + first + MAX_WORD, start + last, MAX_WORD)


def long_runs(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of `MAX_WORD` or more characters of one kind, from one look per block."""
    i = 0
    while i + BLOCK <= len(text):
        kind = next((kind for kind in KINDS if kind.fullmatch(text, i, i + BLOCK)), None)
        if kind is None:
            i += BLOCK
            continue
        before, after = kind.match(text[max(0, i - BLOCK) : i][::-1]), kind.match(text, i)
        assert before is not None  # a kind matches nothing, too
        assert after is not None
        start, end = i - before.end(), after.end()
        if end - start >= MAX_WORD:
            yield start, end
        i += -(-(end - i) // BLOCK) * BLOCK
