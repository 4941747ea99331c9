import io
import json
import sys
from pathlib import Path

import pytest
import torch

import tiny
from regpt.cli.sample import main
from regpt.engine.generate import write_samples
from regpt.engine.processing import SamplingOptions
from regpt.errors import UsageError, UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.text.bpe import BPETokenizer, train_bpe

PROMPT = "Hello, I"


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(["hello hello"], 257)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=tokenizer.n_vocab, max_seq_len=64)
    return initialize(make_model(config), seed=1).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer, model) -> str:
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000003"
    return str(tiny.save_model(folder, model, tokenizer))


def run(capsys, *args: str) -> str:
    assert main([*args, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_every_sample_is_printed_behind_an_arrow(capsys, checkpoint, tokenizer, model):
    out = run(capsys, checkpoint, "--prompt", PROMPT, "-n", "3", "--max-new-tokens", "6", "--seed", "7")
    expected = write_samples(model, tokenizer, PROMPT, n=3, max_new_tokens=6, options=SamplingOptions(top_k=50), seed=7)
    assert out == "".join(f"> {sample.text}\n" for sample in expected)
    assert out.startswith("> Hello, I")


def test_json_holds_ids_and_texts(capsys, checkpoint, tokenizer):
    args = (checkpoint, "--prompt", PROMPT, "--json", "--max-new-tokens", "6", "--top-k", "0", "--temperature", "2")
    report = json.loads(run(capsys, *args))
    assert (report["model"], report["step"], report["prompt"]) == (checkpoint, 3, PROMPT)
    assert (report["top_k"], report["temperature"], report["seed"]) == (0, 2.0, 1337)
    assert report["prompt_ids"] == tokenizer.encode(PROMPT)
    assert len(report["samples"]) == 5
    for sample in report["samples"]:
        ids = sample["ids"]
        assert ids[: len(report["prompt_ids"])] == report["prompt_ids"]
        assert sample["text"] == tokenizer.decode([i for i in ids if i != tokenizer.eot])
    assert json.loads(run(capsys, *args)) == report
    assert json.loads(run(capsys, *args, "--seed", "1"))["samples"] != report["samples"]


def test_greedy_samples_are_alike(capsys, checkpoint):
    lines = run(capsys, checkpoint, "--prompt", PROMPT, "--top-k", "1", "--json")
    samples = json.loads(lines)["samples"]
    assert all(sample == samples[0] for sample in samples)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "tf32", "bf16"])
def test_every_precision_samples(capsys, checkpoint, precision):
    before = torch.get_float32_matmul_precision()
    try:
        assert run(capsys, checkpoint, "--prompt", PROMPT, "-n", "1", "--precision", precision).startswith("> Hello, I")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_dash_reads_the_prompt_from_standard_input(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo\n\n".encode()), encoding="cp1252"))
    report = json.loads(run(capsys, checkpoint, "--prompt", "-", "-n", "1", "--json"))
    assert report["prompt"] == "héllo\n"


def test_an_empty_prompt_starts_a_new_document(capsys, checkpoint, tokenizer):
    report = json.loads(run(capsys, checkpoint, "--prompt", "", "-n", "1", "--json"))
    assert report["prompt_ids"] == []
    assert report["samples"][0]["ids"][0] == tokenizer.eot


def test_standard_input_that_is_no_text_is_a_user_error(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok\xff")))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 .* at byte 2"):
        main([checkpoint, "--prompt", "-"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt", "a", "-n", "0"], "-n is 0, must be at least 1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max-new-tokens is 0, must be at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, must be 0 .greedy. or more"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan, must be 0 .greedy. or more, and finite"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, must be 0"),
        (["--prompt", "a", "--temperature", "inf"], "temperature is inf, must be 0"),
        (["--prompt", "a", "--top-p", "nan"], "top-p is nan, must be above 0 and at most 1"),
        (["--prompt", "a", "--top-k", "-1"], "top-k is -1"),
        (["--prompt", "a", "--top-p", "2"], "top-p is 2.0"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a\udcff"], "is not UTF-8"),
        (["--prompt", "a", "--topk", "3"], "topk"),
        ([], "prompt"),
    ],
)
def test_bad_usage_is_one_sentence(checkpoint, args, said):
    with pytest.raises(UsageError, match=said) as error:
        main([checkpoint, *args, "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_text_longer_than_the_model_is_a_user_error(checkpoint):
    with pytest.raises(UserError, match="max-new-tokens 56 is the most that fits"):
        main([checkpoint, "--prompt", "x" * 8, "--max-new-tokens", "57", "--device", "cpu"])


def test_an_unknown_model_is_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="nowhere"):
        main([str(tmp_path / "nowhere"), "--prompt", "a", "--device", "cpu"])


def test_a_terminal_sees_one_sample_as_it_is_made_the_same_text(capsys, checkpoint, monkeypatch):
    options = [checkpoint, "--prompt", PROMPT, "-n", "1", "--max-new-tokens", "20"]
    whole = run(capsys, *options)
    written: list[str] = []
    monkeypatch.setattr("regpt.cli.sample.is_terminal", lambda stream: True)
    monkeypatch.setattr("regpt.cli.sample.write_stream", lambda stream, text: written.append(text))
    run(capsys, *options)
    assert "".join(written) == whole.removesuffix("\n")
    assert len(written) > 3


def test_past_the_context_is_refused_unless_sliding_is_asked_for_which_is_said(capsys, checkpoint):
    options = [checkpoint, "--prompt", PROMPT, "-n", "2", "--max-new-tokens", "80"]
    with pytest.raises(UserError, match="exceed the model's length of 64"):
        main(options)
    assert main([*options, "--past-context", "slide", "--device", "cpu"]) == 0
    assert "what comes after them follows from the last 64 alone" in capsys.readouterr().err
    assert main([*options[:-1], "4", "--past-context", "slide", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_each_prompt_of_a_file_gives_what_it_gives_alone(capsys, checkpoint, tmp_path, name):
    prompts = ["hello", "Hello, I", "o", "llo he"]
    lines = prompts if name.endswith("txt") else [json.dumps({"prompt": one, "id": 7}) for one in prompts]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    options = ("-n", "2", "--max-new-tokens", "9", "--json")
    given = run(capsys, checkpoint, "--prompts", str(tmp_path / name), *options).splitlines()
    assert given == [run(capsys, checkpoint, "--prompt", one, *options).rstrip("\n") for one in prompts]


def test_a_text_ends_before_a_stop_string(capsys, checkpoint):
    options = (checkpoint, "--prompt", PROMPT, "-n", "1", "--top-k", "0", "--max-new-tokens", "40")
    whole = run(capsys, *options).removeprefix("> ").removesuffix("\n")
    new = whole[len(PROMPT) :]
    pairs = (new[i : i + 2] for i in range(8, len(new) - 1))
    stop = next(pair for pair in pairs if "\ufffd" not in pair and new.find(pair) >= 8)
    assert run(capsys, *options, "--stop", stop) == f"> {whole[: len(PROMPT) + new.find(stop)]}\n"


def test_several_texts_are_drawn_side_by_side_on_a_terminal_and_stay_as_lines(capsys, checkpoint, monkeypatch):
    options = [checkpoint, "--prompt", PROMPT, "-n", "3", "--max-new-tokens", "20"]
    lines = run(capsys, *options)
    drawn = []
    monkeypatch.setattr("regpt.cli.sample.is_terminal", lambda stream: True)
    monkeypatch.setattr("rich.live.Live.update", lambda self, panels: drawn.append(len(panels.renderables)))
    assert run(capsys, *options).endswith(lines)
    assert set(drawn) == {3}
    assert len(drawn) >= 10


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n', 'line 1 of .* is no object with a text "prompt"'),
        ("a.jsonl", b"no json\n", "line 1 of .* is no object"),
        ("a.txt", b"", "has no prompts; write one on each line"),
        ("a.txt", b"\xff", "is not UTF-8 .* at byte 0"),
    ],
)
def test_a_file_without_prompts_is_refused(checkpoint, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        main([checkpoint, "--prompts", str(tmp_path / name)])


def test_a_prompt_and_a_file_of_them_exclude_each_other(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--prompt TEXT, or a file of them, --prompts FILE"):
        main([checkpoint, "--prompt", "a", "--prompts", "b"])
    with pytest.raises(UsageError, match="there is no file 'b'"):
        main([checkpoint, "--prompts", "b"])


def test_a_draft_changes_no_text_and_its_tokens_are_counted(capsys, checkpoint):
    args = (checkpoint, "--prompt", PROMPT, "--max-new-tokens", "12")
    plain, plain_json = run(capsys, *args), json.loads(run(capsys, *args, "--json"))
    for draft in ("ngram", checkpoint, f"{Path(checkpoint).parents[1]}@3"):
        assert main([*args, "--draft", draft, "--draft-tokens", "2", "--device", "cpu"]) == 0
        out, said = capsys.readouterr()
        assert out == plain
        drawn, none = "tokens that the draft proposed were drawn", "the draft proposed no token: "
        assert drawn in said or (draft == "ngram" and none in said)
        report = json.loads(run(capsys, *args, "--draft", draft, "--json"))
        counts = report.pop("draft")
        assert report == plain_json
        assert counts["model"] == draft
        assert 0 <= counts["accepted"] <= counts["proposed"]
        assert (counts["accepted"] == counts["proposed"] > 0) == (draft != "ngram")


def test_a_draft_of_another_tokenizer_is_refused(capsys, checkpoint, tmp_path):
    other = train_bpe(["hello hello"], 258)
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=other.n_vocab, max_seq_len=64)
    draft = tiny.save_model(tmp_path / "step-00000003", initialize(make_model(shape), seed=1), other)
    with pytest.raises(
        UsageError, match=r"has the tokenizer bpe-258-\w+, the model bpe-257-\w+; give a draft of the same"
    ):
        run(capsys, checkpoint, "--prompt", PROMPT, "--draft", str(draft))
    with pytest.raises(UsageError, match="has no checkpoint of step 4; choose from 3"):
        run(capsys, checkpoint, "--prompt", PROMPT, "--draft", f"{Path(checkpoint).parents[1]}@4")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--draft", "ngrams"], r"^--draft: model 'ngrams' does not exist; .*; or give --draft ngram, which needs no"),
        (["--draft-tokens", "5"], "^--draft-tokens changes nothing without a draft; add --draft MODEL|ngram, or leave"),
        (["--prompts", "file"], r"--prompts FILE \(both were given\)$"),
        (["--receipt", "no/r.json"], "^--receipt no/r.json: the folder does not exist; make it first$"),
        (["--receipt", "/"], "^--receipt / is a folder; give the name of a file$"),
    ],
)
def test_flags_that_cannot_be_followed_are_one_sentence_before_a_text_is_written(capsys, checkpoint, flags, said):
    with pytest.raises(UserError, match=said):
        run(capsys, checkpoint, "--prompt", PROMPT, *flags)
    assert capsys.readouterr().out == ""
