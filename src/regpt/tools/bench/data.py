"""Folders of invented tokens, for a speed that does not depend on the text of a folder."""

import os
import shutil
from pathlib import Path

import numpy as np

from regpt.data.manifest import Manifest, Shard

SHARD_TOKENS = 100_000_000
MEAN_LENGTH = 1000  # tokens a document; web text's is about that (FineWeb-Edu: 10 billion in 9.7 million)
SPREAD = 1.0  # σ of the logarithm of the lengths, as in web text


def invented_lengths(documents: int, mean: int = MEAN_LENGTH) -> np.ndarray:
    """Log-normal lengths of `documents` documents, at least 2 tokens each, always the same."""
    rng = np.random.default_rng(0)
    return np.maximum(2, rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, documents)).astype(np.int64)


def invent_shards(folder: Path, lengths: np.ndarray, vocab_size: int, *, one_text: bool = False) -> int:
    """Write a folder of training shards with documents of these `lengths`; the number of tokens.

    Token ids are as frequent as Zipf's law has it (the probability of id k falls as 1/(k + 1)): what a step
    costs depends a little on how often the same embedding is read. The last id starts every document.

    Args:
        one_text: all shards of full size are one file, so that many of them fit on a disk and into the system's cache.
    """
    folder.mkdir()
    starts = np.cumsum(np.concatenate([[0], lengths]))
    total, eot = int(starts[-1]), vocab_size - 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    rng = np.random.default_rng(1)
    shards = []
    for number, begin in enumerate(range(0, total, SHARD_TOKENS)):
        end = min(total, begin + SHARD_TOKENS)
        local = starts[np.searchsorted(starts, begin) : np.searchsorted(starts[:-1], end)] - begin
        shard = Shard(f"train-{number:05d}.bin", "train", end - begin, len(local), "", "", continues=end not in starts)
        if one_text and number > 0 and shard.tokens == SHARD_TOKENS:
            try:
                os.link(folder / shards[0].file, folder / shard.file)
            except OSError:  # a file system without hard links
                shutil.copyfile(folder / shards[0].file, folder / shard.file)
        else:
            tokens = zipf(rng, shard.tokens, eot).astype(dtype)
            tokens[local] = eot
            tokens.tofile(folder / shard.file)
        local.astype("<i8").tofile(folder / shard.idx_file)
        shards.append(shard)
    manifest = Manifest("invented", "", vocab_size, eot, dtype, tuple(shards))
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return total


def zipf(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """(count,) int32 from [0, n): the logarithm of k + 1 is about uniform, so that k has a share of about 1/(k + 1)."""
    drawn = np.exp(rng.random(count, dtype=np.float32) * np.float32(np.log(n + 1))).astype(np.int32) - 1
    return np.minimum(drawn, max(0, n - 1))  # float32 may round up to n
