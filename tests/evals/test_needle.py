"""A needle in a haystack: prompts token by token, models that copy or see a window only, the heat map."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from regpt.cli.eval import main
from regpt.errors import UsageError, UserError
from regpt.evals.needle import DISTRACTORS, Needle, NeedleOptions, needle_options, own_sentences
from regpt.evals.packing import Prompt
from regpt.evals.score import Cost, Scorer, Scores
from regpt.evals.specs import Spec
from regpt.evals.suite import open_suites, suite_rows
from regpt.evals.task import evaluate_task
from regpt.text.bpe import BPETokenizer, train_bpe

LENGTHS, DEPTHS = (128, 256, 512), (0, 30, 60, 100)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([" ".join(own_sentences()[:200])], 400)


@pytest.fixture(scope="module")
def task(tokenizer) -> Needle:
    return Needle(NeedleOptions(LENGTHS, DEPTHS, items=3), tokenizer, 512)


class Copying:
    """A model that writes what stood after an earlier occurrence of its last tokens, within `window` tokens, or guesses
    that the first ending it is given is wrong."""

    def __init__(self, window: int, last: int = 8):
        self.window, self.last, self.max_seq_len, self.cost = window, last, 512, Cost()

    def __call__(self, prompts: list[Prompt], progress=None) -> Scores:
        found = [self.score(prompt) for prompt in prompts]
        likelihood = np.array([one for some in found for one in some])
        tokens = np.array([len(ending) for prompt in prompts for ending in prompt.endings])
        return Scores(likelihood, tokens, likelihood == 0)

    def score(self, prompt: Prompt) -> list[float]:
        seen, asked = prompt.context[-self.window :], prompt.context[-self.last :]
        for at in range(len(seen) - 2 * self.last + 1):
            if np.array_equal(seen[at : at + self.last], asked):
                after = seen[at + self.last :]
                return [0.0 if np.array_equal(ending, after[: len(ending)]) else -9.0 for ending in prompt.endings]
        return [-9.0 - (k == 0) for k in range(len(prompt.endings))]


def test_a_prompt_has_the_asked_length_and_the_needle_at_the_asked_depth(task, tokenizer):
    assert task.n_items == len(LENGTHS) * len(DEPTHS) * 3
    longest = max(len(tokenizer.encode(f" {one}")) for one in own_sentences())
    for i, (length, depth) in enumerate(task.cells):
        context, endings, scored = task.prompt(i)
        assert len(context) + max(map(len, endings)) == length
        assert scored == [len(ending) for ending in endings]
        text, number = tokenizer.decode(context.tolist()), tokenizer.decode(endings[0].tolist())
        needle = re.search(rf" The secret number of (\w+) is{re.escape(number)}", text)
        assert needle
        assert re.fullmatch(r" \d{5}\.", number)
        assert text.endswith(f". The secret number of {needle[1]} is" if depth != 100 else f"{needle[0]} The secret "
                             f"number of {needle[1]} is")  # fmt: skip
        assert needle.start() == 0 or text[needle.start() - 1] == "."
        at = len(tokenizer.encode(text[: needle.start()]))
        room = length - len(tokenizer.encode(needle[0] + f" The secret number of {needle[1]} is" + number))
        assert abs(at - depth / 100 * room) <= longest / 2 + 4, "half a sentence, and numbers of unequal length"
        others = {tokenizer.decode(ending.tolist()) for ending in endings}
        assert len(others) == 1 + DISTRACTORS
        assert not any(other in text for other in others - {number})


def test_items_are_the_same_every_time_and_differ_from_each_other(task, tokenizer):
    again = Needle(NeedleOptions(LENGTHS, DEPTHS, items=3), tokenizer, 512)
    assert again.items_sha256 == task.items_sha256
    prompts = [task.prompt(i).context.tolist() for i in range(task.n_items)]
    assert prompts == [again.prompt(i).context.tolist() for i in range(task.n_items)]
    assert len({tuple(one) for one in prompts}) == task.n_items


def test_a_model_that_copies_the_needle_has_1_everywhere(task):
    result = evaluate_task(task, Copying(window=512))  # pyright: ignore[reportArgumentType]
    for metric in ("exact", "rank"):
        assert result.outcomes[metric].tolist() == [1.0] * task.n_items
        assert task.by_cell(result, metric)["cells"] == {
            "lengths": [*LENGTHS], "depths": [*DEPTHS], "values": [[1.0] * 3] * 4
        }  # fmt: skip


def test_a_model_that_sees_a_window_has_0_beyond_it(task):
    window = 200
    result = evaluate_task(task, Copying(window))  # pyright: ignore[reportArgumentType]
    values = task.by_cell(result, "exact")["cells"]["values"]
    for depth, row in zip(DEPTHS, values):
        for length, value in zip(LENGTHS, row):
            away = (1 - depth / 100) * length
            if abs(away - window) > 60:  # the needle, its question, and half a sentence
                assert value == (away < window), (length, depth)
    assert {value for row in values for value in row} >= {0.0, 1.0}
    ranks = dict(zip(task.cells, result.outcomes["rank"].tolist()))
    assert ranks[512, 0] == 0.0


def test_a_model_that_prefers_no_number_has_rank_0(task):
    indifferent = Copying(0)
    indifferent.score = lambda prompt: [-9.0] * len(prompt.endings)
    result = evaluate_task(task, indifferent)  # pyright: ignore[reportArgumentType]
    assert {*result.outcomes["rank"].tolist()} == {0.0}


def test_a_part_of_the_items_leaves_cells_empty(task):
    result = evaluate_task(task, Copying(512), max_items=4)  # pyright: ignore[reportArgumentType]
    values = [value for row in task.by_cell(result, "exact")["cells"]["values"] for value in row]
    assert set(values) == {None, 1.0}


def test_a_transformer_is_scored_as_one_ending_after_the_other(tokenizer):
    model = tiny.build_model(config=replace(tiny.CONFIG, vocab_size=400, max_seq_len=128))
    task = Needle(NeedleOptions((100,), (50,), items=4), tokenizer, 128)
    result = evaluate_task(task, Scorer(model, tiny.ALONE))
    for i in range(task.n_items):
        context, endings, _ = task.prompt(i)
        sums = []
        for ending in endings:
            tokens = torch.from_numpy(np.concatenate([context, ending]).astype(np.int64))
            log_p = model(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None])[len(context) - 1 :]
            sums.append(log_p.sum().item())
        assert result.outcomes["rank"][i] == pytest.approx(np.mean([sums[0] > other for other in sums[1:]]))


# ---- options


def test_options_are_read():
    given = needle_options(r"lengths=512/128:depths=50:items=2:text=C:\books\a.txt")
    assert given == NeedleOptions((128, 512), (50,), 2, r"C:\books\a.txt")
    assert needle_options("") == NeedleOptions()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("depth=50", r"no option 'depth', did you mean 'depths'|no option 'depth'"),
        ("depths=1.5", "must be whole numbers"),
        ("depths=101", "0 to 100"),
        ("items=0", "from 1 on"),
        ("lengths=", "must be whole numbers"),
    ],
)
def test_a_wrong_option_is_named(given: str, sentence: str):
    with pytest.raises(UsageError, match=sentence):
        needle_options(given)


@pytest.mark.parametrize("length", [20, 1024])
def test_a_length_that_does_not_fit_is_refused(tokenizer, length: int):
    with pytest.raises(UsageError, match=f"lengths are {length}; .* the model reads 512"):
        Needle(NeedleOptions((length,)), tokenizer, 512)


def test_lengths_default_to_shares_of_the_models(tokenizer):
    assert Needle(NeedleOptions(), tokenizer, 1024).lengths_asked == (128, 256, 512, 1024)
    with pytest.raises(UsageError, match="choose lengths between"):
        Needle(NeedleOptions(), tokenizer, 16)


def test_a_text_of_the_user_is_the_haystack(tokenizer, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("A whale swam. Was it white? It was! ", encoding="utf-8")
    task = Needle(NeedleOptions((200,), (50,), 1, str(book)), tokenizer, 512)
    text = tokenizer.decode(task.prompt(0).context.tolist())
    assert " A whale swam. Was it white? It was! A whale swam." in text
    assert task.items_sha256 != Needle(NeedleOptions((200,), (50,), 1), tokenizer, 512).items_sha256
    book.write_text(" ", encoding="utf-8")
    with pytest.raises(UserError, match="is empty"):
        Needle(NeedleOptions((200,), (50,), 1, str(book)), tokenizer, 512)
    with pytest.raises(UserError, match="cannot be read"):
        Needle(NeedleOptions((200,), (50,), 1, str(tmp_path / "none")), tokenizer, 512)


# ---- rows, the command


def test_rows_of_metrics_hold_the_cells(tokenizer):
    (suite,) = open_suites([Spec("needle", "lengths=128:depths=0/100:items=2")], tokenizer, max_seq_len=128)
    rows = suite_rows(suite, [evaluate_task(suite.tasks[0], Copying(512))])  # pyright: ignore[reportArgumentType]
    assert [(row["task"], row["metric"], row["value"]) for row in rows] == [
        ("needle", "exact", 1.0), ("needle", "rank", 1.0)
    ]  # fmt: skip
    assert json.loads(json.dumps(rows))[0]["cells"] == {"lengths": [128], "depths": [0, 100], "values": [[1.0], [1.0]]}


def test_the_command_prints_a_table_and_writes_the_cells(tokenizer, tmp_path, capsys):
    model = tiny.build_model(config=replace(tiny.CONFIG, vocab_size=400, max_seq_len=128), dtype=torch.float32)
    step = tmp_path / "step"
    tiny.save_model(step, model, tokenizer)
    file = tmp_path / "needle.json"
    tasks = "needle:lengths=100/128:depths=0/100:items=2"
    assert main([str(step), "--tasks", tasks, "--device", "cpu", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"needle rank\W+100 tokens\W+128 tokens", shown)
    assert re.search(r"depth 100 %\W+\d\.\d\d\W+\d\.\d\d", shown)
    report = json.loads(file.read_text(encoding="utf-8"))["tasks"]["needle"]
    assert report["n"] == 8
    assert report["metrics"]["rank"]["cells"]["lengths"] == [100, 128]
