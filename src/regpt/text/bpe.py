"""Train a byte-level BPE on the user's text, and use one that was trained: the `tokenizers` library.

The file format is the library's `tokenizer.json`, so Hugging Face's tools open it too.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from regpt.errors import UserError

ENDOFTEXT = "<|endoftext|>"
MIN_VOCAB = 257  # 256 bytes and <|endoftext|>
MIN_FREQUENCY = (
    2  # a merge seen once is a memory of one place, not of the language (the library's own default for this BPE)
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character a byte (GPT-2's bytes_to_unicode)


class BPETokenizer:
    """A byte-level BPE whose last id is `<|endoftext|>`, as GPT-2's is when trained here.

    `name` is `bpe-<n_vocab>-<first 8 digits of sha256>`: it follows from the file, so it needs no place in it. `sha256`
    is that of tokenizer.json's bytes, which `to_json` returns unchanged.
    """

    def __init__(self, tokenizer_json: str) -> None:
        """
        Raises:
            UserError: not the `tokenizer.json` of a byte-level BPE with `<|endoftext|>` as its only special token.
        """
        self._json = tokenizer_json
        self.sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        vocab, merges, self.eot = parse_json(tokenizer_json)
        self._tokenizer = build(vocab, merges)
        self.n_vocab = self._tokenizer.get_vocab_size()
        self._tokenizer.encode_special_tokens = True  # text that spells <|endoftext|> is only text
        self.name = f"bpe-{self.n_vocab}-{self.sha256[:8]}"

    def encode(self, text: str) -> list[int]:
        return self._encode(text).ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        if threads == 1:
            return [np.array(self._encode(text).ids, dtype=np.uint32) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # the library releases the GIL
            return list(pool.map(lambda text: np.array(self._encode(text).ids, dtype=np.uint32), texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.n_vocab, dtype=np.int64)
        for token, i in self._tokenizer.get_vocab().items():
            lengths[i] = 0 if i == self.eot else len(token)  # one character a byte
        return lengths

    def to_json(self) -> str:
        return self._json

    def _encode(self, text: str):
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates, as a terminal passes bytes that are not UTF-8
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._tokenizer.encode_batch_fast([text])[0]  # unlike `encode`: no offsets, and without the GIL


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A BPE of exactly `vocab_size` tokens: 256 bytes, the merges learned from `texts`, and `<|endoftext|>` last.

    The text is cut into words by GPT-2's pattern; the same texts give the same file.

    Raises:
        UserError: `vocab_size` below 257, or more than the texts have to teach.
    """
    if vocab_size < MIN_VOCAB:
        raise UserError(f"vocabulary size {vocab_size} is too small: a byte-level BPE has at least {MIN_VOCAB} tokens")
    tokenizer = build({char: i for i, char in enumerate(BYTES)}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=MIN_FREQUENCY, initial_alphabet=BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(ENDOFTEXT, special=True)])
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise UserError(
            f"the text is too small for a vocabulary of {vocab_size}: only {learned} tokens occur at least "
            f"{MIN_FREQUENCY} times; ask for at most {learned}, or give more text"
        )
    return BPETokenizer(tokenizer.to_str(pretty=True))


def build(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The library's tokenizer with GPT-2's pre-tokenization; `vocab` may hold `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if ENDOFTEXT in vocab:
        tokenizer.add_special_tokens([AddedToken(ENDOFTEXT, special=True)])
    return tokenizer


def parse_json(text: str) -> tuple[dict[str, int], list[tuple[str, str]], int]:
    """Vocabulary (special token included), merges in order and the id of `<|endoftext|>` of a `tokenizer.json`.

    Everything is checked here because the library says no more than `Exception` about a file that it cannot use.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    require(isinstance(content, dict) and isinstance(content.get("model"), dict), "it describes no tokenizer")
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    require(isinstance(splitter, dict), "its text is not split as GPT-2's is")
    kind = model.get("type", "BPE")  # the file that OpenAI's GPT-2 has on the hub leaves it out
    require(kind == "BPE", f"its model is {kind!r}, not 'BPE'")
    byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    require(byte_level and not splitter.get("add_prefix_space"), "its text is not split as GPT-2's is")
    require(content.get("normalizer") is None, "it changes the text before encoding (a normalizer)")
    special = checked_special(content.get("added_tokens"))
    require(set(special) == {ENDOFTEXT}, f"its special tokens are {sorted(map(str, special))}, not [{ENDOFTEXT!r}]")
    vocab = {**checked_vocab(model.get("vocab")), **special}
    require(sorted(vocab.values()) == list(range(len(vocab))), "its token ids are not 0, 1, 2, …")
    return vocab, checked_merges(model.get("merges"), vocab), special[ENDOFTEXT]


def checked_special(tokens: Any) -> dict[str, int]:
    """Name → id of the special tokens."""
    sound = isinstance(tokens or [], list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in tokens or []
    )
    require(sound, "its special tokens have no names and ids")
    return {token["content"]: token["id"] for token in tokens or []}


def checked_vocab(vocab: Any) -> dict[str, int]:
    require(isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()), "it has no vocabulary")
    require(vocab.keys() >= set(BYTES), "its vocabulary lacks some of the 256 bytes")
    strange = set(itertools.chain.from_iterable(vocab.keys() - {ENDOFTEXT})) - set(BYTES)
    require(not strange, f"its vocabulary has characters that stand for no byte, such as {min(strange, default='')!r}")
    return vocab


def checked_merges(merges: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    require(isinstance(merges, list), "it has no merges")
    pairs: list[Any] = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    sound = all(
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(part, str) and part in vocab for part in pair)
        and "".join(pair) in vocab
        for pair in pairs
    )
    require(sound, "a merge joins tokens that are not in its vocabulary")
    return [(left, right) for left, right in pairs]


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(f"not a byte-level BPE that regpt can use: {otherwise}")
