"""Our GPT-2 against `GPT2LMHeadModel` of transformers, with random weights, in both directions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regpt.checkpoint.open import build
from regpt.errors import UserError
from regpt.hf.families import config_from_hf, config_to_hf
from regpt.hf.folder import hf_config, hf_weights
from regpt.hf.weights import WeightsFromHF, weights_to_hf
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.ops import linear_cross_entropy
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize, state_tensors

transformers = pytest.importorskip("transformers")

# Odd on purpose: a head size that is no power of two, a vocabulary that is no multiple of anything.
TINY = {"n_layer": 3, "n_head": 3, "n_embd": 27, "vocab_size": 131, "n_positions": 37}
N_NEW = 30


def theirs(shape: dict, *, std: float, attention: str | None = None):
    """A `GPT2LMHeadModel` whose every parameter is drawn from N(0, std²), biases too; norms scale by about 1."""
    config = transformers.GPT2Config(
        **shape, bos_token_id=None, eos_token_id=None, attn_implementation=attention, dtype=torch.float32
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("ln_" in name and name.endswith("weight")), std, generator=generator)
    return model


def saved(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def ours(folder: Path) -> Transformer:
    return build(hf_config(folder), hf_weights(folder, hf_config(folder)), "cpu", "test")


def tokens(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def loss(model: Transformer, idx: Tensor) -> Tensor:
    """Mean loss of predicting each token of `idx` (B, T) from those before it."""
    hidden, targets = model.hidden(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten()
    return linear_cross_entropy(hidden, model.head_weight, targets, model.config.vocab_size) / targets.numel()


def greedy(model: Transformer, idx: Tensor, n: int) -> Tensor:
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], dim=1)
    return idx


@torch.no_grad()
def assert_same_model(model: Transformer, reference, idx: Tensor, prompt: Tensor) -> None:
    expected = reference(idx, labels=idx)
    torch.testing.assert_close(model(idx), expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss(model, idx), expected.loss, atol=1e-5, rtol=0)
    generated = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=N_NEW, pad_token_id=0
    )
    assert generated.size(1) == prompt.size(1) + N_NEW
    assert greedy(model, prompt, N_NEW).equal(generated)


@pytest.mark.parametrize("attention", ["eager", None])
def test_logits_loss_and_greedy_tokens_are_those_of_transformers(tmp_path: Path, attention: str | None):
    reference = theirs(TINY, std=0.3, attention=attention)
    idx = tokens(131, 2, 37)
    assert_same_model(ours(saved(reference, tmp_path)), reference, idx, idx[:1, :7])


@pytest.mark.slow
def test_logits_loss_and_greedy_tokens_are_those_of_transformers_at_124m(tmp_path: Path):
    reference = theirs({}, std=0.02)
    model = ours(saved(reference, tmp_path))
    idx = tokens(50257, 2, 64)
    assert_same_model(model, reference, idx, idx[:1, :7])
    with torch.no_grad():
        error = (model(idx) - reference(idx).logits).abs().max().item()
    print(f"largest difference of a logit: {error:.1e}, logits up to {model(idx).abs().max().item():.2f}")


def test_a_sharded_folder_gives_the_same_weights_as_a_single_file(tmp_path: Path):
    reference = theirs(TINY, std=0.3)
    whole, sharded = saved(reference, tmp_path / "1"), saved(reference, tmp_path / "n", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_equal(state_tensors(ours(sharded)), state_tensors(ours(whole)))


def test_names_without_prefix_and_with_mask_buffers_and_head_are_read(tmp_path: Path):
    folder = saved(theirs(TINY, std=0.3), tmp_path)
    expected = state_tensors(ours(folder))
    plain = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    plain["lm_head.weight"] = plain["wte.weight"].clone()
    for layer in range(3):  # as OpenAI's own upload has them
        plain[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 37, 37).tril()
        plain[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(plain, folder / "model.safetensors")
    assert_equal(state_tensors(ours(folder)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(tmp_path: Path, dtype: torch.dtype):
    reference = theirs(TINY, std=0.3).to(dtype)
    weights = state_tensors(ours(saved(reference, tmp_path)))
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert weights["wte.weight"].equal(reference.transformer.wte.weight.detach().float())


def test_import_of_an_export_is_bitwise_the_model():
    model = initialize(make_model(ModelConfig(n_layer=2, n_head=3, n_embd=27, vocab_size=131, max_seq_len=37)), 7)
    exported = weights_to_hf(state_tensors(model))
    assert config_from_hf(config_to_hf(model.config, 130)) == model.config
    assert_equal(dict(WeightsFromHF(exported)), state_tensors(model))


def test_exported_names_and_shapes_are_those_of_transformers(tmp_path: Path):
    reference = theirs(TINY, std=0.3)
    exported = weights_to_hf(state_tensors(ours(saved(reference, tmp_path))))
    assert_equal(exported, load_file(tmp_path / "model.safetensors"))


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        assert given[name].equal(tensor), name


def test_shape_is_read_under_both_spellings_and_defaults_to_gpt2():
    assert config_from_hf({"model_type": "gpt2"}) == ModelConfig()
    spelled = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "max_position_embeddings": 16}
    assert config_from_hf({"model_type": "gpt2", **spelled, "vocab_size": 5}) == ModelConfig(
        n_layer=2, n_head=2, n_embd=8, vocab_size=5, max_seq_len=16
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "falcon"),
        ("activation_function", "tanh"),
        ("n_inner", "1000"),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("n_layer", "12"),
        ("n_head", True),
    ],
)
def test_a_config_that_we_do_not_implement_is_refused_by_name(key: str, value: object):
    with pytest.raises(UserError, match=rf"config\.json has {key}\b.*{value}"):
        config_from_hf({"model_type": "gpt2", key: value})


def test_four_times_the_width_may_be_written_out():
    assert config_from_hf({"model_type": "gpt2", "n_inner": 3072}) == ModelConfig()


def test_a_head_of_its_own_is_refused():
    with pytest.raises(UserError, match=r"lm_head\.weight that differs"):
        WeightsFromHF({"wte.weight": torch.zeros(3, 2), "lm_head.weight": torch.ones(3, 2)})


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_weights_are_refused(dtype: str):
    with pytest.raises(UserError, match=rf"'wpe\.weight' is stored as torch\.{dtype}"):
        WeightsFromHF({"transformer.wpe.weight": torch.zeros(3, 2).to(getattr(torch, dtype))})["wpe.weight"]


@pytest.mark.parametrize("shape", [(), (3,), (4, 2)])
def test_an_embedding_of_other_rows_than_the_config_is_refused(shape: tuple[int, ...]):
    weights = WeightsFromHF({"lm_head.weight": torch.zeros(shape)}, rows=5, n_vocab=3)
    with pytest.raises(UserError, match=r"'wte\.weight' has shape .*config\.json has vocab_size 5"):
        weights["wte.weight"]


def test_a_tensor_with_and_without_prefix_is_refused():
    with pytest.raises(UserError, match=r"'transformer\.wpe\.weight' with and without|'wpe\.weight' with and without"):
        WeightsFromHF({"transformer.wpe.weight": torch.zeros(3, 2), "wpe.weight": torch.ones(3, 2)})


def test_weights_of_another_shape_are_refused_with_the_source(tmp_path: Path):
    folder = saved(theirs(TINY, std=0.3), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 38}))
    with pytest.raises(
        UserError, match=r"n_positions = 38, but tensor 'transformer\.wpe\.weight' has shape \(37, 27\)"
    ):
        ours(folder)
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(UserError, match=r"n_layer = 2, but the weights hold 'transformer\.h\.2\."):
        ours(folder)
