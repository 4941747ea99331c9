"""Dropout: its masks by another program, its place in the model by hand, its mean; nothing else that is random."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from regpt.data.loader import Loader, dropout_keys
from regpt.errors import UsageError
from regpt.model.config import ModelConfig
from regpt.model.dropout import Dropout
from regpt.model.weights import state_tensors

RATE = 0.3
CONFIG = replace(tiny.CONFIG, dropout=RATE)
KEYS = torch.from_numpy(dropout_keys(7, 40, tiny.N_ROWS).astype(np.int64))


def mixed(x: np.ndarray) -> np.ndarray:
    """Wellons's lowbias32, in 32-bit arithmetic that wraps."""
    x = x.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def kept(shape: tuple[int, ...], site: int) -> Tensor:
    """1 / (1 - RATE) where an element of a tensor of `shape` (B, …, n) is kept, 0 elsewhere; float64."""
    *between, n = shape[1:]
    row = mixed(KEYS.numpy().astype(np.uint32) + np.uint32(site * 0x9E3779B9 % 2**32))
    vector = mixed(row[:, None] ^ np.arange(np.prod(between), dtype=np.uint32))
    bits = mixed(vector[..., None] ^ np.arange(n, dtype=np.uint32)).reshape(shape)
    return torch.from_numpy((bits >= RATE * 2**32) / (1 - RATE))


def by_hand(w: dict[str, Tensor], idx: Tensor, targets: Tensor) -> Tensor:
    """GPT-2's summed loss with dropout where OpenAI's code has it, in plain operations on the weights `w`."""
    (B, T), H = idx.shape, CONFIG.n_head

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return (
            centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]
            + w[name + ".bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def drop(x: Tensor, site: int) -> Tensor:
        return x * kept(tuple(x.shape), site)

    x = drop(w["wte.weight"][idx] + w["wpe.weight"][:T], 0)
    for i in range(CONFIG.n_layer):
        q, k, v = (
            y.view(B, T, H, -1).transpose(1, 2)
            for y in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        )
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads = drop(scores.softmax(-1), 3 * i + 1) @ v
        x = x + drop(linear(heads.transpose(1, 2).reshape(B, T, -1), f"h.{i}.attn.c_proj"), 3 * i + 2)
        inner = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + drop(linear(inner, f"h.{i}.mlp.c_proj"), 3 * i + 3)
    logits = norm(x, "ln_f") @ w["wte.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_loss_and_gradients_are_those_of_the_model_by_hand_with_masks_by_another_program():
    model, (idx, targets) = tiny.build_model(config=CONFIG, pad_vocab=False), tiny.Rows().rows(0)
    weights = {name: w.clone().requires_grad_() for name, w in state_tensors(model).items()}
    expected = by_hand(weights, idx, targets)
    expected.backward()
    loss = tiny.loss_sum(model, idx, targets, dropout_keys=KEYS)
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
    theirs = {name: w.grad for name, w in weights.items() if w.grad is not None} | {"loss": expected.detach()}
    assert tiny.largest_error(ours, theirs) < 1e-12
    assert loss != tiny.loss_sum(model, idx, targets)


def test_without_a_rate_or_without_keys_nothing_changes_bitwise():
    idx, targets = tiny.Rows().rows(0)
    plain = tiny.loss_sum(tiny.build_model(), idx, targets)
    assert tiny.loss_sum(tiny.build_model(), idx, targets, dropout_keys=KEYS).equal(plain)
    assert tiny.loss_sum(tiny.build_model(config=CONFIG).train(), idx, targets).equal(plain)


def test_torchs_generator_is_not_used():
    model, (idx, targets) = tiny.build_model(config=CONFIG), tiny.Rows().rows(0)
    before = torch.get_rng_state()
    tiny.loss_sum(model, idx, targets, dropout_keys=KEYS)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_mean_is_preserved(rate: float):
    keys = torch.from_numpy(dropout_keys(1, 0, 64).astype(np.int64))
    n = 64 * 16 * 1000
    mean = Dropout(rate, keys)(torch.ones(64, 16, 1000, dtype=torch.float64), site=2).mean().item()
    assert abs(mean - 1) < 4 * (rate / (1 - rate) / n) ** 0.5  # standard deviations of n independent draws


def test_rows_sites_and_places_have_masks_of_their_own():
    drop = Dropout(0.5, torch.from_numpy(dropout_keys(1, 0, 40).astype(np.int64)))
    a, b = (drop.dropped(torch.Size((40, 8, 256)), site).double() - 0.5 for site in (1, 2))
    neighbours = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[..., 1:], a[..., :-1])]
    for x, y in neighbours:
        assert abs((x * y).mean().item()) < 4 * 0.25 / x.numel() ** 0.5


def test_keys_follow_from_seed_and_row_alone():
    assert np.array_equal(dropout_keys(3, 10, 4), dropout_keys(3, 8, 8)[2:6])
    assert not set(dropout_keys(3, 0, 100).tolist()) & set(dropout_keys(4, 0, 100).tolist())
    assert dropout_keys(-1, 2**40, 3).max() < 2**32


def test_a_row_has_its_key_whatever_the_rank_the_micro_batch_and_the_step_it_began_at():
    class Numbers:
        seq_len, source, epoch_tokens = 4, "numbers", 10**9

        def read(self, first: int, count: int) -> np.ndarray:
            return np.arange(first, first + count)[:, None].repeat(5, axis=1)

        def epoch_rows(self, limit: int) -> int:
            return limit

    def keys_of_rows(step: int, **changes: int) -> dict[int, int]:
        given = {"batch_tokens": 32, "micro_batch_rows": 2, "dropout_seed": 3} | changes
        batches = Loader(Numbers(), **given).step(step)  # type: ignore[arg-type]
        return {row: key for b in batches for row, key in zip(b.idx[:, 0].tolist(), b.dropout_keys.tolist())}

    whole = keys_of_rows(2)
    assert whole.keys() == set(range(16, 24))
    assert keys_of_rows(2, micro_batch_rows=8) == whole
    assert keys_of_rows(2, dp_rank=0, dp_size=2) | keys_of_rows(2, dp_rank=1, dp_size=2) == whole
    assert keys_of_rows(0, first_row=16) == whole


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_rate_outside_its_range_is_refused(rate: float):
    with pytest.raises(UsageError, match=r"model\.dropout is .*(0 or more|below 1|finite)"):
        ModelConfig(dropout=rate)
