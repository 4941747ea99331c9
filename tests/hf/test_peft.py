"""Adapters between regpt and peft: equal logits both ways, equal bytes after a round trip."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from regpt.__main__ import main
from regpt.checkpoint.open import open_model
from regpt.errors import UserError
from regpt.hf.export import export_hf
from regpt.hf.peft import CONFIG, WEIGHTS
from regpt.model.weights import initialize
from regpt.text.bpe import train_bpe

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TEXTS = ["ba do mi ta ru ke ba mi do", "ta ru ba ke ke mi"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "o_proj", "down_proj", "lm_head"]}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
IDX = torch.randint(260, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of a tiny model of each family."""
    folder, tokenizer = tmp_path_factory.mktemp("bases"), train_bpe(TEXTS, 262)
    shapes = {"gpt2": tiny.CONFIG, "llama": replace(tiny.FAMILY_CONFIGS["llama"], tie_embeddings=False)}
    for family, shape in shapes.items():
        model = initialize(tiny.make_model(replace(shape, vocab_size=tokenizer.n_vocab)), 4)
        export_hf(model, tokenizer, folder / family)
    return {family: folder / family for family in shapes}


def adapter_of_peft(base: Path, folder: Path, **options: object) -> torch.Tensor:
    """A folder that peft saved, its adapters random; the logits that it computes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    targets = TARGETS[base.name] if not options.get("use_dora") else [t for t in TARGETS[base.name] if t != "lm_head"]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": base.name == "gpt2"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings, **options)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return adapted(IDX).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_a_folder_of_pefts_opens_with_its_logits_and_returns_with_its_bytes(bases, family, kind, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft and transformers
        theirs = adapter_of_peft(bases[family], tmp_path / "theirs", **KINDS[kind])
        opened = open_model(str(tmp_path / "theirs"))
        with torch.no_grad():
            assert (opened.model(IDX) - theirs).abs().max() <= 1e-6
            plain = open_model(str(bases[family])).model(IDX)
        assert (plain - theirs).abs().max() > 1e-4
        assert main(["export", str(tmp_path / "theirs"), "--format", "peft", "--out", str(tmp_path / "ours")]) == 0
        before, after = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        model = transformers.AutoModelForCausalLM.from_pretrained(bases[family])
        again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
        with torch.no_grad():
            assert (again(IDX).logits - theirs).abs().max() <= 1e-6


def test_merged_weights_are_exported_and_the_gap_of_bfloat16_is_stored(bases, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = adapter_of_peft(bases["llama"], tmp_path / "adapter")
        for dtype in ("float32", "bfloat16"):
            out = tmp_path / dtype
            assert main(["export", str(tmp_path / "adapter"), "--dtype", dtype, "--out", str(out)]) == 0
            gap = json.loads((out / "merge.json").read_text())
            model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            with torch.no_grad():
                error = (model(IDX).logits - theirs).abs().max().item()
            assert (error <= 1e-6, gap["largest_difference"] == 0.0) == (dtype == "float32",) * 2
            assert gap["dtype"] == dtype
    assert "rounded to bfloat16 log-probabilities differ by at most" in capsys.readouterr().out


WRONG = [
    ({"bias": "all"}, "has bias = 'all', regpt implements 'none'"),
    ({"peft_type": "IA3"}, "has peft_type = 'IA3', regpt implements 'LORA'"),
    ({"r": 0}, "cannot be used"),
    ({"r": 5}, "has shape (3, 24), its base has (5, 24)"),
    ({"base_model_name_or_path": None}, "names no base model"),
]


def test_what_is_not_implemented_or_does_not_fit_is_refused(bases, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter_of_peft(bases["llama"], tmp_path)
    good = json.loads((tmp_path / CONFIG).read_text())
    for change, message in WRONG:
        (tmp_path / CONFIG).write_text(json.dumps(good | change))
        with pytest.raises(UserError) as error:
            open_model(str(tmp_path))
        assert message in str(error.value), error.value
    (tmp_path / CONFIG).write_text(json.dumps(good))
    (tmp_path / "regpt.json").write_text(json.dumps({"base_sha256": "0" * 64}))
    with pytest.raises(UserError, match="are for the base 000000000000"):
        open_model(str(tmp_path))
    assert main(["export", str(bases["llama"]), "--format", "peft", "--out", str(tmp_path / "out")]) == 1
    assert "has no adapters, which --format peft writes" in capsys.readouterr().err
