"""Train a byte-level BPE on the user's text, and use one that was trained: the `tokenizers` library.

The file format is the library's `tokenizer.json`, so Hugging Face's tools open it too.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers

from regpt.errors import UsageError, UserError
from regpt.text.library import encode_text, encode_texts
from regpt.text.rules import BYTES, byte_level_bpe, parse_content, read_rules
from regpt.text.tokenizer import ENDOFTEXT, MAX_VOCAB
from regpt.text.tokenizer import Tokenizer as TokenizerProtocol

MIN_VOCAB = 257  # 256 bytes and <|endoftext|>
# A merge seen once is a memory of one place, not of the language (the library's own default for this BPE).
MIN_FREQUENCY = 2
# What a BPE costs to learn grows with the square of a word's length. A word is what GPT-2's pattern takes as one piece:
# letters, digits or signs in a row. Longer ones are no language (a DNA sequence, base64, minified code) and hold every
# pair thousands of times.
MAX_WORD = 1000  # characters
BLOCK = MAX_WORD // 2  # a run of MAX_WORD characters contains a whole block, so looking at blocks finds them all
KINDS = (re.compile(r"[^\W_]*"), re.compile(r"[\W_]*"))  # every word is of one of them: letters and digits, or neither


class BPETokenizer(TokenizerProtocol):
    """A byte-level BPE with `<|endoftext|>`, as the contents of its `tokenizer.json` describe it.

    `sha256` is that of its rules in one spelling (`Rules.canonical`), whatever the file looks like; `name` is
    `bpe-<n_vocab>-<first 8 digits of sha256>`.
    """

    def __init__(self, tokenizer_json: str | dict[str, Any]) -> None:
        """The contents of a file, or the object in it.

        Raises:
            UserError: not a byte-level BPE that splits text as GPT-2 does, or one with a rule that regpt does not
                implement, by its name.
        """
        self.rules = read_rules(parse_content(tokenizer_json) if isinstance(tokenizer_json, str) else tokenizer_json)
        canonical = self.rules.canonical()
        self._json = self.rules.to_json() if self.rules.ends else canonical
        self.sha256 = hashlib.sha256(canonical.encode()).hexdigest()
        self.n_vocab, self.eot = len(self.rules.vocab), self.rules.special[ENDOFTEXT]
        self.stop_ids = (self.eot, *map(self.rules.special.__getitem__, self.rules.ends))
        self.name = f"bpe-{self.n_vocab}-{self.sha256[:8]}"

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.rules.build()

    def encode(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return encode_texts(self._tokenizer, texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        from regpt.text.gpt2 import byte_characters

        spelled = self._tokenizer.id_to_token(token) or ""
        return spelled.encode() if spelled in self.rules.special else bytes(map(byte_characters().index, spelled))

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.n_vocab, dtype=np.int64)
        for token, i in self.rules.vocab.items():
            lengths[i] = 0 if token in self.rules.special else len(token)  # one character a byte
        return lengths

    def to_json(self) -> str:
        return self._json


def train_bpe(texts: Iterable[str], vocab_size: int, long_words: LongWords | None = None) -> BPETokenizer:
    """A BPE of exactly `vocab_size` tokens: 256 bytes, the merges learned from `texts`, and `<|endoftext|>` last.

    The text is cut into words by GPT-2's pattern, and words beyond `MAX_WORD` characters into pieces, which
    `long_words` counts; the same texts give the same file.

    Raises:
        UsageError: `vocab_size` below 257, or beyond 2^24.
        UserError: it is more than the texts have to teach.
    """
    if vocab_size < MIN_VOCAB:
        raise UsageError(f"vocabulary size {vocab_size} is too small: a byte-level BPE has at least {MIN_VOCAB} tokens")
    if vocab_size > MAX_VOCAB:  # the library takes memory for all of them first, and aborts the process
        raise UsageError(f"vocabulary size {vocab_size} is too large: it must be at most {MAX_VOCAB:,}")
    tokenizer = byte_level_bpe({char: i for i, char in enumerate(BYTES)}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=MIN_FREQUENCY, initial_alphabet=BYTES, show_progress=False
    )
    tokenizer.train_from_iterator((long_words or LongWords()).cut(texts), trainer)
    tokenizer.add_special_tokens([AddedToken(ENDOFTEXT, special=True)])
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise UserError(
            f"the text is too small for a vocabulary of {vocab_size}: only {learned} tokens occur at least "
            f"{MIN_FREQUENCY} times; ask for at most {learned}, or give more text"
        )
    return BPETokenizer(tokenizer.to_str(pretty=True))


def byte_tokenizer() -> BPETokenizer:
    """A BPE without merges, 257 tokens: a byte each, which is a character of English text, and `<|endoftext|>` last.

    It is the same for every text and encodes every text; a character beyond ASCII takes two to four tokens.
    """
    tokenizer = byte_level_bpe({char: i for i, char in enumerate(BYTES)}, [])
    tokenizer.add_special_tokens([AddedToken(ENDOFTEXT, special=True)])
    return BPETokenizer(tokenizer.to_str(pretty=True))


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
            for _, (first, last) in self._words.pre_tokenize_str(text[start : end + 1]):  # what follows takes a space
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
