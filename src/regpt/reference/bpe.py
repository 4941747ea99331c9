"""Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019, section 2.2): train, encode, decode.

Nothing but the standard library. It is slow, and exact: with GPT-2's merges the tokens are GPT-2's.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

Pair = tuple[int, int]
BYTES = 256  # the first ids, one for each byte: no text is unknown
CONTRACTIONS = "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"
WHITE = frozenset("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(c) for c in range(0x2000, 0x200B)
}
# GPT-2's rule on kinds of characters: letters, numbers or others with a space before, white space but for the one
# that the next word takes, and white space at the end.
WORDS = re.compile(r" ?L+| ?N+| ?O+|[ W]+(?![LNO])|[ W]+")


def kind(character: str) -> str:
    """L a letter, N a number, a space itself, W other white space, O everything else."""
    if character in WHITE:
        return " " if character == " " else "W"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def words(text: str) -> Iterator[str]:
    """The pieces that no merge crosses. Without them `dog.`, `dog!` and `dog?` would become tokens of their own.

    The white space before a word, but for its last character, is a piece; the last one belongs to the word if it is a
    space.
    """
    kinds, at = "".join(map(kind, text)), 0
    while at < len(text):
        short = next((c for c in CONTRACTIONS if text.startswith(c, at)), "")
        found = WORDS.match(kinds, at)
        assert found is not None  # every kind is in one of the alternatives
        end = at + len(short) if short else found.end()
        yield text[at:end]
        at = end


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """`ids` with `new` in place of every `pair`, from the left."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train(texts: Iterable[str], vocab_size: int) -> dict[Pair, int]:
    """Merges in the order in which they were learned, pair → new id: again and again the most frequent pair of
    neighbours becomes a token. Of equally frequent ones the pair of smaller ids."""
    counts = Counter(word for text in texts for word in words(text))
    pieces = {word: list(word.encode()) for word in counts}
    merges: dict[Pair, int] = {}
    for new in range(BYTES, vocab_size):
        pairs: Counter[Pair] = Counter()
        for word, ids in pieces.items():
            for pair in pairwise(ids):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges[best] = new
        pieces = {word: merge(ids, best, new) for word, ids in pieces.items()}
    return merges


def encode(text: str, merges: Mapping[Pair, int]) -> list[int]:
    """Tokens of `text`: in each word, the merge that was learned first is made first. Not the longest token: merges are
    replayed in their order."""
    ids: list[int] = []
    for word in words(text):
        piece = list(word.encode())
        while len(piece) > 1:
            pair = min(pairwise(piece), key=lambda pair: merges.get(pair, float("inf")))
            if pair not in merges:
                break
            piece = merge(piece, pair, merges[pair])
        ids += piece
    return ids


def token_bytes(merges: Mapping[Pair, int]) -> dict[int, bytes]:
    """What each token stands for."""
    known = {byte: bytes([byte]) for byte in range(BYTES)}
    for (left, right), new in merges.items():
        known[new] = known[left] + known[right]
    return known


def decode(ids: Iterable[int], merges: Mapping[Pair, int]) -> str:
    """The text of `ids`. Bytes are joined before they become characters: a character of several bytes may lie in
    several tokens, and half of one is shown as U+FFFD."""
    known = token_bytes(merges)
    return b"".join(known[i] for i in ids).decode("utf-8", errors="replace")
