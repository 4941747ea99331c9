"""Invented shards are a data folder like any other."""

from pathlib import Path

import numpy as np
import pytest

from regpt.data.manifest import read_manifest
from regpt.data.rows import ORDERS, open_rows
from regpt.data.verify import wrong_starts, wrong_tokens
from regpt.tools.bench.data import invent_shards, invented_lengths


@pytest.mark.parametrize("vocab_size", [2, 300, 70_000])
def test_they_keep_the_format(tmp_path: Path, vocab_size: int):
    lengths = invented_lengths(200, mean=50)
    total = invent_shards(tmp_path / "data", lengths, vocab_size)
    manifest = read_manifest(tmp_path / "data")
    assert total == manifest.tokens("train") == lengths.sum()
    assert (manifest.documents("train"), manifest.vocab_size, manifest.eot) == (200, vocab_size, vocab_size - 1)
    (shard,) = manifest.shards
    tokens = np.fromfile(tmp_path / "data" / shard.file, dtype=manifest.numpy_dtype)
    starts = np.fromfile(tmp_path / "data" / shard.idx_file, dtype="<i8")
    assert wrong_starts(starts, len(tokens), continued=False) is None
    assert wrong_tokens(tokens, starts, manifest) is None


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_reads_them(tmp_path: Path, order: str):
    invent_shards(tmp_path / "data", invented_lengths(200, mean=50), 300)
    rows = open_rows(tmp_path / "data", read_manifest(tmp_path / "data"), "train", order, 1, 16)
    assert rows.read(0, 8).shape == (8, 17)


def test_frequent_tokens_are_frequent(tmp_path: Path):
    lengths = invented_lengths(100, mean=1000)
    total = invent_shards(tmp_path / "data", lengths, 1001)
    counts = np.bincount(np.fromfile(tmp_path / "data" / "train-00000.bin", dtype="<u2"), minlength=1001)[:1000]
    expected = np.log1p(1 / np.arange(1, 1001)) / np.log(1001) * (total - len(lengths))
    assert np.abs(counts[:20] / expected[:20] - 1).max() < 0.1
    assert lengths.mean() == pytest.approx(1000, rel=0.3)
