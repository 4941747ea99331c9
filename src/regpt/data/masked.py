"""Rows of conversations as texts: which tokens are context, which are trained on."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from regpt.data.packed import ConversationRows
from regpt.text.tokenizer import Tokenizer, with_bytes


@dataclass(frozen=True)
class MaskedRow:
    """One row.

    Attributes:
        number: in the run.
        conversations: each as texts with their parts (0 context, 1 answer, 2 format), from left to right.
        trained, tokens, padding: numbers of tokens.
    """

    number: int
    conversations: list[list[tuple[str, int]]]
    trained: int
    tokens: int
    padding: int


def masked_rows(rows: ConversationRows, first: int, count: int, tokenizer: Tokenizer) -> list[MaskedRow]:
    """Rows [first, first + count)."""
    documents, row, _ = rows.layout(first, count)
    found = []
    for k in range(count):
        own = documents[row == k]
        pieces = [(rows.starts[d], rows.starts[d + 1]) for d in own]
        tokens = [rows.corpus.read(np.array([begin]), np.array([end])) for begin, end in pieces]
        parts = [rows.parts[begin:end] for begin, end in pieces]
        said = [texts_of(ids.tolist(), part.tolist(), tokenizer) for ids, part in zip(tokens, parts)]
        n, trained = sum(map(len, tokens)), sum(int(np.count_nonzero(part)) for part in parts)
        found.append(MaskedRow(first + k, said, trained, n, rows.seq_len - n if rows.order != "grouped" else 0))
    return found


def texts_of(ids: list[int], parts: list[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Neighbouring tokens of one part as one text."""
    found = []
    for part, run in groupby(zip(ids, parts), key=lambda pair: pair[1]):
        found.append((with_bytes(b"".join(tokenizer.token_bytes(token) for token, _ in run)), part))
    return found
