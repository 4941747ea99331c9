"""Sums of many tensors over processes in few collectives."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BUCKET_BYTES = 64 * 2**20  # large enough for full bandwidth, small next to the gradients


def sum_in_buckets(tensors: Sequence[Tensor], all_reduce: Callable[[Tensor], object]) -> None:
    """Apply `all_reduce` to every tensor in place, through contiguous buckets of about 64 MiB.

    The buckets depend on the tensors' order and sizes only, so the order of additions is the same in every run.
    """
    for bucket in buckets(tensors, BUCKET_BYTES):
        flat = torch.cat([x.reshape(-1) for x in bucket])
        all_reduce(flat)
        parts = flat.split([x.numel() for x in bucket])
        for x, part in zip(bucket, parts):
            x.copy_(part.view_as(x))


def buckets(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, together at most `limit` bytes (or one tensor that is larger)."""
    bucket: list[Tensor] = []
    for x in tensors:
        size = sum(y.nbytes for y in bucket)
        if bucket and (size + x.nbytes > limit or x.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket
