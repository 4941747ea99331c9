"""Replies to chat items: written by the engine, judged, counted; through regpt eval into tables, files, page, diff."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import tiny
from regpt.checkpoint.save import Contents, save_checkpoint
from regpt.checkpoint.state import DataPosition, RunState
from regpt.cli.eval import main
from regpt.config import RunConfig
from regpt.data.config import DataConfig
from regpt.engine.processing import SamplingOptions
from regpt.engine.reference import generate_uncached
from regpt.errors import UsageError, UserError
from regpt.evals.chat.suite import ChatSuite, Reply, judge, leaks_role, repetition
from regpt.evals.chat.tasks import ChatOptions, make_items
from regpt.evals.score import Progress, Scorer
from regpt.evals.suite import suite_rows
from regpt.model.config import ModelConfig
from regpt.model.weights import state_tensors
from regpt.parallel.mesh import Mesh
from regpt.report.read import read_run
from regpt.text.bpe import byte_tokenizer
from regpt.text.chat import PLAIN, ChatTemplate
from regpt.text.folder import CHAT

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, max_seq_len=128)
TEMPLATE = ChatTemplate(PLAIN, byte_tokenizer())
OPTIONS = ChatOptions("addition", 2, items=12, tokens=6)


@pytest.fixture(scope="module")
def model():
    model = tiny.make_model(SHAPE).eval()
    tiny.load_weights(model, tiny.InitialWeights(model, 5))
    return model


@contextlib.contextmanager
def silent(name: str) -> Iterator[Progress]:
    yield lambda done, total: None


class Alone(Mesh):
    """A process that sums with nobody."""

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return x


def one_of_mesh(rank: int, size: int) -> Mesh:
    return Alone(rank, size, torch.device("cpu"))


def results(suite: ChatSuite, model, rank: int = 0, size: int = 1, max_items: int = 0):
    mesh = one_of_mesh(rank, size)
    (found,) = suite.evaluate(Scorer(model, mesh), silent, max_items)
    return found


def answering(suite: ChatSuite, texts) -> ChatSuite:
    """The suite with a model that gives these replies, and ends them."""
    encode = TEMPLATE.tokenizer.encode
    suite.replies = lambda scorer, numbers, progress: [Reply(encode(texts[i]), texts[i], True) for i in numbers]
    return suite


def test_replies_are_those_of_the_uncached_loop_until_the_end_of_turn(model):
    template = ChatTemplate(PLAIN, byte_tokenizer())
    suite = ChatSuite(OPTIONS, template)
    scorer = Scorer(model, one_of_mesh(0, 1))
    template.end_of_turn = suite.replies(scorer, [0], lambda done: None)[0].ids[2]  # one that the model writes
    found = suite.replies(scorer, range(12), lambda done: None)
    for prompt, reply in zip(suite.prompts, found):
        text = generate_uncached(model, torch.tensor([prompt]), 6, SamplingOptions(top_k=1), 0)[
            0, len(prompt) :
        ].tolist()
        ended = template.end_of_turn in text
        expected = text[: text.index(template.end_of_turn)] if ended else text
        assert (reply.ids, reply.ended) == (expected, ended)
        assert reply.text == template.tokenizer.decode(expected)
    assert found[0].ended


def test_a_model_that_knows_the_answers_has_all_points_and_ends_by_itself(model):
    items = make_items(OPTIONS, "test")
    texts = [one.answer for one in items]
    texts[3] = "I do not know"
    found = results(answering(ChatSuite(OPTIONS, TEMPLATE), texts), model)
    assert found.outcomes["acc"].tolist() == [1, 1, 1, 0, *[1] * 8]
    assert found.outcomes["ended"].all()
    assert not found.outcomes["role_leak"].any()
    assert found.outcomes["reply_tokens"].tolist() == [len(text) + 1 for text in texts]
    assert (found.task, found.n_items, found.left_out) == ("chat/addition:items=12:tokens=6", 12, 0)


def test_instructions_have_strict_and_loose_scores_by_prompt_and_by_instruction(model):
    options = ChatOptions("ifeval", 2, items=4)
    items = make_items(options, "test")
    texts = [one.answer for one in items]
    texts[1] = ""
    found = results(answering(ChatSuite(options, TEMPLATE), texts), tiny.make_model(longer()))
    for score in ("prompt", "instruction"):
        assert found.outcomes[f"{score}_strict"].tolist() == [1, 0, 1, 1]
        assert found.outcomes[f"{score}_loose"].tolist() == [1, 0, 1, 1]


def longer() -> ModelConfig:
    return ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, max_seq_len=512)


def test_processes_share_the_items_and_their_sum_is_the_result_of_one(model):
    suite = ChatSuite(OPTIONS, TEMPLATE)
    whole = results(suite, model)
    parts = [results(suite, model, rank, 5) for rank in range(5)]
    for metric, values in whole.outcomes.items():
        assert np.array_equal(values, sum(part.outcomes[metric] for part in parts))
    few = results(suite, model, max_items=5)
    assert few.outcomes["reply_tokens"].tolist() == whole.outcomes["reply_tokens"][:5].tolist()


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("4", False),
        ("I am your assistant: yes", False),
        ("4\n\nUser:\nWhat", True),
        ("Assistant: 4", True),
        ("4\nuser\nWhat", True),
        ("<|im_start|>user", True),
        ("4 [INST]", False),
        ("4\n[/INST]", True),
    ],
)
def test_role_words_at_the_start_of_a_line_are_leaks(text, leaks):
    assert leaks_role(Reply(TEMPLATE.tokenizer.encode(text), text, True), TEMPLATE) == leaks


def test_special_tokens_within_a_reply_are_leaks():
    assert leaks_role(Reply([52, 256, 52], "44", True), TEMPLATE)


def test_repetition_is_the_share_of_4_grams_that_occurred_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 7) == 0.75
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 0.2
    item = make_items(OPTIONS, "test")[0]
    assert judge(item, Reply([7] * 7, "", False), TEMPLATE)["reply_tokens"] == 7


def test_questions_longer_than_the_model_are_left_out_or_refused():
    short = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=257, max_seq_len=40))
    with pytest.raises(
        UserError, match=r"every question of chat/addition.* is longer than the 40 tokens that the model"
    ):
        results(ChatSuite(OPTIONS, TEMPLATE), short)
    suite = ChatSuite(ChatOptions("copying", 1, items=12, tokens=2), TEMPLATE)
    lengths = sorted(map(len, suite.prompts))
    assert lengths[0] < lengths[-1]
    fitting = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=257, max_seq_len=lengths[-1]))
    found = results(suite, fitting)
    assert found.left_out == lengths.count(lengths[-1])
    assert len(found.chosen) == 12 - found.left_out


@pytest.fixture(scope="module")
def run(tmp_path_factory, model) -> Path:
    """A run over conversations after two steps, with its template."""
    run = tmp_path_factory.mktemp("runs") / "run"
    save(run / "checkpoints" / "step-00000002", model, {CHAT: PLAIN})
    (run / "config.toml").write_text(RunConfig(model=SHAPE, data=DataConfig(seq_len=128)).to_toml(), encoding="utf-8")
    row = {"kind": "train", "step": 2, "loss": 1.0, "lr": 0.1, "tokens": 8, "time": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return run


def save(folder: Path, model, companions) -> Path:
    state = RunState(2, DataPosition("0" * 64, next_row=0, seq_len=1, order="shuffle", seed=0))
    return save_checkpoint(
        folder, Contents(SHAPE, TEMPLATE.tokenizer, state_tensors(model), {}, state, companions=companions)
    )


def test_the_command_writes_tables_items_and_what_the_report_and_diff_read(run, capsys):
    evals = run / "evals"
    evals.mkdir()
    tasks = "chat:addition:items=6:tokens=4,chat:ifeval:difficulty=1:tokens=4"
    flags = ["--tasks", tasks, "--max-items", "4", "--json", str(evals / "chat.json"), "--items", str(evals)]
    assert main([str(run), "--device", "cpu", *flags]) == 0
    shown = capsys.readouterr().out
    assert "chat/addition:items=6:tokens=4" in shown
    assert "4 of 6" in shown
    report = json.loads((evals / "chat.json").read_text(encoding="utf-8"))["tasks"]
    assert report["chat/ifeval:difficulty=1:tokens=4"]["metrics"].keys() >= {"prompt_strict", "instruction_loose"}
    metrics = report["chat/ifeval:difficulty=1:tokens=4"]["metrics"]
    for metric in ("prompt_strict", "ended", "role_leak"):
        share, n = metrics[metric]["value"], metrics[metric]["n"]
        wilson = binomtest(round(share * n), n).proportion_ci(method="wilson")
        assert metrics[metric]["interval"] == pytest.approx([wilson.low, wilson.high], abs=1e-4)
    assert "interval" not in metrics["reply_tokens"]
    low, high = metrics["ended"]["interval"]
    assert f"{metrics['ended']['value']:.4f} ({low:.4f} to {high:.4f})" in shown
    found = read_run(run)
    ended = next(row for row in found.evals if row["metric"] == "ended")
    assert (ended["step"], ended["n"], ended["task"]) == (2, 4, "chat/addition:items=6:tokens=4")
    lines = (evals / "chat-addition-items=6-tokens=4-step-00000002.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    (evals / "broken.json").write_text("{", encoding="utf-8")
    (evals / "other.json").write_text('{"step": 2, "tasks": {"a": 1, "b": {"metrics": []}}}', encoding="utf-8")
    assert read_run(run).evals == found.evals


def test_a_base_model_is_refused_with_the_way_out(tmp_path, model):
    base = save(tmp_path / "step-00000002", model, {})
    with pytest.raises(UserError, match=r"no chat template, so it was not trained to answer.*regpt finetune RECIPE"):
        main([str(base), "--device", "cpu", "--tasks", "chat:addition"])


def test_training_items_are_written_without_a_model(tmp_path, capsys):
    file = tmp_path / "items.jsonl"
    assert (
        main(["--tasks", "chat:addition:difficulty=1,chat:dates", "--write-train", str(file), "--max-items", "300"])
        == 0
    )
    assert "chat:dates: 300 items\n" in (said := capsys.readouterr().out)
    assert "of 300: there are no more at this difficulty" in said
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert 30 < sum(row["task"] == "addition" for row in rows) <= 55
    test = {one.question for one in make_items(ChatOptions("dates", items=1000), "test")}
    assert not test & {row["prompt"] for row in rows}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tasks", "chat:addition"], "no model was given; regpt eval MODEL --tasks"),
        (["--write-train", "f.jsonl"], "writes items of chat tasks, val has none; give --tasks chat:TASK"),
        (["m", "--tasks", "chat:addition", "--write-train", "f"], "reads no model; leave out 'm'"),
    ],
)
def test_what_does_not_belong_together_is_refused(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        main(args)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*choose another file"):
        main(["--tasks", "chat:dates", "--write-train", str(tmp_path)])


def test_rows_of_metrics_hold_every_metric(model):
    suite = ChatSuite(OPTIONS, TEMPLATE)
    rows = suite_rows(suite, [results(suite, model)])
    assert [row["metric"] for row in rows] == ["acc", "ended", "role_leak", "repetition", "reply_tokens"]
