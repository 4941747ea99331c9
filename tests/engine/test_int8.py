"""Weights in Q8_0: what a model computes with them, in any batch, and where they are refused."""

import copy
import json

import pytest
import torch

import tiny
from regpt.checkpoint.open import open_model
from regpt.engine import products
from regpt.engine.engine import Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.products import quantize
from regpt.engine.reference import generate_uncached
from regpt.engine.request import Request
from regpt.errors import UsageError, UserError
from regpt.hf.gguf_models import export_gguf
from regpt.kernels.few_rows import load_few_rows
from regpt.model.config import ModelConfig
from regpt.text.bpe import train_bpe
from regpt.train.precision import check_precision

TOKENIZER = train_bpe(["hello hello"], 257)
compiled = pytest.mark.skipif(load_few_rows() is None, reason="no C compiler")


def model_of(family: str):
    """Tied, so that one rounded matrix is embedding and head, as in a GGUF file."""
    shape = ModelConfig(
        family=family, n_layer=2, n_head=4, n_embd=64, vocab_size=TOKENIZER.n_vocab, max_seq_len=64, tie_embeddings=True
    )
    return tiny.build_model(config=shape, dtype=torch.float32).eval()


@compiled
@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_int8_computes_what_its_gguf_file_of_type_q8_0_says(family, tmp_path):
    model = model_of(family)
    export_gguf(model, TOKENIZER, tmp_path / "m.gguf", "q8_0")
    other, kept = open_model(str(tmp_path / "m.gguf")).model.eval(), copy.deepcopy(model)
    quantize(model)
    for idx in (torch.arange(40)[None], torch.tensor([[3, 1, 2]])):  # more rows than the kernel takes, and few
        torch.testing.assert_close(model(idx), other(idx), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(idx), kept(idx), rtol=1e-5, atol=1e-5)


@compiled
def test_texts_in_int8_are_the_uncached_loops_in_any_batch():
    model = quantize(model_of("gpt2"))
    options = [SamplingOptions(temperature=0), SamplingOptions(), SamplingOptions(top_k=0)]
    given = [Request([i, 2 * i, 7], 12, options[i % 3], seed=i) for i in range(12)]
    expected = [
        generate_uncached(model, torch.tensor([one.prompt]), 12, one.options, one.seed)[0, 3:].tolist() for one in given
    ]
    for rows in (1, 5, 12):
        assert [text for (text,) in Engine(model, max_rows=rows).run(given)] == expected


@compiled
def test_commands_take_int8_and_a_receipt_remembers_it(tmp_path, capsys):
    from regpt.cli.sample import main as sample
    from regpt.cli.verify_receipt import main as verify

    folder = str(tiny.save_model(tmp_path / "checkpoints" / "step-00000003", model_of("gpt2"), TOKENIZER))
    receipt = tmp_path / "receipt.json"
    flags = [folder, "--prompt", "Hello", "-n", "9", "--top-k", "0", "--device", "cpu", "--json"]
    assert sample(flags) == 0
    plain = json.loads(capsys.readouterr().out)
    assert sample([*flags, "--precision", "int8", "--receipt", str(receipt)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "int8"
    assert report["samples"] != plain["samples"]
    assert json.loads(receipt.read_text())["model"]["precision"] == "int8"
    assert verify([str(receipt), "--model", folder, "--device", "cpu"]) == 0
    assert "int8" in capsys.readouterr().out


def test_int8_is_refused_on_a_gpu_and_without_a_compiler(monkeypatch):
    with pytest.raises(UsageError, match="int8 is for CPUs and CUDA, the device is mps; choose bf16, or --device cpu"):
        check_precision("int8", torch.device("mps"))
    with pytest.raises(UsageError, match="bf16-invariant is for CUDA, the device is cpu; choose fp32"):
        check_precision("bf16-invariant", torch.device("cpu"))
    monkeypatch.setattr(products, "load_few_rows", lambda: None)
    with pytest.raises(UserError, match="needs a C compiler"):
        quantize(model_of("gpt2"))
