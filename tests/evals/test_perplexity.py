import math

import numpy as np
import pytest
import torch

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.errors import UsageError, UserError
from regpt.evals.perplexity import Validation, batch_losses, count_rows, loss_sums, validation_of
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.train.backend import make_loss_sum

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, max_seq_len=6)
ROWS = 7
CPU = torch.device("cpu")


@pytest.fixture
def model() -> Transformer:
    return initialize(make_model(CONFIG), seed=1).double()


@pytest.fixture
def batch() -> Batch:
    """Seven rows; some targets carry no loss, and unequally many in each row."""
    tokens = torch.randint(0, 11, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : row % 4] = IGNORE_INDEX
    return Batch(tokens[:, :-1].contiguous(), targets)


BYTE_LENGTHS = np.array([1, 2, 3, 1, 1, 4, 1, 2, 5, 7, 0])


def split(batch: Batch, batch_rows: int) -> list[Batch]:
    return [Batch(*parts) for parts in zip(batch.idx.split(batch_rows), batch.targets.split(batch_rows))]


def sum_losses(*args) -> torch.Tensor:
    return loss_sums(batch_losses(*args))


def loss_sum(model: Transformer):
    return make_loss_sum(model, "fp64", CPU, compile=False)


def by_hand(model: Transformer, batch: Batch) -> tuple[float, int, int]:
    """Nats, tokens and bytes, one target at a time, in NumPy."""
    logits = model(batch.idx).detach().numpy()
    nats, tokens, n_bytes = 0.0, 0, 0
    for row, targets in zip(logits, batch.targets.tolist()):
        for scores, target in zip(row, targets):
            if target != IGNORE_INDEX:
                nats += math.log(sum(math.exp(s) for s in scores)) - scores[target]
                tokens += 1
                n_bytes += int(BYTE_LENGTHS[target])
    return nats, tokens, n_bytes


def test_loss_perplexity_and_bits_per_byte_are_their_definitions(model, batch):
    nats, tokens, n_bytes = by_hand(model, batch)
    result = validation_of(sum_losses(loss_sum(model), split(batch, 2), BYTE_LENGTHS, CPU))
    assert result.tokens == tokens < ROWS * 6
    assert result.bytes == n_bytes
    assert result.loss == pytest.approx(nats / tokens, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-12)
    assert result.bpb == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 7, 100])
def test_the_split_into_batches_does_not_matter(model, batch, batch_rows):
    """A mean of batch means would differ: the batches have different numbers of targets."""
    whole = validation_of(sum_losses(loss_sum(model), [batch], BYTE_LENGTHS, CPU))
    parts = validation_of(sum_losses(loss_sum(model), split(batch, batch_rows), BYTE_LENGTHS, CPU))
    assert parts[2:4] == whole[2:4]
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-13)


def test_sums_over_ranks_give_the_whole(model, batch):
    parts = split(batch, 1)
    ranks = [sum_losses(loss_sum(model), parts[rank::3], BYTE_LENGTHS, CPU) for rank in range(3)]
    total = torch.stack(ranks).sum(0)  # what an all-reduce does
    alone = validation_of(sum_losses(loss_sum(model), parts, BYTE_LENGTHS, CPU))
    assert validation_of(total) == pytest.approx(alone, rel=1e-13)


def test_standard_errors_are_those_of_a_ratio_over_batches(model, batch):
    """By hand: residuals of each batch's loss from the mean, batches being the sample."""
    parts = split(batch, 1)
    y = np.array([float(loss_sum(model)(part).detach()) for part in parts])
    targets = [part.targets[part.targets != IGNORE_INDEX].numpy() for part in parts]
    whole = validation_of(sum_losses(loss_sum(model), parts, BYTE_LENGTHS, CPU))
    units = [np.array([len(t) for t in targets]), np.array([BYTE_LENGTHS[t].sum() for t in targets]) * math.log(2)]
    for x, given in zip(units, (whole.stderr, whole.bpb_stderr)):
        m = (units[0] > 0).sum()
        expected = math.sqrt(m * ((y - y.sum() / x.sum() * x) ** 2).sum() / (m - 1)) / x.sum()
        assert given == pytest.approx(expected, rel=1e-9)


def test_a_single_batch_has_no_standard_error(model, batch):
    result = validation_of(sum_losses(loss_sum(model), [batch], BYTE_LENGTHS, CPU))
    assert result.stderr is None
    assert result.bpb_stderr is None


def test_equal_batches_have_no_error(model, batch):
    assert validation_of(sum_losses(loss_sum(model), [batch] * 5, BYTE_LENGTHS, CPU)).stderr == pytest.approx(
        0, abs=1e-7
    )


def test_a_rank_without_batches_adds_nothing(model):
    sums = sum_losses(loss_sum(model), [], BYTE_LENGTHS, CPU)
    assert sums.tolist() == [0.0] * 13
    assert sums.dtype == torch.float64


def test_an_untrained_model_has_the_loss_of_a_guess(model, batch):
    with torch.no_grad():
        model.wte.weight.zero_()
    result = validation_of(sum_losses(loss_sum(model), [batch], None, CPU))
    assert result.loss == pytest.approx(math.log(11), rel=1e-12)
    assert result.perplexity == pytest.approx(11, rel=1e-12)


def test_bits_per_byte_need_byte_lengths(model, batch):
    assert validation_of(sum_losses(loss_sum(model), [batch], None, CPU)).bpb is None
    assert validation_of(sum_losses(loss_sum(model), [batch], np.zeros(11, dtype=np.int64), CPU)).bpb is None


def test_many_small_losses_are_summed_exactly():
    """A running float32 sum of 3000 losses of 50000.1 would already be off by some hundred."""
    one = torch.tensor(50000.1)
    batches = [Batch(torch.zeros(1, 1).long(), torch.zeros(1, 1).long())] * 3000
    assert validation_of(sum_losses(lambda _: one, batches, None, CPU)).loss == pytest.approx(float(one), rel=1e-14)


def test_gradients_and_random_state_stay_untouched(model, batch):
    state = torch.get_rng_state()
    seen = []

    def watched(part: Batch) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return loss_sum(model)(part)

    validation_of(sum_losses(watched, split(batch, 3), None, CPU))
    assert seen == [False] * 3
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_targets_is_a_user_error(model, batch):
    for batches in ([], [batch._replace(targets=torch.full_like(batch.targets, IGNORE_INDEX))]):
        with pytest.raises(UserError, match="no token to evaluate on"):
            validation_of(sum_losses(loss_sum(model), batches, None, CPU))


def test_a_hopeless_loss_has_infinite_perplexity():
    assert Validation(1e4, None, 1, 0).perplexity == math.inf
    assert math.isnan(Validation(math.nan, None, 1, 0).perplexity)


@pytest.mark.parametrize(
    ("split_tokens", "limit", "rows"),
    [(11, 0, 1), (20, 0, 1), (21, 0, 2), (101, 0, 10), (101, 35, 3), (101, 100, 10), (101, 10_000, 10), (101, 10, 1)],
)
def test_only_full_rows_are_counted(split_tokens, limit, rows):
    assert count_rows(split_tokens, 10, limit) == rows


def test_too_few_tokens_are_one_sentence():
    with pytest.raises(UserError, match="the split has 10 tokens and one row needs 11"):
        count_rows(10, 10)
    with pytest.raises(UsageError, match="val-tokens is 9, must be at least one row of 10"):
        count_rows(100, 10, 9)
