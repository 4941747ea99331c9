"""`regpt finetune`: an ordinary run over conversations, from reading them to the model that answers."""

import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

import regpt
import tiny
from conversation_files import TUNING
from hub_server import Server
from regpt.checkpoint.load import checkpoint_folder, checkpoints
from regpt.checkpoint.open import open_model
from regpt.cli import data_info, export, finetune, plan, replay, train
from regpt.cli import eval as evaluate
from regpt.config import read_config
from regpt.data.info import first_texts
from regpt.data.manifest import read_manifest
from regpt.data.verify import verify
from regpt.engine.generate import Sample
from regpt.errors import UsageError, UserError
from regpt.model.config import ModelConfig
from regpt.prepare.conversation_shards import ConversationOptions, prepare_conversations
from regpt.prepare.conversations import ConversationReader
from regpt.report.page import write_report
from regpt.runs import actions
from regpt.runs.pretrain import resume
from regpt.text.bpe import byte_tokenizer
from regpt.text.chat import ANSWER, CHATML, PLAIN, ChatTemplate

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, max_seq_len=128)
FLAGS = [*TUNING, "--checkpoint.every-steps", "2", "--eval.every-steps", "4", "--sample.max-new-tokens", "8"]


def tune(base: Path, answers: Path, run: Path, *flags: str) -> int:
    given = ["--init-from", str(base), "--data", str(answers), "--out", str(run)]
    return finetune.main(["sft-tiny", *given, *FLAGS, *flags])


@pytest.fixture(scope="module")
def tuned(base, answers, tmp_path_factory) -> Path:
    """Eight updates in one piece; read only."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert tune(base, answers, run, "--train.steps", "8") == 0
    return run


def test_the_run_is_an_ordinary_one_over_shards_of_its_own(tuned, answers):
    config, manifest = read_config(str(tuned / "config.toml")), read_manifest(tuned / "data")
    assert (config.data.order, config.data.path, config.train.steps) == ("packed", str(tuned / "data"), 8)
    assert verify(tuned / "data") == []
    assert manifest.documents("train") + manifest.documents("val") == len(list(ConversationReader([answers])))
    assert manifest.documents("val") > 0
    losses = [row["loss"] for row in tiny.rows_of(tuned, "train")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5


def test_conversations_at_an_address_are_downloaded_and_named_in_the_manifest(base, answers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Server(tmp_path)
    shutil.copytree(answers.parent, server.root / "name")
    url = f"{server.address}/owner/name/resolve/main/{answers.name}"
    try:
        given = ["--init-from", str(base), "--data", url, "--out", str(tmp_path / "run"), *FLAGS]
        assert finetune.main(["sft-tiny", *given, "--look", "1"]) == 0
    finally:
        server.stop()
    (source,) = read_manifest(tmp_path / "run" / "data").sources
    assert (source["url"], source["format"]) == (url, "instruction, input, output")
    with pytest.raises(UsageError, match=r"--out s3://bucket/run is an address; give a path"):
        finetune.main(["sft-tiny", "--init-from", str(base), "--data", str(answers), "--out", "s3://bucket/run"])


def test_epochs_become_steps(base, answers, tmp_path, capsys):
    assert tune(base, answers, tmp_path / "run", "--epochs", "1.5", "--sample.every-steps", "0") == 0
    rows = tiny.rows_of(tmp_path / "run", "event")[-1]
    assert 1.5 <= rows["epochs"][str(tmp_path / "run" / "data")] < 2.5
    said = capsys.readouterr()
    assert "conversations in" in said.out + said.err
    assert "tokens are trained on (" in said.out + said.err


def test_it_is_stopped_and_resumed_bitwise(tuned, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(run, later))
    assert resume(run, quiet=True) == 0
    assert tiny.final_files(run) == tiny.final_files(tuned)


def test_without_a_checkpoint_it_begins_again_from_the_model(tuned, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    for folder in checkpoints(run):
        shutil.rmtree(folder)
    assert resume(run, quiet=True) == 0
    assert tiny.final_files(run) == tiny.final_files(tuned)


def test_the_validation_loss_is_that_of_held_out_answers(tuned, answers):
    """By hand: every held-out conversation alone, from its text on."""
    opened = open_model(str(tuned))
    template = ChatTemplate(PLAIN, opened.tokenizer)
    held_out = val_texts(tuned, opened.tokenizer)
    total, count = 0.0, 0
    for one in ConversationReader([answers]):
        ids, parts, _ = template.encode_training(one.messages)
        if opened.tokenizer.decode(ids.tolist()) not in held_out:
            continue
        with torch.no_grad():
            log_p = opened.model(torch.tensor([ids[:-1].tolist()]))[0, :, :257].double().log_softmax(-1)
        for place, (token, part) in enumerate(zip(ids[1:].tolist(), parts[1:])):
            total, count = total - (log_p[place, token].item() if part else 0.0), count + bool(part)
    row = tiny.rows_of(tuned, "val")[-1]
    assert (row["step"], row["tokens"]) == (8, count)
    assert row["loss"] == pytest.approx(total / count, abs=1e-5)
    loss, _ = regpt.evaluate(tuned, f"conversations:{answers}", device="cpu", val_fraction=0.2)
    assert (loss["tokens"], loss["value"]) == (count, pytest.approx(total / count, abs=1e-6))


def val_texts(run: Path, tokenizer) -> set[str]:
    import numpy as np

    ids = np.fromfile(run / "data" / "val-00000.bin", dtype="<u2").tolist()
    starts = [*np.fromfile(run / "data" / "val-00000.idx", dtype="<i8").tolist(), len(ids)]
    return {tokenizer.decode(ids[i:j]) for i, j in itertools.pairwise(starts)}


def test_template_and_certificate_go_with_checkpoints_and_exports(tuned, tmp_path):
    opened = open_model(str(tuned))
    assert opened.companions["chat_template.jinja"] == PLAIN
    certificate = json.loads(opened.companions["chat_certificate.json"])
    assert certificate["template_sha256"] == ChatTemplate(PLAIN, opened.tokenizer).sha256
    assert export.main([str(tuned), "--out", str(tmp_path / "hf")]) == 0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "say 3 ba"}]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    found = found if isinstance(found, list) else found["input_ids"]
    assert list(found) == ChatTemplate(PLAIN, opened.tokenizer).encode(messages)
    assert (tmp_path / "hf" / "chat_certificate.json").is_file()
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(UserError, match="not the one that this model was trained with"):
        export.main([str(tmp_path / "hf"), "--out", str(tmp_path / "again")])


def test_an_answer_ends_at_the_end_of_a_turn_and_samples_are_answers(tuned):
    rows = [json.loads(line) for line in (tuned / "samples.jsonl").read_text().splitlines()]
    assert all(row["texts"][0].startswith("User:\nsay 1\n\nAssistant:\n") for row in rows)


def test_chat_uses_the_template_of_the_run(tuned, monkeypatch, capsys):
    from regpt.cli import chat

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"say 1\n")))
    assert chat.main([str(tuned), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert "no chat template" not in capsys.readouterr().err


def test_serve_refuses_another_template_without_its_flag(tuned):
    server = pytest.importorskip("regpt.serve.server", exc_type=ImportError)
    given = ("m", str(tuned), torch.device("cpu"), "fp32", 1, 128)
    assert server.load_model(*given, "").chat.source == PLAIN
    with pytest.raises(UserError, match="--other-template"):
        server.load_model(*given, CHATML)
    assert server.load_model(*given, CHATML, True).chat.source == CHATML


def test_look_shows_what_is_trained_on_of_any_batch(tuned, capsys):
    assert finetune.main(["--look", "2", "--step", "3", str(tuned)]) == 0
    said = capsys.readouterr().out
    rows = read_config(str(tuned / "config.toml")).train.batch_tokens // 128
    assert f"row {2 * rows}: " in said
    assert f"row {2 * rows + 2}: " not in said
    assert "Assistant:\n[[" in said
    assert "]]{{<|endoftext|>}}" in said
    assert "tokens are trained on (" in said
    with pytest.raises(UsageError, match="--step is 9, must be from 1 to the 8 of the run"):
        finetune.main(["--look", "2", "--step", "9", str(tuned)])


def test_replay_finds_the_loss_and_the_conversations_of_a_step(tuned, capsys):
    assert replay.main([str(tuned), "--step", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == found["recorded"]["loss"]
    assert found["grad_norm"] == found["recorded"]["grad_norm"]
    assert all(document["text"].startswith("<|endoftext|>User:\nsay") for document in found["documents"])
    assert all(document["loss"] > 4 for document in found["documents"])  # targets alone: a mean with zeros is below


def test_the_report_shows_a_batch_with_its_mask(tuned, tmp_path):
    page = write_report(tuned, tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<mark class="answer">' in page
    assert '<mark class="format">&lt;|endoftext|&gt;</mark>' in page
    assert "What is trained on" in page


def test_added_tokens_begin_near_the_mean_and_are_saved(base, answers, tmp_path, monkeypatch):
    before = open_model(str(base))
    run = tmp_path / "run"
    asked: list[tuple[list[int], tuple[int, ...]]] = []

    def write_samples(model, tokenizer, prompt, *, stop_ids, **options):
        asked.append((prompt, stop_ids))
        return [Sample([], "")]

    monkeypatch.setattr(actions, "write_samples", write_samples)
    assert tune(base, answers, run, "--add-tokens", "--train.steps", "1", "--optim.lr", "0") == 0
    opened = open_model(str(run))
    assert opened.tokenizer.n_vocab == 259
    assert opened.companions["chat_template.jinja"] == CHATML
    old, new = (dict(one.model.named_parameters())["wte.weight"] for one in (before, opened))
    assert torch.equal(old[:257], new[:257])
    shift, spread = new[257:259] - old[:257].mean(0), old[:257].std(0)
    assert 0 < shift.abs().max() < (0.5 * spread).max()
    assert not torch.equal(new[257], new[258])
    template = ChatTemplate(CHATML, opened.tokenizer)
    assert asked[-1] == (template.encode([{"role": "user", "content": "say 1"}]), template.stop_ids)
    ends = [opened.tokenizer.token_bytes(i).decode() for i in opened.tokenizer.stop_ids]
    assert ends == ["<|endoftext|>", "<|im_end|>"]


def test_info_plan_and_eval_know_the_parts(tuned, capsys):
    import numpy as np

    parts = np.fromfile(tuned / "data" / "train-00000.parts", dtype=np.uint8)
    share = f"{np.count_nonzero(parts):,} of {len(parts):,} tokens are trained on"
    data_info.main([str(tuned / "data")])
    assert f"train: {share} (" in capsys.readouterr().out
    plan.main(["sft-tiny", "--data", str(tuned / "data"), *FLAGS[:4], "--train.device", "cpu"])
    assert share in capsys.readouterr().out
    assert evaluate.main([str(tuned), "--tasks", "val", "--device", "cpu", "--precision", "fp32", "--json", "-"]) == 0
    found, row = json.loads(capsys.readouterr().out), tiny.rows_of(tuned, "val")[-1]
    assert f"{row['loss']:.5f}"[:-1] in json.dumps(found)


def test_of_preferences_the_chosen_answer_is_learned_or_both_are_kept(base, tmp_path):
    rows = [{"prompt": f"q{k}", "chosen": "ja", "rejected": "nein"} for k in range(9)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    template = ChatTemplate(PLAIN, byte_tokenizer())
    said = {}
    for pairs in (False, True):
        folder = tmp_path / str(pairs)
        options = ConversationOptions(64, val_fraction=0, pairs=pairs)
        manifest = prepare_conversations([tmp_path / "x.jsonl"], folder, template, options)
        said[pairs] = first_texts(folder, manifest, "train", template.tokenizer, 99, 99)
    assert [text.endswith("\nja<|endoftext|>") for text in said[False]] == [True] * 9
    assert [text[: text.rindex("\n")] for text in said[True][::2]] == [
        text[: text.rindex("\n")] for text in said[True][1::2]
    ]
    assert [text.rpartition("\n")[2] for text in said[True]] == ["ja<|endoftext|>", "nein<|endoftext|>"] * 9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.order", "shuffle"], "conversations are read packed or grouped"),
        (["--data.seq-len", "256"], "longer than the 128 positions"),
        (["--template", "chatml"], "has no special token <|im_start|>, which ChatML needs; add it with --add-tokens"),
        (["--template", "plain", "--add-tokens"], "leave out one of them"),
        (["--add-tokens", "--adapter.r", "4"], "adapters of blocks alone do not train; add embedding to"),
        (["--template", "nowhere.jinja"], "is not a file; give one, or one of plain, chatml"),
        (["--data", "nowhere.jsonl"], "'nowhere.jsonl' is not a file"),
        (
            ["--data.seq-len", "32"],
            "line 1: the conversation has .* tokens, more than data.seq_len 32.*--on-error skip",
        ),
        (["--data.seq-len", "32", "--on-error", "skip"], "no conversation is left of 40, the first: "),
        (["--val-fraction", "0.000001"], "none of 40 conversations fell into the split val"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(base, answers, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        tune(base, answers, tmp_path / "run", *flags)


def test_several_processes_train_what_one_does(tuned, base, answers, tmp_path, monkeypatch):
    """They are started with what one would be; the numbers are those of any run of several processes."""
    started: list[list[str]] = []
    monkeypatch.setattr("regpt.parallel.launch.launch", lambda n, args, **options: started.append([str(n), *args]) or 0)
    run = tmp_path / "run"
    assert tune(base, answers, run, "--train.steps", "2", "--nproc", "2") == 0
    (found,) = started
    assert found[:2] == ["2", "train"]
    alone = [arg for arg in found[2:] if arg not in ("--nproc", "2")]
    assert train.main(alone) == 0
    assert next(row["loss"] for row in tiny.rows_of(run, "train")) == tiny.rows_of(tuned, "train")[0]["loss"]


def test_skipped_rows_are_counted_by_reason(base, tmp_path, capsys):
    rows = [{"instruction": f"q{k}", "output": "ja" * (1 + 40 * (k % 2))} for k in range(6)] + [{"instruction": 1}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--on-error", "skip", "--look", "1", "--val-fraction", "0", "--data.seq-len", "64"]
    assert tune(base, tmp_path / "x.jsonl", tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    assert "3 rows skipped: longer than data.seq_len 64\n" in said
    assert "1 row skipped: bad\n" in said


def test_prepared_data_are_used_again_if_they_are_the_same(base, answers, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UsageError):  # after the data were made
        tune(base, answers, run, "--train.steps", "1", "--train.batch-tokens", "500")
    written = (run / "data" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="made of other data or settings \\(val_fraction\\)"):
        tune(base, answers, run, "--train.steps", "1", "--val-fraction", "0.3")
    assert tune(base, answers, run, "--train.steps", "1") == 0
    assert (run / "data" / "manifest.json").stat().st_mtime_ns == written


def test_an_answer_is_learned(base, tmp_path):
    """A model that is trained long enough on one answer writes it, and ends."""
    rows = [{"instruction": f"q{k}", "output": "ja"} for k in range(8)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--train.steps", "150", "--eval.every-steps", "0", "--val-fraction", "0", "--sample.every-steps", "0"]
    flags += ["--train.batch-tokens", "256", "--train.deterministic", "False", "--checkpoint.every-steps", "1000"]
    assert tune(base, tmp_path / "x.jsonl", tmp_path / "run", *flags) == 0
    opened = open_model(str(tmp_path / "run"))
    template = ChatTemplate(PLAIN, opened.tokenizer)
    ids = template.encode([{"role": "user", "content": "q9"}])
    for _ in range(3):
        ids.append(int(opened.model(torch.tensor([ids]))[0, -1, :257].argmax()))
    assert opened.tokenizer.decode(ids[-3:-1]) == "ja"
    assert ids[-1] == template.end_of_turn
    assert ANSWER == 1
