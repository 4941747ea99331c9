"""Softmax in one pass, and attention by tiles that never writes the (T, T) scores (Dao et al. 2022), in NumPy.

Shapes: T time, D head size; one head, since heads do not see each other.
"""

import math

import numpy as np

from regpt.reference.gpt2 import Array, Saved


def online_softmax_sum(scores: Array, values: Array, tile: int) -> tuple[Array, Array]:
    """softmax(scores)·values in one pass over tiles of the keys (Milakov & Gimelshein 2018); (T, S) times (S, D).

    Of the tiles so far it keeps the maximum m, the sum l = Σ exp(s - m) and o = Σ exp(s - m)·v. A larger maximum m'
    makes all three wrong by the same factor exp(m - m'), so they are multiplied by it and stay right.

    Returns:
        (T, D), and log Σ exp(s) = m + log l of each row (T, 1): all that the backward pass needs.
    """
    T, D = len(scores), values.shape[1]
    m, total, out = np.full((T, 1), -np.inf), np.zeros((T, 1)), np.zeros((T, D))
    for first in range(0, scores.shape[1], tile):
        s, v = scores[:, first : first + tile], values[first : first + tile]
        new = np.maximum(m, s.max(1, keepdims=True))
        safe = np.where(np.isinf(new), 0.0, new)  # a row that has seen nothing but masked scores yet
        shrink, e = np.exp(m - safe), np.exp(s - safe)
        total = shrink * total + e.sum(1, keepdims=True)
        out = shrink * out + e @ v
        m = new
    return out / total, m + np.log(total)


def flash_attention(q: Array, k: Array, v: Array, tile: int = 16) -> tuple[Array, Saved]:
    """Causal attention of one head, q, k, v (T, D): y (T, D), equal to the usual one.

    Tiles of queries pass over tiles of keys; a tile whose keys all lie in the future is skipped, which halves the work.
    Memory is T·D in place of T²: at T = 1024 in 16 bits a head's scores are 2 MiB, its output 128 KiB.
    """
    T, D = q.shape
    y, lse = np.empty_like(q), np.empty((T, 1))
    for row in range(0, T, tile):
        rows = slice(row, min(row + tile, T))
        keys = slice(0, rows.stop)
        scores = q[rows] @ k[keys].T / math.sqrt(D)
        ahead = np.arange(rows.stop)[None, :] > np.arange(rows.start, rows.stop)[:, None]
        y[rows], lse[rows] = online_softmax_sum(np.where(ahead, -np.inf, scores), v[keys], tile)
    return y, (q, k, v, y, lse)


def flash_attention_backward(dy: Array, saved: Saved, tile: int = 16) -> tuple[Array, Array, Array]:
    """dq, dk, dv. The weights were not kept: a tile of them is p = exp(q·kᵀ/√D - lse), computed again from a product.

    In ds = p·(dp - Σ_j p_j·dp_j) the sum goes over all keys, which no tile has; but it is Σ_j p_j·(dy·v_j) = dy·y, a
    number for each query that is known before (Dao et al. 2022, section 3.1).
    """
    q, k, v, y, lse = saved
    T, D = q.shape
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    delta = (dy * y).sum(1, keepdims=True)  # (T, 1)
    for row in range(0, T, tile):
        for col in range(0, row + tile, tile):
            r, c = slice(row, min(row + tile, T)), slice(col, min(col + tile, T))
            s = q[r] @ k[c].T / math.sqrt(D)
            ahead = np.arange(c.start, c.stop)[None, :] > np.arange(r.start, r.stop)[:, None]
            p = np.where(ahead, 0.0, np.exp(s - lse[r]))
            ds = p * (dy[r] @ v[c].T - delta[r]) / math.sqrt(D)
            dq[r] += ds @ k[c]
            dk[c] += ds.T @ q[r]
            dv[c] += p.T @ dy[r]
    return dq, dk, dv


def bytes_moved(T: int, D: int, tile: int, size: int = 2) -> dict[str, int]:
    """Bytes that one head's forward moves to and from memory outside the chip, of `size` each: q, k, v, y once, and the
    usual way writes the scores, reads them, writes the weights and reads them. Tiles read k and v once for each tile of
    queries, of the causal half."""
    ends = range(min(tile, T), T + tile, tile)
    return {
        "usual": size * (4 * T * D + 4 * T * T),
        "tiles": size * (2 * T * D + sum(2 * min(end, T) * D for end in ends if end - tile < T)),
    }
