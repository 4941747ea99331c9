"""Many tensors in few sums: every tensor once, in place, whatever its shape, type and size."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.parallel.reduce import BUCKET_BYTES, buckets, sum_in_buckets


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([torch.float32, torch.float64])), max_size=12))
def test_buckets_hold_every_tensor_once_in_order_and_of_one_type(sizes):
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in sizes]
    limit = 40
    found = list(buckets(tensors, limit))
    assert [id(x) for bucket in found for x in bucket] == [id(x) for x in tensors]
    for bucket in found:
        assert len({x.dtype for x in bucket}) == 1
        assert len(bucket) == 1 or sum(x.nbytes for x in bucket) <= limit
    for one, following in pairwise(found):  # as few as may be: the next tensor would not have fitted
        full = sum(x.nbytes for x in one) + following[0].nbytes > limit
        assert full or one[0].dtype != following[0].dtype


def test_tensors_are_summed_in_place_also_when_they_are_not_contiguous():
    tensors = [
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor(5.0),
        torch.arange(4.0, dtype=torch.float64),
        torch.ones(2, 2),
    ]
    expected = [3 * x for x in tensors]
    sums = []

    def all_reduce(flat: torch.Tensor) -> None:
        sums.append(flat.numel())
        flat *= 3  # as three processes with the same numbers

    sum_in_buckets(tensors, all_reduce)
    assert sums == [7, 4, 4]
    assert all(x.equal(y) for x, y in zip(tensors, expected))


def test_gpt2_is_summed_in_few_collectives():
    tensors = [torch.empty(n, device="meta") for n in [50304 * 768, 1024 * 768] + [768 * 768] * 144]
    assert len(list(buckets(tensors, BUCKET_BYTES))) < 10
