"""The model itself: its sizes, its first loss, its tied head, what a position sees."""

import math

import pytest
import torch
import torch.nn.functional as F

import tiny
from plain_cache import KVCache
from regpt.data.batch import Batch
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.masks import AttentionMask
from regpt.model.ops import IGNORE_INDEX
from regpt.model.weights import count_parameters, initialize, state_tensors
from regpt.train.backend import make_loss_sum

T = tiny.CONFIG.max_seq_len
SIZES = {  # n_layer, n_head, n_embd (Radford et al. 2019, table 2), parameters (OpenAI's files)
    "124M": (12, 12, 768, 124_439_808),
    "350M": (24, 16, 1024, 354_823_168),
    "774M": (36, 20, 1280, 774_030_080),
    "1558M": (48, 25, 1600, 1_557_611_200),
}


def tokens(*shape: int, vocab_size: int = tiny.CONFIG.vocab_size, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_openais_models(size: str):
    n_layer, n_head, n_embd, parameters = SIZES[size]
    with torch.device("meta"):
        model = make_model(ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert count_parameters(model) == parameters
    assert model.head_weight.shape == (50304, n_embd)


def test_parameters_have_gpt2s_names():
    names = set(state_tensors(make_model(tiny.CONFIG)))
    inside = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    layers = [f"h.{i}.{part}" for i in range(2) for part in inside] + ["ln_f"]
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {
        "wte.weight",
        "wpe.weight",
    }


def first_loss(config: ModelConfig, rows: int, seq_len: int) -> float:
    """Mean loss of independent random tokens at initialisation."""
    with torch.device("meta"):
        model = make_model(config)
    model = initialize(model.to_empty(device="cpu"), seed=1)
    idx, targets = (tokens(rows, seq_len, vocab_size=config.vocab_size, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        return make_loss_sum(model, "fp32", tiny.CPU, compile=False)(Batch(idx, targets)).item() / targets.numel()


@pytest.mark.parametrize(
    ("config", "rows", "seq_len"), [(tiny.CONFIG, 32, T), (ModelConfig(), 1, 64)], ids=["tiny", "124M"]
)
def test_the_first_loss_is_that_of_a_guess_and_half_the_variance_of_the_logits(config, rows: int, seq_len: int):
    """A logit is a sum of n_embd products of a unit-variance state and a weight from N(0, 0.02): its variance is
    σ² = n_embd·0.02². With normal logits E[exp z] = exp(σ²/2), so log Σ exp z = ln V + σ²/2; the target's own is 0 on
    average.
    """
    expected = math.log(config.vocab_size) + config.n_embd * 0.02**2 / 2
    assert first_loss(config, rows, seq_len) == pytest.approx(expected, abs=0.05)


def test_the_model_answers_for_itself():
    model = tiny.build_model()
    assert (model.device, model.dtype) == (tiny.CPU, torch.float64)
    assert [len(p) for name, p in model.named_parameters() if name in model.padded_names] == [128]
    assert model.get_parameter(model.token_embedding) is model.head_weight
    assert model.get_parameter(model.position_embedding).shape == (T, 24)
    assert list(model.blocks) == list(model.h)
    in_blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert model.matmul_parameters() == in_blocks + 97 * 24
    assert model.matmul_parameters(padded=True) == in_blocks + 128 * 24
    assert model.attention_flops(10) == 12 * 2 * 24 * 10


def test_the_tied_head_is_the_embedding_and_gets_both_gradients():
    model, idx = tiny.build_model(), tokens(2, T)
    assert model.head_weight.data_ptr() == model.wte.weight.data_ptr()
    assert sum(p.data_ptr() == model.wte.weight.data_ptr() for p in model.parameters()) == 1
    targets = tokens(2, T, seed=2).flatten()

    def loss(head: torch.Tensor) -> torch.Tensor:
        return model.ops.linear_cross_entropy(model.hidden(idx).flatten(0, 1), head, targets, 97)

    (tied,) = torch.autograd.grad(loss(model.head_weight), model.wte.weight)
    head = model.head_weight.detach().clone().requires_grad_()
    as_embedding, as_head = torch.autograd.grad(loss(head), (model.wte.weight, head))
    assert as_embedding.norm() > 0.1 * as_head.norm() > 0
    torch.testing.assert_close(tied, as_embedding + as_head, rtol=1e-12, atol=1e-14)


@torch.no_grad()
def test_a_position_sees_itself_and_what_came_before():
    model, idx = tiny.build_model(), tokens(1, T)
    before = model(idx)
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % 97
    after = model(changed)
    assert after[:, :9].equal(before[:, :9])
    assert ((after[:, 9:] - before[:, 9:]).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    model, idx = tiny.build_model(), tokens(3, T)
    torch.testing.assert_close(model(idx)[1:2], model(idx[1:2]), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_positions_count_from_zero_unless_they_are_given():
    model, idx = tiny.build_model(), tokens(2, 5)
    counted = torch.arange(5).expand(2, 5)
    assert model(idx, positions=counted).equal(model(idx))
    shifted = model.wte(idx) + model.wpe.weight[3:8]
    assert not torch.allclose(model(idx, positions=counted + 3), model(idx))
    for block in model.h:
        shifted = block(shifted, None, None)
    torch.testing.assert_close(model.hidden(idx, positions=counted + 3), model.ln_f(shifted), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_documents_packed_into_rows_give_the_logits_they_give_alone():
    model = tiny.build_model()
    lengths = [[5, 1, 10], [16], [7, 9]]  # documents of each row
    idx = tokens(3, T)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    cu_seqlens = torch.tensor([0, *(n for row in lengths for n in row)]).cumsum(0)
    packed = model(idx, positions=positions, cu_seqlens=cu_seqlens)
    for row, parts in enumerate(lengths):
        alone = [model(part[None])[0] for part in idx[row].split(parts)]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_tree_lets_endings_share_a_beginning_in_a_row_longer_than_the_model():
    model = tiny.build_model()
    beginning, endings = tokens(1, 10), tokens(2, 6, seed=2)
    alone = torch.stack([model.hidden(torch.cat([beginning, ending[None]], dim=1))[0] for ending in endings])
    idx = torch.cat([beginning, endings.reshape(1, 12)], dim=1)  # 22 tokens, the model has 16 positions
    positions = torch.cat([torch.arange(16), torch.arange(10, 16)])[None]
    ends = torch.tensor([[22] * 10 + [16] * 6 + [22] * 6])  # the second ending does not see the first
    shared = model.hidden(idx, positions=positions, mask=AttentionMask(tree=ends))[0]
    torch.testing.assert_close(shared[:16], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared[16:], alone[1, 10:], rtol=1e-12, atol=1e-12)


def test_padded_vocabulary_reaches_no_logit():
    padded, real, idx = tiny.build_model(), tiny.build_model(pad_vocab=False), tokens(2, T)
    assert padded.head_weight.shape == (128, 24)
    assert real.head_weight.shape == (97, 24)
    assert padded(idx).shape == (2, T, 97)
    torch.testing.assert_close(padded(idx), real(idx), rtol=1e-12, atol=1e-12)
    state = padded.hidden(idx)[:, -1]
    torch.testing.assert_close(padded.logits(state), real(idx)[:, -1], rtol=1e-12, atol=1e-12)


def test_logits_are_the_head_over_the_hidden_states():
    model, idx = tiny.build_model(pad_vocab=False), tokens(2, 3)
    torch.testing.assert_close(model(idx), F.linear(model.hidden(idx), model.wte.weight))


def test_what_the_model_cannot_read_is_refused():
    model = tiny.build_model()
    with pytest.raises(ValueError, match=r"17 tokens given, the model has 16 positions"):
        model(tokens(1, T + 1))
    with pytest.raises(ValueError, match="give positions that restart"):
        model(tokens(1, 4), cu_seqlens=torch.tensor([0, 4]))
    cache = KVCache(tiny.CONFIG, 1, T, device=tiny.CPU, dtype=torch.float64)
    with pytest.raises(ValueError, match="and no cache"):
        model.hidden(tokens(1, 4), positions=torch.arange(4)[None], cu_seqlens=torch.tensor([0, 4]), cache=cache)
    with pytest.raises(ValueError, match="give positions that restart"):
        model.hidden(tokens(1, 4), mask=AttentionMask(tree=torch.full((1, 4), 4)))


def test_masked_targets_carry_no_loss():
    loss_sum = make_loss_sum(tiny.build_model(), "fp64", tiny.CPU, compile=False)
    idx, targets = tokens(2, T), tokens(2, T, seed=2)
    masked = targets.clone()
    masked[0] = IGNORE_INDEX
    torch.testing.assert_close(loss_sum(Batch(idx, masked)), loss_sum(Batch(idx[1:], targets[1:])), rtol=1e-12, atol=0)
