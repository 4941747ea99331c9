import json
from pathlib import Path

import numpy as np
import pytest

import tiny
from naive import naive_scores
from regpt.data.order import permutation
from regpt.errors import UserError
from regpt.evals.choices import Choices, Question, largest, open_choices
from regpt.evals.score import Scorer
from regpt.evals.suite import Suite, suite_rows
from regpt.evals.task import (
    SUBSET_SEED,
    Estimate,
    Result,
    estimate,
    evaluate_task,
    refuse_if_nothing_fits,
    truncation_notice,
)
from regpt.text.bpe import BPETokenizer, train_bpe

TEXT = "the cat sat on a mat and dogs ran home in the rain while birds sang"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    """Each byte a token, and a few merges; the model's vocabulary is the same."""
    return train_bpe([" ".join(WORDS * 5)], 280)


@pytest.fixture(scope="module")
def model():
    config = tiny.replace(tiny.CONFIG, vocab_size=280, max_seq_len=64)
    return tiny.build_model(config=config)


def task_of(given: list[Question], tokenizer: BPETokenizer) -> Choices:
    return Choices("mine", given, tokenizer, tokenizer.eot)


def questions(n: int, seed: int = 0) -> list[Question]:
    draw = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS, size=words))

    return [
        Question(
            text(int(draw.integers(0, 6))),
            tuple(f" {text(int(draw.integers(1, 5)))}" for _ in range(int(draw.integers(2, 6)))),
            int(draw.integers(2)),
        )
        for _ in range(n)
    ]


def test_accuracy_is_that_of_one_question_at_a_time(model, tokenizer):
    """The lecture's loop: sums and means of the losses of each ending, the smallest is the prediction."""
    task = task_of(questions(50), tokenizer)
    found = evaluate_task(task, Scorer(model, tiny.ALONE))
    for i, question in enumerate(task.questions):
        losses = []
        for ending in question.endings:
            context = tokenizer.encode(question.context) or [tokenizer.eot]
            tokens = np.array(context + tokenizer.encode(ending))
            logits = model(tiny.torch.from_numpy(tokens)[None, :-1])[0].detach().numpy()
            each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), tokens[1:]]
            losses.append(each[len(context) - 1 :])
        assert found.outcomes["acc"][i] == (np.argmin([x.sum() for x in losses]) == question.label)
        assert found.outcomes["acc_norm"][i] == (np.argmin([x.mean() for x in losses]) == question.label)
    assert not np.array_equal(found.outcomes["acc"], found.outcomes["acc_norm"])
    assert task.baseline == pytest.approx(np.mean([1 / len(q.endings) for q in task.questions]))


def test_prompts_are_context_and_endings_encoded_apart(tokenizer):
    task = task_of([Question("the c", ("at sat", " on"), 0), Question("", (" a", " b"), 0)], tokenizer)
    first, second = task.prompts([0, 1])
    assert first.context.tolist() == tokenizer.encode("the c")
    assert [x.tolist() for x in first.endings] == [tokenizer.encode("at sat"), tokenizer.encode(" on")]
    assert list(first.scored) == [len(x) for x in first.endings]
    assert second.context.tolist() == [tokenizer.eot]


def test_of_equal_endings_the_first_counts():
    assert largest(np.array([1.0, 1.0, 0.0, 2.0, 2.0]), [3, 2]).tolist() == [0, 0]


def test_an_ending_without_a_token_is_an_error(tokenizer):
    with pytest.raises(UserError, match="an ending of item 1 has no token"):
        task_of([Question("a", ("b", "c"), 0), Question("a", ("b", ""), 0)], tokenizer)


# ---- a user's file ---------------------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_spellings_of_a_question_are_read(tmp_path, tokenizer):
    rows = [
        {"ctx": "a", "endings": ["b", "\nc"], "label": 1},
        {"query": "a", "choices": ["b", "\nc"], "gold": "1", "category": "x"},
    ]
    task = open_choices(write(tmp_path / "q.jsonl", *rows), "mine", tokenizer, tokenizer.eot)
    assert task.questions == [Question("a", (" b", "\nc"), 1)] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ctx": "a"}, r"line 2: the item has neither 'endings' nor 'choices'"),
        ({"ctx": "a", "endings": ["b"], "label": 0}, r"line 2: 'endings' holds 1, an item needs at least 2"),
        ({"ctx": "a", "endings": ["b", " "], "label": 0}, r"line 2: 'endings'\[1\] is \" \", must be text that is not"),
        ({"ctx": "a", "endings": ["b", "c"], "label": 2}, r"line 2: 'label' is 2, must be 0 to 1"),
        ({"query": 3, "choices": ["b", "c"], "gold": 0}, r"line 2: 'query' is 3, must be text"),
    ],
)
def test_a_malformed_question_names_its_line(tmp_path, tokenizer, row, said):
    path = write(tmp_path / "q.jsonl", {"ctx": "a", "endings": ["b", "c"], "label": 0}, row)
    with pytest.raises(UserError, match=said):
        open_choices(path, "mine", tokenizer, tokenizer.eot)


# ---- parts and errors ------------------------------------------------------------------------------------------------


def test_a_part_of_a_task_lies_within_a_larger_part(model, tokenizer):
    task = task_of(questions(60), tokenizer)
    scorer = Scorer(model, tiny.ALONE)
    small, large, whole = (evaluate_task(task, scorer, max_items=n) for n in (10, 25, 0))
    assert [len(x.chosen) for x in (small, large, whole)] == [10, 25, 60]
    assert set(small.chosen) < set(large.chosen)
    assert small.chosen.tolist() != list(range(10))
    for part in (small, large):
        for metric, values in part.outcomes.items():
            assert values.tolist() == whole.outcomes[metric][part.chosen].tolist()


def test_items_with_an_ending_longer_than_the_model_are_left_out_and_counted(tokenizer):
    short = tiny.build_model(config=tiny.replace(tiny.CONFIG, vocab_size=tokenizer.n_vocab, max_seq_len=32))
    given = questions(40)
    for i in (3, 7, 30):
        given[i] = given[i]._replace(endings=(*given[i].endings[:1], " x" * 33))
    task, scorer = task_of(given, tokenizer), Scorer(short, tiny.ALONE)
    whole, one = evaluate_task(task, scorer), evaluate_task(task, scorer, max_items=1)
    assert set(range(40)) - set(whole.chosen.tolist()) == {3, 7, 30}
    assert (whole.left_out, whole.estimates()["acc"].n) == (3, 37)
    assert "3 of 40 items of mine have an ending longer than the model's 32 tokens: left out" in truncation_notice(
        [whole], 32
    )
    first = next(i for i in permutation(SUBSET_SEED, 0, 40).tolist() if i not in (3, 7, 30))
    assert one.chosen.tolist() == [first]


def test_a_task_of_which_nothing_fits_has_no_value_and_refuses_no_other(tokenizer):
    short = tiny.build_model(config=tiny.replace(tiny.CONFIG, vocab_size=tokenizer.n_vocab, max_seq_len=32))
    long = task_of([one._replace(endings=(" x" * 33, " y")) for one in questions(3)], tokenizer)
    found = evaluate_task(long, Scorer(short, tiny.ALONE))
    assert (found.left_out, found.estimates()["acc"]) == (3, Estimate(None, None, 0))
    refuse_if_nothing_fits([long, task_of(questions(3), tokenizer)], 32)
    with pytest.raises(UserError, match="every item of mine has an ending longer than the 32 tokens"):
        refuse_if_nothing_fits([long], 32)
    row, _ = suite_rows(Suite("mine", (long,)), [found])
    assert (row["value"], row["n"], row["left_out"]) == (None, 0, 3)


def test_standard_errors_are_lm_evals():
    """lm_eval.api.metrics.mean_stderr: the sample's standard deviation over the root of n."""
    values = np.array([1.0, 0, 0, 1, 1])
    found = estimate(values)
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx((0.6 * 0.4 * 5 / 4) ** 0.5 / 5**0.5)
    assert estimate(np.ones(1)).stderr is None


def test_items_are_written_one_a_line():
    outcomes = {"acc": np.array([1.0, 0.0]), "acc_norm": np.array([1.0, 1.0])}
    one = Result("t", outcomes, np.array([3, 7]), 9, "abcdefghij")
    assert [json.loads(line) for line in one.item_lines().splitlines()] == [
        {"item": "abcdefgh:3", "acc": 1.0, "acc_norm": 1.0},
        {"item": "abcdefgh:7", "acc": 0.0, "acc_norm": 1.0},
    ]


def test_the_hash_of_items_follows_what_is_asked(tokenizer):
    one, same, other = (task_of(q, tokenizer).items_sha256 for q in (questions(5), questions(5), questions(6)))
    assert one == same != other


def test_naive_scores_agree_with_the_packed_ones(model, tokenizer):
    prompts = task_of(questions(20), tokenizer).prompts(range(20))
    found = Scorer(model, tiny.ALONE)(prompts)
    np.testing.assert_allclose(found.log_likelihood, [x for x, _, _ in naive_scores(model, prompts)], rtol=1e-12)
