"""The loss of a model that knows only how often each token occurs: what any language model must beat."""

from collections.abc import Iterable

import numpy as np


def token_counts(chunks: Iterable[np.ndarray], n_vocab: int) -> np.ndarray:
    """(n_vocab,) int64: occurrences of each token id in `chunks`."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for chunk in chunks:
        counts += np.bincount(chunk, minlength=n_vocab)
    return counts


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Mean -ln p of the held-out tokens, in nats; p from the training counts plus one each (Laplace smoothing).

    Both are (n_vocab,) counts.
    """
    log_p = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(held_out * log_p).sum() / held_out.sum())
