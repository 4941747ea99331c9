"""`regpt export`: what we write is what transformers opens."""

import json

import pytest
import torch

from regpt.checkpoint.open import open_model
from regpt.cli.export import main
from regpt.errors import UsageError, UserError
from regpt.hf.export import export_hf, gpt2_json, tokenizer_config
from regpt.hf.folder import hf_tokenizer
from regpt.model.weights import state_tensors
from regpt.text.gpt2 import VOCAB_PACKAGE, find_vocabulary
from regpt.text.open import open_tokenizer

TEXTS = [
    "Hello, I'm a language model,",
    "the cat  sat\n\n on   that mat ",
    "Zażółć gęślą jaźń 你好 🙂 ½ \u00a0x \x00 \r\n\t",
    "def f(x):\n    return x ** 2  # 1234567\n",
    "",
]


@pytest.fixture(params=[10**9, 20_000], ids=["one-file", "several-files"])
def max_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("regpt.hf.export.MAX_FILE_BYTES", request.param)
    return request.param


@torch.no_grad()
def test_transformers_opens_an_export_and_gives_the_same_logits(tmp_path, model, tokenizer, max_bytes: int):
    transformers = pytest.importorskip("transformers")
    folder = export_hf(model, tokenizer, tmp_path / "hf")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_bytes == 20_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert theirs.dtype == torch.float32
    idx = torch.arange(37)[None] * 7 % 263
    torch.testing.assert_close(model(idx), theirs.eval()(idx).logits, atol=1e-4, rtol=0)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    assert (opened.eos_token_id, len(opened), opened.model_max_length) == (tokenizer.eot, 263, 37)
    assert list(opened("the cat")) == ["input_ids", "attention_mask"]
    # transformers 4 returns whatever this does not exclude; its GPT-2 adds the embeddings of token_type_ids.
    written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    for text in TEXTS:
        assert opened.encode(text) == tokenizer.encode(text)
        assert opened.decode(opened.encode(text)) == text


@pytest.mark.usefixtures("max_bytes")
def test_an_export_opened_again_is_bitwise_the_model(tmp_path, model, tokenizer):
    opened = open_model(str(export_hf(model, tokenizer, tmp_path / "hf")))
    given, expected = state_tensors(opened.model), state_tensors(model)
    assert given.keys() == expected.keys()
    assert all(given[name].equal(tensor) for name, tensor in expected.items())


def test_an_export_needs_a_new_or_empty_folder(tmp_path, model, tokenizer):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "precious").write_text("x")
    export_hf(model, tokenizer, empty)
    for folder in (full, empty, full / "precious"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="is not empty"):
            export_hf(model, tokenizer, folder)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def vocabulary():
    pytest.importorskip(VOCAB_PACKAGE, reason="GPT-2's vocabulary files are not installed")
    files = find_vocabulary(VOCAB_PACKAGE)
    assert files
    return files


def test_gpt2s_vocabulary_and_merges_made_from_the_ranks_are_openais_files(vocabulary):
    made = json.loads(gpt2_json())["model"]
    assert made["vocab"] == json.loads(vocabulary["encoder.json"].read_text(encoding="utf-8"))
    lines = vocabulary["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1]  # the first holds a version
    assert [" ".join(merge) for merge in made["merges"]] == lines


def test_gpt2s_tokenizer_is_exported_so_that_transformers_encodes_like_tiktoken(tmp_path, vocabulary):
    transformers = pytest.importorskip("transformers")
    gpt2 = open_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text(gpt2_json(), encoding="utf-8")
    opened = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), **tokenizer_config(1024, gpt2)
    )
    for text in TEXTS:
        assert opened.encode(text) == gpt2.encode(text)
        assert opened.decode(opened.encode(text)) == text
    assert (opened.eos_token_id, len(opened)) == (50256, 50257)
    assert hf_tokenizer(tmp_path, 50257).name == "gpt2"


def test_the_command_exports_a_run(tmp_path, save, capsys):
    save(tmp_path / "run", 10)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("args", [["gpt2"], ["--out", "x"], ["gpt2", "--out", "x", "--format", "onnx"]])
def test_the_command_refuses_bad_usage(args):
    with pytest.raises(UsageError, match=r"regpt export|must be hf"):
        main(args)
