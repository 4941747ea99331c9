"""Rewards of the model's own replies: a run of GRPO is an ordinary run, whose batches the model writes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.cli import finetune, replay
from regpt.config import read_config
from regpt.data.batch import IGNORE_INDEX
from regpt.engine.engine import Engine
from regpt.errors import UsageError, UserError
from regpt.evals.chat.tasks import chat_options, make_items
from regpt.model.config import ModelConfig
from regpt.parallel.mesh import Mesh
from regpt.report.page import write_report
from regpt.runs import rollouts
from regpt.runs.begin import Run
from regpt.runs.pretrain import resume
from regpt.runs.rollouts import RolloutLoader
from regpt.text.bpe import train_bpe
from regpt.train.grpo import PolicyGradient

TASK = "addition:difficulty=1"
FLAGS = ["--data.seq-len", "32", "--train.batch-tokens", "2048", "--train.micro-batch-rows", "32"]
FLAGS += ["--train.device", "cpu", "--train.precision", "fp32", "--train.compile", "False", "--optim.lr", "0.03"]
FLAGS += ["--train.deterministic", "True", "--optim.warmup-steps", "0", "--eval.every-steps", "0"]
FLAGS += ["--sample.every-steps", "0", "--sample.max-new-tokens", "4", "--grpo.max-new-tokens", "6"]
FLAGS += ["--checkpoint.every-steps", "5", "--checkpoint.keep-last", "0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has learned nothing, of a tokenizer that writes questions with few tokens."""
    items = make_items(chat_options(TASK), "train")
    tokenizer = train_bpe([f"User:\n{item.question}\n\nAssistant:\n" for item in items], 300)
    model = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, max_seq_len=64))
    tiny.load_weights(model, tiny.InitialWeights(model, 5))
    return tiny.save_model(tmp_path_factory.mktemp("base") / "model", model, tokenizer)


def learn(base: Path, run: Path, *flags: str) -> int:
    given = ["--init-from", str(base), "--tasks", f"chat:{TASK}", "--out", str(run)]
    return finetune.main(["grpo-124m", *given, *FLAGS, *flags])


@pytest.fixture(scope="module")
def learned(base, tmp_path_factory) -> Path:
    """Every reply that ends by itself is right: a base that ends one in fifty learns to end. Two updates a rollout."""
    run = tmp_path_factory.mktemp("learned") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rollouts, "check_reply", lambda item, reply: True)
        assert learn(base, run, "--train.steps", "24", "--grpo.updates", "2") == 0
    return run


def test_what_is_rewarded_becomes_likely(learned):
    rows = tiny.rows_of(learned, "train")
    assert rows[0]["reward"] < 0.1
    assert rows[-1]["reward"] == rows[-1]["ended"] > 0.8
    assert rows[-1]["reply_tokens"] < rows[0]["reply_tokens"] - 1
    assert all(0 <= row["groups_alike"] <= 1 and row["rollout_ms"] > 0 for row in rows)
    (grade,) = json.loads((learned / "grades.json").read_text())[f"chat/{TASK}"]
    assert grade["step"] == 24
    assert grade["interval"][0] <= grade["share"] == grade["right"] / grade["items"] <= grade["interval"][1]


def test_rollout_and_training_have_the_same_log_probabilities(learned):
    """To rounding: a cached forward multiplies other shapes than a whole one. The second update of a rollout has other
    weights than drew its replies."""
    rows = tiny.rows_of(learned, "train")
    assert all(row["max_delta_logp"] < 1e-5 for row in rows[::2])
    assert sum(row["max_delta_logp"] > 1e-3 for row in rows[1::2]) > 6
    assert all(row["clipped"] == 0 for row in rows[::2])
    assert any(row["clipped"] > 0 for row in rows[1::2])


def test_a_run_stopped_within_a_rollout_goes_on_bitwise(learned, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "check_reply", lambda item, reply: True)
    part = tmp_path / "part"
    shutil.copytree(learned, part)
    for step in (10, 15, 20, 24):
        shutil.rmtree(checkpoint_folder(part, step))
    metrics = part / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:5]))
    assert resume(part) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        there, here = (checkpoint_folder(run, 24) / name for run in (learned, part))
        assert there.read_bytes() == here.read_bytes()


def test_replay_writes_the_same_replies_again(learned, monkeypatch, capsys):
    monkeypatch.setattr(rollouts, "check_reply", lambda item, reply: True)
    assert replay.main([str(learned), "--step", "14", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == found["recorded"]["loss"]
    assert found["grad_norm"] == found["recorded"]["grad_norm"]
    assert "What is" in found["documents"][0]["text"]


def test_a_report_draws_rewards_and_held_out_questions(learned, tmp_path):
    page = write_report(learned, tmp_path / "report.html").read_text(encoding="utf-8")
    for title in ("Reward", "Length of replies", "Rollout and training", f"chat/{TASK}"):
        assert f'"{title}"' in page


def loader_of(run: Path, **grpo) -> RolloutLoader:
    config = read_config(str(run / "config.toml"))
    config = replace(config, grpo=replace(config.grpo, **grpo))
    opened = Run(config, Mesh(0, 1, torch.device("cpu")))
    tiny.load_weights(opened.model, tiny.InitialWeights(opened.model, 5))
    return RolloutLoader(config, opened.corpus, opened.mesh, opened.model)


def test_a_batch_is_what_was_drawn_and_the_end_is_a_target(learned, monkeypatch):
    monkeypatch.setattr(rollouts, "check_reply", lambda item, reply: True)
    loader = loader_of(learned)
    batch = loader.step(0, 64)[0]
    assert [tuple(x.shape) for x in (batch.idx, batch.advantages, batch.drawn)] == [(64, 32), (64,), (64, 6)]
    end = loader.template.end_of_turn
    for g, (prompt, replies) in enumerate(loader.written[0]):
        for row, one in enumerate(replies, g * 16):
            assert batch.idx[row, : len(prompt) + len(one.ids)].tolist() == [*prompt, *one.ids]
            targets = batch.targets[row][batch.targets[row] != IGNORE_INDEX].tolist()
            assert targets == one.ids
            assert one.reward == (targets[-1] == end)
    assert len({tuple(prompt) for prompt, _ in loader.written[0]}) == 4  # questions
    again = loader_of(learned)
    assert [one.ids for _, each in again.write(0)[0] for one in each] == [
        one.ids for _, each in loader.written[0] for one in each
    ]


def test_groups_without_a_difference_are_asked_something_else_and_left_out(learned, monkeypatch):
    asked = []
    monkeypatch.setattr(rollouts, "check_reply", lambda item, reply: asked.append(item.question) or False)
    loader = loader_of(learned, resample=2)
    monkeypatch.setattr(loader, "reward", lambda item, ids: float(item.operands[0] < 2 and ids[0] % 2))
    parts = loader.write(0)
    kept = [len({one.reward for one in replies}) for part in parts for _, replies in part]
    assert sum(n > 1 for n in kept) > 0
    assert all(n > 1 for n in kept) or len(kept) == 8
    batch = loader.batch_of(parts[0])
    n = len(parts[0]) * 16
    assert (batch.targets[n:] == IGNORE_INDEX).all()
    assert PolicyGradient(loader.model, replace(loader.grpo, loss="grpo"), 6).units([batch]) == n


def test_kept_pages_of_former_weights_are_forgotten(base):
    loader_model = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, max_seq_len=64))
    tiny.load_weights(loader_model, tiny.InitialWeights(loader_model, 5))
    request = rollouts.Request(list(range(40)), 4, seed=3)
    engine = Engine(loader_model, max_rows=2)
    first = engine.run([request])
    tiny.load_weights(loader_model, tiny.InitialWeights(loader_model, 6))
    stale = Engine(loader_model, max_rows=2)
    expected = stale.run([request])
    engine.pages.forget()
    assert engine.pages.n_free == engine.pages.free.count(1) == engine.pages.n_pages
    assert engine.run([request]) == expected != first
    assert engine.stats().cached_tokens == 0


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        (["--tasks", "hellaswag"], UsageError, "grpo.tasks names hellaswag, whose replies no program checks"),
        (["--tasks", "chat:adition"], UsageError, "chat has no task 'adition' .did you mean 'addition'"),
        (["--data", "x.jsonl"], UsageError, "--data and --tasks were given"),
        (["--grpo.replies", "1"], UsageError, "grpo.replies is 1, must be at least 2"),
        (["--grpo.replies", "24"], UsageError, "which 1 × grpo.replies 24 does not divide"),
        (["--grpo.max-new-tokens", "20"], UsageError, "more than data.seq_len 32; set it to 4"),
        (["--grpo.overlong", "6"], UsageError, "grpo.overlong is 6, must be below grpo.max_new_tokens"),
        (["--grpo.max-new-tokens", "1", "--train.batch-tokens", "1024"], UserError, "ended within 1 tokens"),
        (["--train.kernels", "fused"], UsageError, "grpo.tasks needs plain kernels"),
    ],
)
def test_what_cannot_be_followed_is_one_sentence(base, tmp_path, flags, error, said):
    with pytest.raises(error, match=said):
        learn(base, tmp_path / "run", "--train.steps", "1", *flags)


def test_log_probabilities_that_differ_end_the_run(learned):
    loader = loader_of(learned, updates=1)
    assert loader.completed({"step": 1, "max_delta_logp": 9e-4})["step"] == 1
    for wrong in (2e-3, np.nan):
        with pytest.raises(UserError, match=r"differ by .* from those that the replies were drawn with"):
            loader.completed({"step": 1, "max_delta_logp": wrong})
