"""Packed log-likelihoods equal those of one example at a time."""

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import tiny
from naive import naive_scores, random_prompts
from regpt.errors import UserError
from regpt.evals import score
from regpt.evals.packing import Prompt
from regpt.evals.score import HEAD_ROWS, Scorer, Scores, log_probability
from regpt.parallel.mesh import open_mesh
from regpt.train.precision import autocast

V = tiny.CONFIG.vocab_size
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Some of them longer than the model's 16 positions; some contexts continue with their likeliest tokens."""
    given = random_prompts(60, V, longest=20)
    model = tiny.build_model()
    for k in range(0, 60, 7):
        context = given[k].context[-10:]
        likely = []
        for _ in range(3):
            read = torch.from_numpy(np.append(context, likely).astype(np.int64))[None]
            likely.append(int(model(read)[0, -1].argmax()))
        given[k] = Prompt(context, [np.array(likely), np.array([*likely[:2], (likely[2] + 1) % V])], [3, 2])
    return given


@pytest.fixture(scope="module")
def expected(prompts) -> list[tuple[float, int, bool]]:
    return naive_scores(tiny.build_model(), prompts)


def check(scores: Scores, expected: list[tuple[float, int, bool]], tolerance: float) -> None:
    log_likelihood, tokens, greedy = zip(*expected)
    np.testing.assert_allclose(scores.log_likelihood, log_likelihood, rtol=tolerance, atol=tolerance)
    assert scores.tokens.tolist() == list(tokens)
    assert scores.greedy.tolist() == list(greedy)


def test_some_endings_are_greedy_and_some_are_cut(prompts, expected):
    greedy = [g for _, _, g in expected]
    assert 9 <= sum(greedy) < len(greedy) / 2
    assert any(len(p.context) + max(map(len, p.endings)) > 17 for p in prompts)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
@pytest.mark.parametrize("head_rows", [1, 7, 128])
def test_scores_are_those_of_one_example_at_a_time(prompts, expected, batch_tokens: int, head_rows: int, monkeypatch):
    monkeypatch.setitem(HEAD_ROWS, "cpu", head_rows)
    check(Scorer(tiny.build_model(), tiny.ALONE, batch_tokens=batch_tokens)(prompts), expected, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_less_precise_formats_stay_within_bounds(prompts, expected, dtype: torch.dtype, tolerance: float):
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    model = tiny.build_model(dtype=torch.float32)
    found = Scorer(model, tiny.ALONE, autocast=lambda: autocast(precision, tiny.CPU))(prompts)
    error = np.abs(found.log_likelihood - [x for x, _, _ in expected]) / found.tokens
    assert error.max() <= tolerance


def test_of_a_large_vocabulary_few_places_have_logits_at_once(prompts, expected, monkeypatch):
    monkeypatch.setattr(score, "LOGITS", 7 * 128 + 100)
    scorer = Scorer(tiny.build_model(), tiny.ALONE)
    seen, head = [], scorer.head

    def watched(hidden: torch.Tensor, targets: torch.Tensor):
        seen.append(len(hidden))
        return head(hidden, targets)

    scorer.head = watched
    check(scorer(prompts), expected, 1e-12)
    assert max(seen) == 7


@pytest.mark.parametrize(("kind", "rows"), [("cuda", 4096), ("cpu", 512)])
def test_gpt2_s_vocabulary_is_scored_by_as_many_places_as_before(kind: str, rows: int):
    assert min(HEAD_ROWS[kind], score.LOGITS // 50304) == rows


def test_gradients_are_neither_computed_nor_needed(prompts):
    model = tiny.build_model()
    Scorer(model, tiny.ALONE)(prompts)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nothing_gives_nothing():
    scores = Scorer(tiny.build_model(), tiny.ALONE)([])
    assert [len(x) for x in scores] == [0, 0, 0]


def test_progress_counts_every_item_once(prompts):
    seen = []
    Scorer(tiny.build_model(), tiny.ALONE, batch_tokens=64)(prompts, lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}


def test_damaged_weights_are_an_error(prompts):
    model = tiny.build_model()
    model.wte.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="not a number"):
        Scorer(model, tiny.ALONE)(prompts)


def test_contexts_are_computed_once(prompts):
    scorer = Scorer(tiny.build_model(), tiny.ALONE)
    scorer([Prompt(np.arange(10), [np.arange(4)] * 4, [4] * 4)])
    assert scorer.cost.tokens == 10 + 4 * 3


def test_too_little_memory_halves_the_batches(prompts, expected):
    scorer = Scorer(tiny.build_model(), tiny.ALONE, batch_tokens=2048)
    hidden, sizes = scorer.hidden, []

    def limited(idx: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        sizes.append(idx.numel())
        if idx.numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden(idx, *more)

    scorer.hidden = limited
    check(scorer(prompts), expected, 1e-12)
    assert scorer.batch_tokens == 512
    before = len(sizes)
    check(scorer(prompts), expected, 1e-12)
    assert max(sizes[before:]) <= 600  # without another failure
    scorer.hidden = lambda *args: limited(torch.empty(1000))
    with pytest.raises(UserError, match="out of memory; evaluate on a device with more memory"):
        scorer(prompts)


def test_of_equally_likely_tokens_the_first_is_the_likeliest():
    logits = torch.tensor([[1.0, 3, 3, 0]] * 4)
    log_p, hit = log_probability(logits, torch.arange(4))
    assert hit.tolist() == [False, True, False, False]
    torch.testing.assert_close(log_p, logits[0].log_softmax(0))


def score_in_a_process(prompts: list[Prompt], batch_tokens: int) -> list[list[float]]:
    with open_mesh("cpu") as mesh:
        return [x.tolist() for x in Scorer(tiny.build_model(), mesh, batch_tokens=batch_tokens)(prompts)]


def test_processes_share_the_work_and_get_the_same_scores(prompts, expected):
    for log_likelihood, tokens, greedy in tiny.in_processes(3, score_in_a_process, prompts, 64):
        check(Scores(np.array(log_likelihood), np.array(tokens), np.array(greedy)), expected, 1e-12)


@pytest.mark.slow
@needs_compiler
@tiny.IMPORTS_COMPILER
def test_compiled_functions_give_the_same_and_are_compiled_once(prompts, expected):
    torch._dynamo.reset()
    counters.clear()
    scorer = Scorer(tiny.build_model(), tiny.ALONE, compile=True, batch_tokens=2048)
    for part in (prompts, prompts[:13], prompts):
        found = scorer(part)
    check(found, expected, 1e-12)
    assert counters["stats"]["unique_graphs"] == 2  # the hidden states and the head, whatever the number of items
    assert scorer.cost.compile_seconds > 0


@pytest.mark.slow
@needs_compiler
@tiny.IMPORTS_COMPILER
def test_a_compiled_training_step_is_not_compiled_again_for_an_evaluation_in_between(prompts):
    curves = []
    for evaluating in (False, True):
        torch._dynamo.reset()
        counters.clear()
        trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(micro_batch_rows=4), compile=True)
        scorer = Scorer(trainer.model, tiny.ALONE, compile=True, batch_tokens=1024)
        curve = []
        for _ in range(4):
            curve.append(tiny.update(trainer)["loss"])
            if evaluating:
                scorer(prompts)
        curves.append(curve)
        assert counters["stats"]["unique_graphs"] == (3 if evaluating else 1)
    assert curves[0] == curves[1]
