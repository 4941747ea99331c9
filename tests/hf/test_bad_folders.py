"""Folders that cannot be read: one sentence each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regpt.checkpoint.open import open_model
from regpt.errors import UsageError, UserError
from regpt.hf.export import export_hf
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import initialize
from regpt.tensors import write_divided
from regpt.text.open import open_tokenizer
from tokenizer_files import write_family


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = open_tokenizer(write_family("llama3", tmp_path / "tokenizer"))
    config = ModelConfig("llama", 2, 4, 24, tokenizer.n_vocab, 64, n_kv_head=2, n_inner=40, tie_embeddings=False)
    return export_hf(initialize(make_model(config), 1), tokenizer, tmp_path / "model")


def said(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        open_model(str(folder))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "tensor", "shape", "instead"),
    [
        ({"hidden_size": 48, "head_dim": 6}, "embed_tokens", (403, 24), (403, 48)),
        ({"intermediate_size": 20}, "layers.0.mlp.gate_proj", (40, 24), (20, 24)),
        ({"num_attention_heads": 2}, "layers.0.self_attn.q_proj", (24, 24), (12, 24)),
        ({"num_key_value_heads": 1}, "layers.0.self_attn.k_proj", (12, 24), (6, 24)),
    ],
)
def test_a_config_that_contradicts_a_tensor_names_both(folder: Path, changes: dict[str, Any], tensor, shape, instead):
    edit(folder, changes)
    key, value = next(iter(changes.items()))
    told = f"{key} = {value}, but tensor 'model.{tensor}.weight' has shape {shape}, which should be {instead}"
    assert told in said(folder)


def test_transposed_tensors_of_gpt2_are_named_as_they_are_stored(tmp_path: Path):
    config = ModelConfig("gpt2", 1, 4, 24, 257, 64)
    folder = export_hf(initialize(make_model(config), 1), open_tokenizer("bytes"), tmp_path / "model")
    edit(folder, {"n_inner": 50})
    assert (
        "n_inner = 50, but tensor 'transformer.h.0.mlp.c_fc.weight' has shape (24, 96), which should be (24, 50)"
        in (said(folder))
    )
    edit(folder, {"n_inner": None, "n_positions": 32})
    assert "n_positions = 32, but tensor 'transformer.wpe.weight' has shape (64, 24)" in said(folder)


def edit(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers = 3, but the weights lack 'layers\.2\."),
        ({"num_hidden_layers": 1}, r"num_hidden_layers = 1, but the weights hold 'model\.layers\.1\."),
        ({"vocab_size": 500}, "vocab_size 500"),
        ({"num_key_value_heads": 3}, "n_head = 4 is not divisible by model.n_kv_head = 3"),
        ({"num_attention_heads": 5, "head_dim": None}, "n_embd = 24 is not divisible by model.n_head = 5"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_a_config_that_no_model_here_has(folder: Path, changes: dict[str, Any], sentence: str):
    edit(folder, changes)
    assert re.search(sentence, said(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_named(folder: Path, dtype: torch.dtype):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(40, 24).to(dtype)
    save_file(weights, folder / "model.safetensors")
    assert "is quantized: its tensor 'model.layers.1.mlp.up_proj.weight' is stored as " in said(folder)


def test_missing_files_of_divided_weights_are_counted(folder: Path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_divided(folder, "model", weights, 20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    assert re.search(rf"{re.escape(shards[1].name)}': 1 of the {len(shards)} weight files .* are missing", said(folder))


def test_a_window_longer_than_the_rows_is_refused_where_a_user_sets_it():
    with pytest.raises(UsageError, match=r"model\.window is 65 and model\.max_seq_len 64"):
        ModelConfig("mistral", 2, 4, 24, 100, 64, window=65)
    assert ModelConfig("mistral", 2, 4, 24, 100, 64, window=64).window == 64


def test_a_window_longer_than_the_rows_of_a_published_model_is_none(folder: Path):
    edit(folder, {"model_type": "mistral", "sliding_window": 4096, "architectures": ["MistralForCausalLM"]})
    assert open_model(str(folder)).model.config.window == 0
