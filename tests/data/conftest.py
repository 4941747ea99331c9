"""Tiny folders of token shards, written by hand: the format, without the code that prepares it."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest

from regpt.data.manifest import Manifest, Shard

WriteShards = Callable[..., tuple]


@pytest.fixture(scope="session")
def write_shards(tmp_path_factory) -> WriteShards:
    """`write_shards(lengths, cuts=())` → (folder, manifest, tokens): documents of such lengths, shards cut at `cuts`.

    Token i of the split is i + 1 modulo the vocabulary, so a wrong position is a wrong token.
    """

    def write(
        lengths: Sequence[int],
        cuts: Sequence[int] = (),
        *,
        vocab_size: int = 50257,
        split: Literal["train", "val"] = "train",
    ):
        folder = tmp_path_factory.mktemp("shards")
        starts = np.cumsum([0, *lengths])
        tokens = (np.arange(starts[-1]) + 1) % vocab_size
        dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        edges = sorted({0, int(starts[-1]), *(cut for cut in cuts if 0 < cut < starts[-1])})
        shards = []
        for k, (begin, end) in enumerate(pairwise(edges)):
            local = starts[:-1][(starts[:-1] >= begin) & (starts[:-1] < end)] - begin
            shard = Shard(f"{split}-{k:05d}.bin", split, end - begin, len(local), "", "", continues=end not in starts)
            tokens[begin:end].astype(dtype).tofile(folder / shard.file)
            local.astype("<i8").tofile(folder / shard.idx_file)
            shards.append(shard)
        return folder, Manifest("toy", "", vocab_size, 0, dtype, tuple(shards)), tokens

    return write
