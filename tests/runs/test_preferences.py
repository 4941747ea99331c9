"""Preferences: `regpt finetune` on pairs of answers, whose loss at the first update is known to the last bit."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F

import tiny
from conversation_files import TUNING, save_byte_model
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.open import open_model
from regpt.cli import export, finetune, train
from regpt.config import read_config
from regpt.data.loader import row_batch
from regpt.data.packed import reference_file
from regpt.errors import UsageError, UserError
from regpt.evals.task import wilson_interval
from regpt.model.ops import IGNORE_INDEX
from regpt.runs.finetune import pair_splits, training_rows
from regpt.train.config import PreferenceConfig
from regpt.train.preference import Preference

FLAGS = [*TUNING, "--checkpoint.every-steps", "3", "--eval.every-steps", "0", "--sample.every-steps", "0"]
FLAGS += ["--sample.max-new-tokens", "4", "--train.compile", "False"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Of two answers the one in capitals is better."""
    rows = []
    for i in range(80):
        asked = [{"role": "user", "content": f"say {i}"}]
        sides = [f"YES {i}" + "!" * (i % 5), f"no {i}"]
        chosen, rejected = ([*asked, {"role": "assistant", "content": side}] for side in sides)
        rows.append({"chosen": chosen, "rejected": rejected})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tune(base: Path, data: Path, run: Path, *flags: str) -> int:
    return finetune.main(["sft-tiny", "--init-from", str(base), "--data", str(data), "--out", str(run), *FLAGS, *flags])


@pytest.fixture(scope="module")
def tuned(base, pairs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert tune(base, pairs, run, "--preference.method", "dpo", "--preference.nll", "0", "--train.steps", "12") == 0
    return run


def test_the_first_loss_is_ln_2_to_the_last_bit_and_pairs_are_learned(tuned, base, capsys):
    rows = tiny.rows_of(tuned, "train")
    assert rows[0]["loss"] == np.float32(math.log(2))
    assert rows[0]["margin"] == 0.0
    assert rows[0]["ranked"] == 0.0
    assert rows[-1]["loss"] < 0.4 < rows[0]["loss"]
    assert rows[-1]["ranked"] > 0.9
    assert rows[-1]["chosen"] - rows[-1]["rejected"] > rows[0]["chosen"] - rows[0]["rejected"] + 5
    found = json.loads((tuned / "preferences.json").read_text())
    assert found["share"] == found["ranked_right"] / found["pairs"] >= 0.9
    assert found["interval"][0] < found["share"] <= found["interval"][1]
    assert found["step"] == 12
    said = json.loads((tuned / "data" / "reference.json").read_text())
    assert said["weights_sha256"] == open_model(str(base)).weights_sha256


def test_validation_is_the_plain_loss_of_both_answers(tuned):
    """Each document alone; not the loss of the method, which is of pairs."""
    rows = dict(pair_splits(read_config(str(tuned / "config.toml"))))["val"]
    model, losses = open_model(str(tuned)).model, []
    batch = row_batch(rows, 0, rows.n_rows)
    assert batch.cu_seqlens is not None
    for begin, end in pairwise(batch.cu_seqlens.tolist()):
        targets = batch.targets.flatten()[begin:end]
        if (targets != IGNORE_INDEX).any():
            logits = model(batch.idx.flatten()[begin:end][None])[0]
            losses += F.cross_entropy(logits, targets, reduction="none")[targets != IGNORE_INDEX].tolist()
    (found,) = tiny.rows_of(tuned, "val")
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_log_probabilities_of_the_reference_that_were_changed_are_refused(tuned, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(tuned, part)
    config = read_config(str(part / "config.toml"))
    config = replace(config, data=replace(config.data, path=str(part / "data")))
    path = reference_file(part / "data", "train")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"train-00000\.reference is not the file that reference\.json next to it describes"
    ):
        pair_splits(config)


def test_a_stopped_run_goes_on_bitwise_and_ends_with_the_same_ranking(tuned, tmp_path, capsys):
    part = tmp_path / "part"
    goes_on_bitwise(tuned, part, (6, 9, 12))
    found = json.loads((tuned / "preferences.json").read_text())
    assert f"{found['ranked_right']} of {found['pairs']} held-out pairs ranked right" in capsys.readouterr().out
    assert json.loads((part / "preferences.json").read_text()) == found


def goes_on_bitwise(whole: Path, part: Path, gone: tuple[int, ...]) -> None:
    """A copy of the run without these checkpoints, resumed, is the run."""
    shutil.copytree(whole, part)
    for step in gone:
        shutil.rmtree(checkpoint_folder(part, step))
    metrics = part / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True)[:4]))
    config = read_config(str(part / "config.toml"))
    assert config.data.path == str(whole / "data")
    assert train.main(["--resume", str(part)]) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        there, here = (checkpoint_folder(run, gone[-1]) / name for run in (whole, part))
        assert there.read_bytes() == here.read_bytes()


def test_a_batch_holds_whole_pairs_whose_documents_are_the_answers(tuned):
    config = read_config(str(tuned / "config.toml"))
    rows = training_rows(config)
    assert rows.paired
    batch = row_batch(rows, 0, 3)
    assert batch.pairs is not None
    assert batch.scored is not None
    assert batch.cu_seqlens is not None
    text = open_model(str(tuned)).tokenizer.decode
    seen = 0
    for chosen, rejected in batch.pairs.tolist():
        if chosen < 0:
            continue
        said = []
        for document in (chosen, rejected):
            part = slice(int(batch.cu_seqlens[document]), int(batch.cu_seqlens[document + 1]))
            scored = batch.scored.flatten()[part]
            said.append(text(scored[scored != IGNORE_INDEX].tolist()))
        assert said[0].strip().startswith("YES")
        assert said[1].strip().startswith("no")
        assert said[0].split()[1].rstrip("!") == said[1].split()[1]
        seen += 1
    assert seen == Preference(open_model(str(tuned)).model, PreferenceConfig("dpo")).units([batch]) >= 3


@pytest.fixture(scope="module")
def judge(base, pairs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("judge") / "run"
    assert tune(base, pairs, run, "--preference.method", "reward", "--train.steps", "9") == 0
    return run


def test_a_model_of_rewards_begins_at_ln_2_and_ranks_held_out_pairs(judge, pairs, tmp_path):
    rows = tiny.rows_of(judge, "train")
    assert rows[0]["loss"] == np.float32(math.log(2))
    assert rows[0]["chosen"] == rows[0]["rejected"] == rows[0]["margin"] == 0.0
    assert rows[-1]["ranked"] > 0.9
    found = json.loads((judge / "preferences.json").read_text())
    assert found["share"] > 0.9 > found["interval"][0]
    assert tiny.rows_of(judge, "val") == []  # the loss of tokens would say nothing of rewards
    with pytest.raises(UserError, match=r"reward_head True, not False"):
        tune(judge, pairs, tmp_path / "run", "--preference.method", "simpo")
    with pytest.raises(UsageError, match=r"is a model of rewards, which no format has"):
        export.main([str(judge), "--out", str(tmp_path / "exported")])


def test_a_reward_is_the_heads_product_with_the_last_token_of_the_answer(judge):
    """Each document alone, up to the token that ends its answer; the loss from Bradley and Terry's probability."""
    rows = training_rows(read_config(str(judge / "config.toml")))
    model = open_model(str(judge)).model.double()
    head = dict(model.named_parameters())["reward_head.weight"]
    objective, batch = Preference(model, PreferenceConfig("reward", nll=0.2)), row_batch(rows, 2, 2)
    assert batch.pairs is not None
    assert batch.cu_seqlens is not None
    loss, extras = objective.loss_sum(batch)
    expected = []
    for pair in batch.pairs.tolist():
        if pair[0] >= 0:
            rewards = []
            for document in pair:
                idx = batch.idx.flatten()[int(batch.cu_seqlens[document]) : int(batch.cu_seqlens[document + 1])]
                end = idx.tolist().index(256, 1)  # the first is the token that begins a text
                rewards.append((model.hidden(idx[None, : end + 1])[0, -1] @ head[0]).item())
            expected.append(rewards)
    chances = [1 / (1 + math.exp(rejected - chosen)) for chosen, rejected in expected]
    assert loss.item() == pytest.approx(-sum(map(math.log, chances)), rel=1e-10)
    assert extras["chosen"].item() == pytest.approx(sum(chosen for chosen, _ in expected), rel=1e-10)


def test_a_stopped_model_of_rewards_goes_on_bitwise(judge, tmp_path):
    goes_on_bitwise(judge, tmp_path / "part", (6, 9))


def by_hand(method: str, sums: np.ndarray, n: np.ndarray, reference: np.ndarray, beta: float, gamma: float) -> float:
    """Loss of one pair from the papers' equations, without the negative log-likelihood."""
    means = sums / n
    ln_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    if method == "dpo":
        return -ln_sigmoid(beta * ((sums - reference)[0] - (sums - reference)[1]))
    if method == "ipo":
        each = (sums - reference) / n
        return (each[0] - each[1] - 1 / (2 * beta)) ** 2
    if method == "simpo":
        return -ln_sigmoid(beta * (means[0] - means[1]) - gamma)
    odds = np.exp(means) / (1 - np.exp(means))
    return -beta * ln_sigmoid(math.log(odds[0] / odds[1]))


@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo"])
@pytest.mark.parametrize("format_tokens", [False, True])
def test_the_loss_is_the_papers_from_sums_over_the_answers_own_tokens(tuned, method, format_tokens):
    """Each document alone through the model in float64, its tokens' log-probabilities added up."""
    rows = training_rows(read_config(str(tuned / "config.toml")))
    model = open_model(str(tuned)).model.double()
    config = PreferenceConfig(method, beta=0.3, nll=0.2, gamma=0.4, format_tokens=format_tokens)
    objective, batch = Preference(model, config), row_batch(rows, 2, 2)
    assert batch.pairs is not None
    assert batch.cu_seqlens is not None
    assert batch.reference is not None
    loss, extras = objective.loss_sum(batch)
    counted = batch.targets if format_tokens else batch.scored
    assert counted is not None
    expected, chosen, pairs = 0.0, 0.0, 0
    for place, documents in enumerate(batch.pairs.tolist()):
        if documents[0] < 0:
            continue
        pairs += 1
        sums, n, nll = [], [], []
        for document in documents:
            part = slice(int(batch.cu_seqlens[document]), int(batch.cu_seqlens[document + 1]))
            targets, mask = batch.targets.flatten()[part], counted.flatten()[part] != IGNORE_INDEX
            logps = model(batch.idx.flatten()[part][None])[0].log_softmax(-1)
            each = logps.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            sums.append(each[mask].sum().item())
            n.append(int(mask.sum()))
            nll.append(-each[targets != IGNORE_INDEX].mean().item())
        reference = batch.reference[place].double().numpy()
        weight = 1.0 if method == "orpo" else 0.2
        expected += by_hand(method, np.array(sums), np.array(n), reference, 0.3, 0.4) + weight * nll[0]
        chosen += sums[0]
    assert pairs == objective.units([batch]) >= 2
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert extras["chosen"].item() == pytest.approx(chosen, rel=1e-10)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_methods_without_a_reference_need_none(base, pairs, tmp_path, method):
    flags = ["--preference.method", method, "--preference.beta", "1", "--train.steps", "30"]
    assert tune(base, pairs, tmp_path / "run", *flags) == 0
    assert not reference_file(tmp_path / "run" / "data", "train").exists()
    rows = tiny.rows_of(tmp_path / "run", "train")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["ranked"] > 0.9


def test_held_out_pairs_are_those_of_the_split(tuned):
    splits = dict(pair_splits(read_config(str(tuned / "config.toml"))))
    assert json.loads((tuned / "preferences.json").read_text())["pairs"] == len(splits["val"].lengths) // 2 > 5
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998's method 3


@pytest.mark.parametrize(
    ("change", "flags", "error", "said"),
    [
        ({"rejected": None}, ["--preference.method", "dpo"], UserError, "rejected"),
        ({"rejected": "chosen"}, ["--preference.method", "dpo"], UserError, "chosen and rejected are equal"),
        ({}, ["--preference.method", "dpo", "--add-tokens"], UsageError, "--add-tokens changes the model that would"),
        ({}, ["--preference.method", "dpo", "--data.seq-len", "32"], UserError, "the pair has .* tokens, more than"),
        ({}, ["--preference.method", "dpo", "--train.kernels", "fused"], UsageError, "preference.method needs plain"),
        ({}, ["--preference.beta", "0"], UsageError, "preference.beta"),
        ({}, ["--preference.method", "reward", "--adapter.r", "2"], UsageError, "reward, whose head is no adapter"),
    ],
)
def test_what_cannot_be_followed_is_one_sentence(base, pairs, tmp_path, change, flags, error, said):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows[3:4]:
        row |= {name: row.get(str(value)) for name, value in change.items()}
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(error, match=said):
        tune(base, data, tmp_path / "run", *flags)
