"""Rejection sampling: `regpt sample --best-of K --reward RUN|chat:TASK --write FILE`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_grpo import base as base

import tiny
from conversation_files import save_byte_model
from regpt.checkpoint.open import open_model
from regpt.checkpoint.save import Contents, save_checkpoint
from regpt.checkpoint.state import DataPosition, RunState
from regpt.cli import finetune, sample
from regpt.errors import UsageError, UserError
from regpt.evals.chat.tasks import chat_options, make_items
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import state_tensors
from regpt.prepare.conversations import ConversationReader
from regpt.runs import rejection
from regpt.runs.rejection import template_of
from regpt.text.bpe import train_bpe
from regpt.text.chat import CONTEXT, PLAIN
from regpt.text.folder import CHAT

TASK = "chat:addition:difficulty=1:items=20"
PROMPTS = ["What is 1 + 2?", "Say ba", "Which one?", "And now?", "Why?"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A model that has learned nothing, but that each token ends a reply with a chance of about a quarter."""
    items = make_items(chat_options("addition:difficulty=1"), "train")
    tokenizer = train_bpe([f"User:\n{item.question}\n\nAssistant:\n" for item in items], 300)
    model = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, max_seq_len=64))
    weights = dict(tiny.InitialWeights(model, 5))
    end = weights["wte.weight"][tokenizer.eot]
    weights["ln_f.bias"] = math.log(100) * end / end.square().sum()
    tiny.load_weights(model, weights)
    state = RunState(3, DataPosition("0" * 64, next_row=0, seq_len=1, order="shuffle", seed=0))
    contents = Contents(model.config, tokenizer, state_tensors(model), {}, state, companions={CHAT: PLAIN})
    return save_checkpoint(tmp_path_factory.mktemp("writer") / "model", contents)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    rows = [{"prompt": f"say {i}", "chosen": f"{i % 10}aa", "rejected": f"bb{i % 7}"} for i in range(60)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def train_judge(start: Path, pairs: Path, run: Path, *flags: str) -> Path:
    given = ["reward-124m", "--init-from", str(start), "--data", str(pairs), "--out", str(run), "--epochs", "2"]
    own = ["--train.device", "cpu", "--train.precision", "fp32", "--train.compile", "False", "--optim.lr", "0.01"]
    own += ["--data.seq-len", "64", "--train.batch-tokens", "512", "--train.micro-batch-rows", "8"]
    assert finetune.main([*given, *own, "--sample.max-new-tokens", "4", "--val-fraction", "0", *flags]) == 0
    return run


@pytest.fixture(scope="module")
def judge(writer, pairs, tmp_path_factory) -> Path:
    return train_judge(writer, pairs, tmp_path_factory.mktemp("judge") / "run")


def keep(writer: Path, file: Path, *flags: str) -> list[dict]:
    given = ["--best-of", "6", "--write", str(file), "--max-new-tokens", "6", "--top-k", "0", "--device", "cpu"]
    assert sample.main([str(writer), *given, *flags]) == 0
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def asked(folder: Path) -> list[str]:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return ["--prompts", str(path)]


def test_right_replies_are_kept_as_conversations_with_their_origin(writer, tmp_path, monkeypatch, capsys):
    right = lambda item, reply: item.operands[0] % 2 == 0 and len(reply) % 2 == 0  # noqa: E731
    monkeypatch.setattr(rejection, "check_reply", right)
    rows = keep(writer, tmp_path / "best.jsonl", "--reward", TASK)
    assert 3 < len(rows) < 20
    assert f"the best of 6 replies to {len(rows)} of 20 prompts" in capsys.readouterr().out
    for row in rows:
        reply = row["messages"][1]["content"]
        assert len(reply) % 2 == 0
        assert row["scores"][row["kept"]] == row["score"] == max(x for x in row["scores"] if x is not None) == 1
        assert len(row["scores"]) == row["made"]["best_of"] == 6
        assert row["made"]["model_sha256"] == open_model(str(writer)).weights_sha256
        assert (row["made"]["top_k"], row["made"]["seed"], row["made"]["reward"]) == (0, 1337, TASK)
    read = list(ConversationReader([tmp_path / "best.jsonl"]))
    assert [one.messages for one in read] == [row["messages"] for row in rows]


def test_a_killed_command_goes_on_after_its_last_whole_line(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "check_reply", lambda item, reply: len(reply) % 2 == 0)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    keep(writer, whole, "--reward", TASK)
    content = whole.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    judged, again = [], rejection.choose
    monkeypatch.setattr(rejection, "choose", lambda number, *rest: judged.append(number) or again(number, *rest))
    keep(writer, part, "--reward", TASK)
    assert part.read_bytes() == content
    assert min(judged) > 0  # what was done is not done again
    with pytest.raises(UserError, match=r"line 1 of .* was written with other settings \(seed\)"):
        keep(writer, whole, "--reward", TASK, "--seed", "3")


def test_a_model_of_rewards_judges_whole_replies(writer, judge, tmp_path):
    rows = keep(writer, tmp_path / "best.jsonl", "--reward", str(judge), *asked(tmp_path))
    assert [row["number"] for row in rows] == list(range(len(PROMPTS)))
    opened = open_model(str(judge))
    template = template_of(opened)
    for row in rows:
        given = [x for x in row["scores"] if x is not None]
        assert row["score"] == max(given)
        ids, parts, _ = template.encode_training(row["messages"])
        end = int(np.flatnonzero(parts != CONTEXT)[-1])
        hidden = opened.model.hidden(torch.from_numpy(ids.astype("int64"))[None, : end + 1])
        assert opened.model.rewards(hidden[0, -1]).item() == pytest.approx(row["score"], abs=1e-5)
        assert row["made"]["reward_sha256"] == opened.weights_sha256
    assert any(max(given) > min(given) for given in [[x for x in row["scores"] if x is not None] for row in rows])


def test_a_reward_of_nan_is_one_sentence(writer, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(Transformer, "rewards", lambda self, hidden: torch.full(hidden.shape[:-1], torch.nan))
    with pytest.raises(UserError, match=r"the reward of reply 1 to prompt \d is nan: the weights of"):
        keep(writer, tmp_path / "best.jsonl", "--reward", str(judge), *asked(tmp_path))


def test_a_judge_of_another_tokenizer_or_template_is_refused(writer, pairs, tmp_path):
    base = save_byte_model(tmp_path / "bytes")
    other = train_judge(
        base, pairs, tmp_path / "other", "--train.steps", "1", "--data.seq-len", "128", "--train.batch-tokens", "1024"
    )
    with pytest.raises(UserError, match=r"has another tokenizer"):
        keep(writer, tmp_path / "best.jsonl", "--reward", str(other), *asked(tmp_path))
    written = tmp_path / "template.jinja"
    written.write_text(template_of(open_model(str(writer))).source.replace("Assistant", "Model"))
    other = train_judge(writer, pairs, tmp_path / "another", "--train.steps", "1", "--template", str(written))
    with pytest.raises(UserError, match=r"was trained with another chat template"):
        keep(writer, tmp_path / "best.jsonl", "--reward", str(other), *asked(tmp_path))


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        (["--reward", "chat:adition"], UsageError, "chat has no task 'adition'"),
        (["--reward", TASK, "--prompts"], UsageError, "asks the task's own questions; leave out --prompts"),
        (["--reward", "WRITER"], UsageError, "no prompts were given"),
        (["--reward", "WRITER", "--prompts"], UserError, "is a model without a head for rewards"),
        ([], UsageError, "--reward is missing"),
        (["--reward", TASK, "--best-of", "1"], UsageError, "best-of is 1, must be at least 2"),
        (["--reward", TASK, "--json"], UsageError, "--json does not go with --best-of"),
    ],
)
def test_what_cannot_be_followed_is_one_sentence(writer, tmp_path, flags, error, said):
    flags = [str(writer) if flag == "WRITER" else flag for flag in flags]
    flags += asked(tmp_path)[1:] if "--prompts" in flags else []
    with pytest.raises(error, match=said):
        keep(writer, tmp_path / "best.jsonl", *flags)
    assert not (tmp_path / "best.jsonl").exists()
