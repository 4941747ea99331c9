"""Imported and exported folders of several families, in the type their weights are stored in, against transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from regpt.checkpoint.open import open_model
from regpt.cli.export import main
from regpt.engine.generate import encode_prompt
from regpt.text.open import open_tokenizer
from tokenizer_files import write_family

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {  # model_type: its tokenizer, its ends, other settings
    "gpt2": ("smollm", ["<|endoftext|>"], {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("llama3", ["<|end_of_text|>", "<|eot_id|>"], SIZES | {"num_key_value_heads": 2}),
    "qwen2": ("qwen", ["<|im_end|>", "<|endoftext|>"], SIZES | {"num_key_value_heads": 2}),
    "mistral": ("mistral", ["</s>"], SIZES | {"num_key_value_heads": 2, "sliding_window": None}),
    "gpt_neox": ("pythia", ["<|endoftext|>"], SIZES | {"hidden_size": 32}),
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TEXTS = ["The quick brown fox", "Größe — 日本\n\n  x"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As transformers writes it: bfloat16, with options of the tokenizer, of generation, and a chat template."""
    tokenizer, ends, settings = FAMILIES[request.param]
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ends[0], "model_max_length": 64}
    folder = write_family(tokenizer, tmp_path / "theirs", tokenizer_config=options)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    opened = open_tokenizer(folder)
    ids = {opened.token_bytes(i).decode(errors="replace"): i for i in range(opened.n_vocab)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, vocab_size=opened.n_vocab, pad_token_id=None, bos_token_id=opened.eot, **settings
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    ended = [ids[end] for end in ends]
    model.generation_config = GenerationConfig(bos_token_id=opened.eot, eos_token_id=ended, do_sample=True, top_k=7)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def export(folder: Path | str, out: Path, *options: str) -> Path:
    assert main([str(folder), "--out", str(out), *options]) == 0
    return out


def test_an_export_of_an_import_is_bitwise_the_import_and_complete(folder: Path, tmp_path: Path):
    out = export(folder, tmp_path / "ours")
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    theirs, ours = (AutoModelForCausalLM.from_pretrained(where, dtype="auto").eval() for where in (folder, out))
    assert ours.dtype == torch.bfloat16
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    rows = torch.arange(20)[None] * 7
    assert torch.equal(ours(rows).logits, theirs(rows).logits)


def test_transformers_tokenizer_of_an_export_gives_our_ids_and_the_chat_template(folder: Path, tmp_path: Path):
    opened, theirs = open_model(str(folder)).tokenizer, AutoTokenizer.from_pretrained(export(folder, tmp_path / "ours"))
    for text in TEXTS:
        assert theirs(text).input_ids == encode_prompt(opened, text)
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert theirs.eos_token_id in opened.stop_ids


def test_what_a_folder_lacks_is_made_from_its_tokenizer(folder: Path, tmp_path: Path):
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).unlink()
    opened, out = open_model(str(folder)).tokenizer, export(folder, tmp_path / "ours")
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["bos_token_id"] == generation["bos_token_id"] == opened.eot
    assert config["eos_token_id"] == generation["eos_token_id"]
    ends = config["eos_token_id"]
    assert {opened.eot, *(ends if isinstance(ends, list) else [ends])} == set(opened.stop_ids)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert theirs(text).input_ids == encode_prompt(opened, text)
    assert theirs("").input_ids == opened.encode_prompts([""])[0].tolist()
    assert theirs.bos_token_id == opened.eot


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_can_be_chosen(folder: Path, tmp_path: Path, dtype: str):
    out, wanted = export(folder, tmp_path / "ours", "--dtype", dtype), getattr(torch, dtype)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    before, after = tensors(folder), tensors(out)
    assert all(after[name].dtype == wanted and torch.equal(after[name], before[name].to(wanted)) for name in before)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == wanted


def test_a_number_beyond_the_range_of_the_type_is_one_sentence(tmp_path: Path):
    from regpt.errors import UserError
    from regpt.hf.export import converted

    with pytest.raises(UserError, match=r"'x' has numbers beyond the range of torch\.float16; export with"):
        converted("x", torch.tensor([1e5]), torch.float16)
