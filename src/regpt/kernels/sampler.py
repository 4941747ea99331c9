"""Draws by two Triton kernels instead of some eighty small ones: one pass over the logits for the maxima of groups of
neighbours, then from the groups with the largest maxima the likeliest tokens, temperature, top-k, top-p, min-p, noise,
and the new state of the row.

The reference is `engine.processing.draw`; noise and scores are the same bits, so tokens differ only where top-p's
running sum rounds differently. For rows without penalties, biases and masks, of at most `MOST` candidates.
"""
# pyright: reportIndexIssue=false

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from regpt.kernels.paged import launches_early

MOST = 64  # candidates that are put in order
CHUNK, GROUP, CHUNK_WARPS, ROW_WARPS = 2048, 16, 4, 8
PAD = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below every key


@triton.jit
def finalize(x):
    """`engine.noise.finalize`."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit
def logarithm(x):
    """`engine.noise.logarithm`, by the same operations: a library's would have other last digits."""
    bits = x.to(tl.int64, bitcast=True)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    large = mantissa > 1.4142135623730951
    mantissa = tl.where(large, mantissa * 0.5, mantissa)
    exponent = ((bits >> 52) - 1023 + large.to(tl.int64)).to(tl.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = square * (1 / 13) + (1 / 11)
    series = series * square + (1 / 9)
    series = series * square + (1 / 7)
    series = series * square + (1 / 5)
    series = series * square + (1 / 3)
    series = series * square + 1.0
    return exponent * 0.6931471805599453 + (series * s) * 2.0


@triton.jit
def gumbel_noise(low, high, position, token):
    """`engine.noise.gumbel` of one text's tokens."""
    at = finalize((position * 0x9E3779B1 + 0x5851F42D) & 0xFFFFFFFF)
    first = finalize((finalize(low ^ at) + high) & 0xFFFFFFFF)
    second = finalize((finalize(high ^ 0xA511E9B3) + (low ^ finalize(at ^ 0x2545F491))) & 0xFFFFFFFF)
    bits = finalize(((token * 0x9E3779B1) & 0xFFFFFFFF) ^ first)
    bits = finalize((bits + second) & 0xFFFFFFFF)
    u = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2⁻³²
    return (-logarithm(-logarithm(u))).to(tl.float32)


@triton.jit
def keys_of(x, column, V):
    """Distinct integers in the order of the logits, of equal ones the first token first; PAD outside the vocabulary."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(column < V, (ordered << 32) | (V - 1 - column).to(tl.int64), PAD)


@triton.jit
def groups_kernel(
    logits_ptr, key_ptr, sum_ptr, row_stride, V, CHUNK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr
):
    """The largest key of each GROUP of neighbours; the largest logit, the sum of exponentials and the number of bad
    values of each CHUNK."""
    if PDL:
        gdc_launch_dependents()
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < V
    if PDL:
        gdc_wait()
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    bad = tl.sum((inside & ((x != x) | (tl.abs(x) == float("inf")))).to(tl.int32), 0)
    x = tl.where(x != x, 0.0, x)
    highest = tl.max(x, 0)
    total = tl.sum(tl.where(inside, tl.exp(x - highest), 0.0), 0)
    keys = tl.max(tl.reshape(keys_of(x, column, V), (CHUNK // GROUP, GROUP)), 1)
    to = row * chunks + chunk
    tl.store(key_ptr + to * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP), keys)
    tl.store(sum_ptr + to * 3, highest)
    tl.store(sum_ptr + to * 3 + 1, total)
    tl.store(sum_ptr + to * 3 + 2, bad.to(tl.float32))


@triton.jit
def threshold(keys, K: tl.constexpr):
    """The number that K of the distinct keys reach: by bisection, which stops as soon as it is found. PAD + 1 where
    there are no more than K."""
    real = keys > PAD
    low, high = tl.min(tl.where(real, keys, 0x7FFFFFFFFFFFFFFF), 0), tl.max(keys, 0) + 1
    found = tl.sum(real.to(tl.int64), 0)
    if found <= K:
        low = tl.full((), PAD + 1, tl.int64)
    while found > K:
        half = (low >> 1) + (high >> 1) + (low & high & 1)  # no overflow
        first = (low >> 1) + (half >> 1) + (low & half & 1)
        third = (half >> 1) + (high >> 1) + (half & high & 1)
        # Three counts in one sum: a quarter is left, not a half.
        counts = (keys >= first).to(tl.int64) + ((keys >= half).to(tl.int64) << 20)
        counts = tl.sum(counts + ((keys >= third).to(tl.int64) << 40), 0)
        a, b, c = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
        high = tl.where(c >= K, high, tl.where(b >= K, third, tl.where(a >= K, half, first)))
        low = tl.where(c >= K, third, tl.where(b >= K, half, tl.where(a >= K, first, low)))
        found = tl.where(c >= K, c, tl.where(b >= K, b, tl.where(a >= K, a, found)))
    return low


@triton.jit
def put(values, chosen, to):
    """Write the chosen values to `to` without gaps, for all threads to read; how many there are."""
    chosen = chosen.to(tl.int32)
    tl.store(to + tl.cumsum(chosen, 0) - 1, values, mask=chosen > 0)
    tl.debug_barrier()
    return tl.sum(chosen, 0)


@triton.jit
def likeliest(
    logits_ptr, key_ptr, room_ptr, groups, V, K: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The K largest keys of a row, in order."""
    # The K largest are in the K groups with the largest maxima.
    every, rank = tl.arange(0, KEYS), tl.arange(0, K)
    keys = tl.load(key_ptr + every, mask=every < groups, other=PAD)
    n = put(every.to(tl.int64), keys >= threshold(keys, K), room_ptr)
    group = tl.load(room_ptr + rank, mask=rank < n, other=0)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    given = (rank < n)[:, None] & (columns < V)
    x = tl.load(logits_ptr + columns, mask=given, other=0.0).to(tl.float32)
    x = tl.where(x != x, 0.0, x)
    keys = tl.reshape(tl.where(given, keys_of(x, columns, V), PAD), (K * GROUP,))
    n = put(keys, keys >= threshold(keys, K), room_ptr + K)
    keys = tl.load(room_ptr + K + rank, mask=rank < n, other=PAD)
    # In order: as many are before each as are larger.
    before = (keys[None, :] > keys[:, None]) | ((keys[None, :] == keys[:, None]) & (rank[None, :] < rank[:, None]))
    place = tl.sum(before.to(tl.int32), 1)
    return tl.sum(tl.where(place[:, None] == rank[None, :], keys[:, None], 0), 0)


@triton.jit
def draw_kernel(
    logits_ptr, key_ptr, sum_ptr, room_ptr, state_ptr, out_ptr, chunks, groups, row_stride, state_stride, V,
    K: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * state_stride
    keys = likeliest(
        logits_ptr + row * row_stride, key_ptr + row * groups, room_ptr + row * 2 * K, groups, V, K, GROUP, KEYS
    )
    ids = V - 1 - (keys & 0xFFFFFFFF)  # `keys_of` undone: ids, then values
    ordered = (keys >> 32).to(tl.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    # Columns of a row of `engine.decode.RowState`: token, position, two halves of the seed, then the options.
    position = tl.load(state_ptr + 1) + 1
    temperature = tl.load(state_ptr + 4).to(tl.float64, bitcast=True)
    top_k = tl.load(state_ptr + 5).to(tl.float64, bitcast=True)
    top_p = tl.load(state_ptr + 6).to(tl.float64, bitcast=True)
    min_p = tl.load(state_ptr + 7).to(tl.float64, bitcast=True)
    by = tl.where(temperature > 0, temperature, 1.0)
    by = tl.minimum(tl.maximum(by, 1.1754943508222875e-38), 3.4028234663852886e38).to(tl.float32)
    rank = tl.arange(0, K)
    real = rank < tl.minimum(V, K)
    highest = tl.max(tl.where(real, values, float("-inf")), 0)
    scores = tl.where(real, tl.div_rn(values - highest, by), float("-inf"))
    floor = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf")).to(tl.float32)
    ranked = (rank < tl.where(top_k > 0, top_k, V)) & (scores > float("-inf"))
    shares = tl.where(ranked, tl.exp(scores), 0.0)
    shares = shares / tl.sum(shares, 0)
    before = tl.cumsum(shares, 0) - shares
    p = tl.where(top_p < 1, top_p, 2.0).to(tl.float32)
    kept = ranked & (scores >= floor) & ((before < p) | (rank == 0))
    noise = gumbel_noise(tl.load(state_ptr + 2), tl.load(state_ptr + 3), position, ids)
    scores = tl.where(temperature > 0, scores + noise, scores)
    scores = tl.where(kept, scores, float("-inf"))
    best = tl.max(scores, 0)
    token = tl.min(tl.where(scores == best, ids, V), 0)

    part = tl.arange(0, CHUNKS)
    some = part < chunks
    sums = sum_ptr + (row * chunks + part) * 3
    tops = tl.load(sums, mask=some, other=float("-inf"))
    totals = tl.load(sums + 1, mask=some, other=0.0)
    bad = tl.sum(tl.load(sums + 2, mask=some, other=0.0), 0)
    whole = tl.max(tops, 0)
    log_sum = whole + tl.log(tl.sum(totals * tl.exp(tops - whole), 0))
    chosen = tl.max(tl.where(ids == token, values, float("-inf")), 0)
    tl.store(state_ptr, token)
    tl.store(state_ptr + 1, position)
    tl.store(out_ptr + row * 4, token.to(tl.float64))
    tl.store(out_ptr + row * 4 + 1, (chosen - log_sum).to(tl.float64))
    tl.store(out_ptr + row * 4 + 2, tl.where(bad == 0, 1.0, 0.0).to(tl.float64))
    tl.store(out_ptr + row * 4 + 3, tl.full((), 1.0, tl.float64))


def draw_into(logits: Tensor, state: Tensor, n_vocab: int) -> Tensor:
    """Draw the next token of each row of `state` (B, …) from `logits` (B, V or more): the results of
    `engine.decode.results_of`, and token and position written into `state`."""
    B, chunks, device = len(logits), triton.cdiv(n_vocab, CHUNK), logits.device
    groups, pdl = chunks * (CHUNK // GROUP), launches_early(device)
    keys = torch.empty(B, groups, dtype=torch.int64, device=device)
    sums = torch.empty(B, chunks, 3, device=device)
    room = torch.empty(B, 2 * MOST, dtype=torch.int64, device=device)
    found = torch.empty(B, 4, dtype=torch.float64, device=device)
    groups_kernel[(B, chunks)](
        logits, keys, sums, logits.stride(0), n_vocab, CHUNK=CHUNK, GROUP=GROUP, PDL=pdl, num_warps=CHUNK_WARPS,
        launch_pdl=pdl,
    )  # fmt: skip
    draw_kernel[(B,)](
        logits, keys, sums, room, state, found, chunks, groups, logits.stride(0), state.stride(0), n_vocab, K=MOST,
        GROUP=GROUP, KEYS=triton.next_power_of_2(groups), CHUNKS=triton.next_power_of_2(chunks), PDL=pdl,
        num_warps=ROW_WARPS, enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip
    return found
