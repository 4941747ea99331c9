"""Tokens, rounding, decoding and many ranks by hand, against libraries, the model's own code and counting."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.model import quantize
from regpt.reference import bpe, collectives, decoding, flash, gpt2, rounding
from regpt.text.gpt2 import VOCAB_PACKAGE, byte_characters, find_vocabulary, load_gpt2

VOCABULARY = find_vocabulary(VOCAB_PACKAGE)
SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)

# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_merges_are_learned_by_frequency_and_ties_by_the_smaller_ids():
    assert bpe.train(["aaabdaaabac"], 259) == {(97, 97): 256, (97, 98): 257, (256, 257): 258}
    assert bpe.train(["cd.cd.cd.ab.abx"], 257) == {(99, 100): 256}  # three times in one word against twice in two words
    assert bpe.train(["ab ab"], 1000) == {(97, 98): 256, (32, 256): 257}  # nothing is left to merge


@SETTINGS
@given(st.text())
def test_encoding_and_decoding_give_the_text_and_merges_shorten_it(text):
    merges = bpe.train(["the cat sat on the mat, the rat sat on the cat"], 290)
    ids = bpe.encode(text, merges)
    assert bpe.decode(ids, merges) == text
    assert len(ids) <= len(text.encode())
    assert "".join(bpe.words(text)) == text


@pytest.fixture(scope="module")
def gpt2_merges():
    if VOCABULARY is None:
        pytest.skip("GPT-2's vocabulary files are not installed (extra offline)")
    characters = byte_characters()
    known = {characters[byte]: byte for byte in range(256)}
    merges = {}
    for line in VOCABULARY["vocab.bpe"].read_text(encoding="utf-8").splitlines()[1:]:
        left, right = line.split(" ")
        known[left + right] = merges[known[left], known[right]] = 256 + len(merges)
    return merges


@SETTINGS
@given(text=st.text(st.sampled_from("aeio htsr'DLN12²Ⅷ\t\n\u3000\u00a0éß中🙂.,_-\x1c"), max_size=40))
def test_with_gpt2s_merges_the_tokens_are_gpt2s(text, gpt2_merges):
    tokenizer, spelled = load_gpt2(), bpe.token_bytes(gpt2_merges)
    expected = [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
    assert [spelled[i] for i in bpe.encode(text, gpt2_merges)] == expected


def test_a_page_of_english_has_gpt2s_tokens(gpt2_merges):
    text = (
        "We've trained it's model: 40GB  of Internet text,\n\nand they'll say: don't! I'm sure you're what he'd said.  "
        + bpe.__doc__
    )
    tokenizer, spelled = load_gpt2(), bpe.token_bytes(gpt2_merges)
    assert [spelled[i] for i in bpe.encode(text, gpt2_merges)] == list(
        map(tokenizer.token_bytes, tokenizer.encode(text))
    )


# ---- softmax in one pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_the_softmax_of_one_pass_is_that_of_two_with_any_tile_and_extreme_scores(tile):
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(5, 8)) * 400, rng.normal(size=(8, 3))
    scores[0, :4] = -np.inf
    y, lse = flash.online_softmax_sum(scores, values, tile)
    np.testing.assert_allclose(y, gpt2.softmax(scores) @ values, rtol=1e-12)
    np.testing.assert_allclose(lse[:, 0], torch.tensor(scores).logsumexp(1).numpy(), rtol=1e-14)


def test_tiles_move_fewer_bytes_than_the_scores_take():
    moved = flash.bytes_moved(1024, 64, 128)
    assert moved["usual"] == 2 * (4 * 1024 * 64 + 4 * 1024**2)
    assert moved["tiles"] == 2 * (2 * 1024 * 64 + 2 * 64 * 128 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8))
    assert flash.bytes_moved(100, 64, 64)["tiles"] == 2 * (2 * 100 * 64 + 2 * 64 * (64 + 100))


# ---- rounding --------------------------------------------------------------------------------------------------------

CASTS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("name", CASTS)
def test_rounding_to_a_float_format_is_torchs_cast(name):
    rng = np.random.default_rng(1)
    form = rounding.FLOATS[name]
    scales = np.exp2(rng.integers(form.smallest_exponent - form.mantissa - 2, math.log2(form.largest), 4000))
    x = np.float32(rng.normal(size=4000) * scales).astype(float)  # float32's own, since torch's casts begin there
    ties = 1 + form.epsilon * (np.arange(8) + 0.5)
    x = np.concatenate([x, ties if name != "fp32" else ties[:0], [0.0, form.largest, -form.largest, np.inf]])
    expected = torch.tensor(x, dtype=torch.float32).to(CASTS[name]).double().numpy()
    assert form.largest == torch.finfo(CASTS[name]).max
    keep = np.abs(x) <= form.largest if not form.infinite else np.full(len(x), True)
    np.testing.assert_array_equal(rounding.to_float(x, name)[keep], expected[keep])


def test_beyond_the_largest_number_is_infinity_or_no_number():
    assert rounding.to_float(np.array([70000.0, -70000.0]), "fp16").tolist() == [math.inf, -math.inf]
    assert np.isnan(rounding.to_float(np.array([480.0]), "fp8_e4m3")).all()
    assert rounding.FLOATS["bf16"].epsilon == 2**-7
    assert rounding.to_float(np.array([1 + 2**-11]), "tf32").tolist() == [1.0]


def test_int8_and_nf4_by_hand_are_those_of_the_model():
    w = np.random.default_rng(2).normal(size=(6, 64)).astype(np.float32)
    w[3] = 0
    pieces = quantize.to_int8(torch.tensor(w))
    expected = quantize.from_int8(pieces, 6, 64, torch.float32).numpy()
    np.testing.assert_allclose(rounding.int8_rows(w.astype(float)), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(rounding.nf4_levels(), quantize.NF4, atol=2**-22)  # published in float32
    pieces = quantize.to_nf4(torch.tensor(w))
    expected = quantize.dequantize("nf4", pieces, 6, 64, torch.float32).numpy().ravel()
    by_hand = rounding.nf4(w.astype(float).ravel())  # whose scales are not rounded a second time
    np.testing.assert_allclose(by_hand, expected, atol=0.02)
    scale = np.abs(w).max(1, keepdims=True)
    codes = np.abs(by_hand.reshape(w.shape)[:3, None] / scale[:3, None] - np.array(quantize.NF4)[None, :, None]).argmin(
        1
    )
    stored = pieces["codes"].numpy()
    assert codes.ravel().tolist() == np.stack([stored >> 4, stored & 15], 1).ravel()[: 3 * 64].tolist()


def test_ternary_weights_are_three_numbers_at_the_mean_magnitude():
    w = np.array([0.1, -0.9, 0.3, -0.7])  # mean magnitude 0.5: a weight becomes 0 below 0.25
    assert rounding.ternary(w).tolist() == [0, -0.5, 0.5, -0.5]
    assert rounding.ternary(np.zeros(3)).tolist() == [0, 0, 0]
    assert rounding.bits_a_weight(16, 64, 32) == 4.5
    assert rounding.bits_a_weight(3, 256, 16) == pytest.approx(1.6475, abs=1e-4)


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_filters_leave_the_tokens_that_they_should():
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    for k in (1, 2, 3):
        assert np.isfinite(decoding.top_k(logits, k)).tolist() == [i < k for i in range(4)]
    for p, left in ((0.3, 1), (0.6, 2), (0.8, 3), (1.0, 4)):
        assert np.isfinite(decoding.top_p(logits[::-1], p)).sum() == left
        assert np.isfinite(decoding.top_p(logits[::-1], p))[-left:].all()
    draws = [decoding.next_token(logits, (i + 0.5) / 100) for i in range(100)]
    assert [draws.count(i) for i in range(4)] == [50, 25, 15, 10]
    sharper = [decoding.next_token(logits, (i + 0.5) / 1000, 0.5) for i in range(1000)]
    assert sharper.count(0) / sharper.count(1) == pytest.approx(4, rel=0.02)
    assert decoding.next_token(logits[::-1], 0.0, 0) == 3


def test_attention_with_a_cache_is_attention_over_the_whole():
    q, k, v = np.random.default_rng(3).normal(size=(3, 6, 4))
    whole = gpt2.causal_attention(q[None, None], k[None, None], v[None, None])[0][0, 0]
    cache = []
    for t in range(6):
        np.testing.assert_allclose(decoding.attend_next(q[t], k[t], v[t], cache), whole[t], rtol=1e-12)


@pytest.mark.parametrize("q", [[1, 1, 2, 4], [4, 2, 1, 1], [8, 0, 0, 0], [0, 0, 4, 4]])
def test_speculation_draws_exactly_from_the_large_models_distribution(q):
    p, q = np.array([4, 2, 1, 1]) / 8, np.array(q) / 8
    grids = [(np.arange(n) + 0.5) / n for n in (8, 8, 12)]  # every cell of these has one outcome
    draws = np.bincount([decoding.speculate(p, q, u) for u in itertools.product(*grids)], minlength=4)
    np.testing.assert_allclose(draws / draws.sum(), p, rtol=1e-12)
    accepted = sum(min(1.0, p[x] / q[x]) * q[x] for x in range(4) if q[x])
    assert decoding.accepted_share(p, q) == pytest.approx(accepted, rel=1e-12)


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_ring_collectives_give_sums_parts_and_wholes_and_send_what_they_should(n):
    values = list(np.random.default_rng(4).integers(100, size=(n, 84)).astype(float))
    total = sum(values[1:], values[0])
    scattered = collectives.ring_reduce_scatter(values)
    for part, expected in zip(scattered.values, np.array_split(total, n), strict=True):
        np.testing.assert_array_equal(part, expected)
    for whole in collectives.ring_all_gather(np.array_split(total, n)).values:
        np.testing.assert_array_equal(whole, total)
    reduced = collectives.ring_all_reduce(values)
    assert all((value == total).all() for value in reduced.values)
    assert reduced.sent == 2 * (n - 1) * 84 // n
    assert len(reduced.values) == n


def test_data_parallel_gradients_are_those_of_one_process_with_unequal_counts():
    x = np.random.default_rng(5).normal(size=(10, 4))
    for gradient in collectives.data_parallel([x[:7].sum(0), x[7:].sum(0)], [7, 3]):
        np.testing.assert_allclose(gradient, x.mean(0), rtol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_an_mlp_over_ranks_is_the_mlp_forward_and_backward(n):
    rng = np.random.default_rng(6)
    x, up, down, dy = (
        rng.normal(size=(8, 3)),
        rng.normal(size=(12, 3)),
        rng.normal(size=(3, 12)),
        rng.normal(size=(8, 3)),
    )
    tx, tup, tdown = (torch.tensor(value, requires_grad=True) for value in (x, up, down))
    expected = F.gelu(tx @ tup.T, approximate="tanh") @ tdown.T
    grads = [grad.numpy() for grad in torch.autograd.grad(expected, (tx, tup, tdown), torch.tensor(dy))]
    w = collectives.split_mlp(up, down, n)
    ys, saved = collectives.tensor_parallel(x, w)
    dxs, dw = collectives.tensor_parallel_backward(dy, saved)
    for y, dx in zip(ys, dxs, strict=True):
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(dx, grads[0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(np.concatenate(dw.up), grads[1], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(np.concatenate(dw.down, axis=1), grads[2], rtol=1e-10, atol=1e-13)
    parts = collectives.sequence_parallel(np.array_split(x, n), w)
    np.testing.assert_allclose(np.concatenate(parts.values), expected.detach().numpy(), rtol=1e-10, atol=1e-13)
    assert parts.sent == 2 * (n - 1) * x.size // n  # as one all-reduce


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 2), (4, 8), (3, 1)])
def test_a_pipelines_bubble_is_the_formulas_and_1f1b_keeps_few_activations(stages, micro_batches):
    orders = collectives.one_forward_one_backward(stages, micro_batches)
    total, bubble = collectives.pipeline_time(orders)
    assert bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert total == pytest.approx(3 * (micro_batches + stages - 1))
    for stage, order in enumerate(orders):
        kept = list(itertools.accumulate(1 if task[0] == "F" else -1 for task in order))
        assert max(kept) == min(stages - stage, micro_batches)
        assert kept[-1] == 0
        assert len(order) == 2 * micro_batches


def test_orders_that_wait_for_each_other_are_a_deadlock():
    with pytest.raises(ValueError, match="a deadlock"):
        collectives.pipeline_time([["B0", "F0"], ["F0", "B0"]])
