"""Every family against transformers: random tiny models of odd shapes, saved there, opened here, exported again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from plain_cache import KVCache
from regpt.errors import UsageError, UserError
from regpt.hf.export import refuse_other_model
from regpt.hf.families import config_from_hf, config_to_hf
from regpt.hf.folder import hf_config, hf_weights
from regpt.hf.weights import weights_to_hf
from regpt.model.config import FAMILIES, ModelConfig
from regpt.model.families import make_model
from regpt.model.ops import linear_cross_entropy
from regpt.model.transformer import Transformer
from regpt.model.weights import load_weights, state_tensors
from tiny import build_model

V, T = 61, 23
TINY: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {
    "vocab_size": V,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 as published": ("gpt2", GPT2),
    "gpt2, narrow MLP, exact GELU": ("gpt2", GPT2 | {"n_inner": 37, "activation_function": "gelu"}),
    "gpt2, relu, own head": ("gpt2", GPT2 | {"activation_function": "relu", "tie_word_embeddings": False}),
    "gpt2, scaled by layer, epsilon": (
        "gpt2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    ),
    "llama 2": ("llama", TINY | {"num_key_value_heads": 6}),
    "llama 3, grouped queries": ("llama", TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.1, stretched": ("llama", TINY | {"rope_parameters": LLAMA3}),
    "llama 3.2, tied, one key head": ("llama", TINY | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, linear": ("llama", TINY | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama, biases, wide heads": ("llama", TINY | {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama, one head": ("llama", TINY | {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 2}),
    "mistral, window": ("mistral", TINY | {"sliding_window": 5}),
    "mistral 0.3": ("mistral", TINY | {"sliding_window": None}),
    "qwen 2.5": ("qwen2", TINY),
    "qwen 2, all windows": (
        "qwen2",
        TINY | {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 3},
    ),
    "qwen 3": ("qwen3", TINY | {"head_dim": 8, "tie_word_embeddings": True}),
    "olmo 2": ("olmo2", TINY | {"pad_token_id": V - 1}),
    "smollm 3": ("smollm3", TINY | {"num_hidden_layers": 5, "pad_token_id": V - 1}),
    "smollm 3, all rotated": ("smollm3", TINY | {"no_rope_layers": [1, 1, 1], "pad_token_id": V - 1}),
    "pythia": ("gpt_neox", TINY | {"num_key_value_heads": None, "hidden_size": 48}),
    "pythia, no attention biases": ("gpt_neox", TINY | {"attention_bias": False, "hidden_size": 96}),
}
GEMMA = TINY | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "pad_token_id": V - 1}
MODELS |= {
    "gemma 3, windows in two of three layers": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3}),
    "gemma 3, stretched, own scale, own head, biases": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 5, "layer_types": (["sliding_attention", "full_attention"] * 3)[:5]}
        | {"query_pre_attn_scalar": 11, "tie_word_embeddings": False, "attention_bias": True}
        | {"rope_theta": 5e4, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma 3, windows only": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention"] * 3}),
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "attention_dropout": 0.0}
MODELS |= {
    "mixtral": ("mixtral", TINY | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window, all experts, wide heads": (
        "mixtral",
        TINY | {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 5, "head_dim": 6},
    ),
    "olmoe": ("olmoe", TINY | EXPERTS),
    "olmoe, one of five, normalized": ("olmoe", TINY | EXPERTS | {"num_experts_per_tok": 1, "norm_topk_prob": True}),
    "qwen 3 of experts": ("qwen3_moe", TINY | EXPERTS | {"moe_intermediate_size": 12, "norm_topk_prob": True}),
    "qwen 3 of experts, odd sizes, biases, window": (
        "qwen3_moe",
        TINY
        | EXPERTS
        | {"hidden_size": 30, "moe_intermediate_size": 7, "head_dim": 8, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 4},
    ),
}
realistic = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
MODELS["smollm 2 135M, two layers"] = ("llama", TINY | realistic | {"num_hidden_layers": 2, "vocab_size": 4915})


def their_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with weights larger than at initialisation, so that every part has an effect."""
    kind, settings = MODELS[name]
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(kind, **{key: value for key, value in settings.items() if value is not None})
    how = {"attn_implementation": "sdpa"} | implementation(config)  # eager attention rounds to float32 in float64
    model = AutoModelForCausalLM.from_config(config, **how)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model.to(dtype).eval()


def implementation(config: Any) -> dict[str, str]:
    """Experts one after the other: grouped, theirs know neither float64 nor odd sizes."""
    return {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}


def our_model(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    config = hf_config(folder)
    return load_weights(make_model(config).to(dtype), hf_weights(folder, config))


def tokens(vocab_size: int) -> torch.Tensor:
    padding = int(vocab_size == V)  # the embedding of their padding gets no gradient
    return torch.randint(vocab_size - padding, (2, T + 1), generator=torch.Generator().manual_seed(1))


def stored_experts(tensors: dict[str, torch.Tensor], family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """As transformers stores its fused experts."""
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in tensors.items():
        stored = name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name
        where, _, last = stored.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            yield stored, tensor
            continue
        for expert, one in enumerate(tensor):
            names = (gate, up) if last == "gate_up_proj" else (down,)
            yield from ((f"{where}.{expert}.{n}.weight", part) for n, part in zip(names, one.chunk(len(names))))


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = their_model(request.param)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if len(request.param) % 2 else "5GB")
    return model, tmp_path / "theirs"


def rms_norm_in_float64(self: Any, x: torch.Tensor) -> torch.Tensor:
    gemma = hasattr(self, "eps")  # whose weights are offsets
    weight, eps = (1 + self.weight, self.eps) if gemma else (self.weight, self.variance_epsilon)
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, eps)


def router_in_float64(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = x.reshape(-1, self.hidden_dim) @ self.weight.T
    weights, chosen = logits.exp().div(logits.exp().sum(-1, keepdim=True)).topk(self.top_k, dim=-1)
    normalized = getattr(self, "norm_topk_prob", True)  # Mixtral's always are
    return logits, weights / weights.sum(-1, keepdim=True) if normalized else weights, chosen


def test_logits_loss_and_gradients_are_those_of_transformers(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch):
    theirs, folder = saved
    rows = tokens(theirs.config.vocab_size)
    single = our_model(folder)(rows[:, :-1]) - theirs(rows[:, :-1]).logits
    assert single.abs().max() <= 1e-5
    for module in theirs.modules():  # theirs round to float32 in float64
        for name, exact in (("RMSNorm", rms_norm_in_float64), ("TopKRouter", router_in_float64)):
            if type(module).__name__.endswith(name):
                monkeypatch.setattr(type(module), "forward", exact)
    theirs, ours = theirs.double(), our_model(folder, torch.float64)
    logits = theirs(rows[:, :-1]).logits
    assert (ours(rows[:, :-1]) - logits).abs().max() <= 1e-11
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    loss.backward()
    mine = linear_cross_entropy(
        ours.hidden(rows[:, :-1]).flatten(0, 1), ours.head_weight, rows[:, 1:].flatten(), ours.config.vocab_size
    )
    mine.backward()
    torch.testing.assert_close(mine, loss, rtol=1e-12, atol=0)
    gradients = {name: p.grad[: len(p)] for name, p in ours.named_parameters() if p.grad is not None}
    gradients = {n: g[: ours.config.vocab_size] if n in ours.padded_names else g for n, g in gradients.items()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    if ours.config.family == "gpt_neox":  # renamed when it is stored
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    expected = dict(stored_experts(expected, ours.config.family))
    exported = weights_to_hf(gradients, ours.config.family)
    assert exported.keys() == expected.keys()
    for name, gradient in exported.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10, msg=name)


def test_greedy_tokens_with_and_without_a_cache_are_those_of_transformers(saved: tuple[Any, Path]):
    theirs, folder = saved
    ours, prompt = our_model(folder).eval(), tokens(theirs.config.vocab_size)[:1, :7]
    expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = KVCache(ours.config, 1, 40, device=ours.device, dtype=ours.dtype)
    without = with_cache = prompt
    with torch.no_grad():
        step = prompt
        for _ in range(30):
            without = torch.cat((without, ours(without)[:, -1:].argmax(-1)), dim=1)
            step = ours(step, cache=cache)[:, -1:].argmax(-1)
            with_cache = torch.cat((with_cache, step), dim=1)
    assert without.tolist() == with_cache.tolist() == expected.tolist()


def test_export_of_an_import_has_the_same_bytes_and_opens_in_transformers(saved: tuple[Any, Path], tmp_path: Path):
    theirs, folder = saved
    ours = our_model(folder)
    settings = config_to_hf(ours.config, 1)
    assert config_from_hf(settings) == config_from_hf(json.loads((folder / "config.json").read_text())) == ours.config
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    exported = weights_to_hf(state_tensors(ours), ours.config.family)
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(settings))
    save_file(exported, again / "model.safetensors", {"format": "pt"})
    rebuilt = AutoModelForCausalLM.from_pretrained(again, attn_implementation="sdpa", **implementation(theirs.config))
    rows = tokens(theirs.config.vocab_size)
    assert torch.equal(rebuilt(rows).logits, theirs(rows).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_is_exported_and_what_it_cannot_is_refused(family: Any, tmp_path: Path):
    plain = ModelConfig(family, n_layer=3, n_head=4, n_embd=32, vocab_size=V, max_seq_len=16, n_inner=24)
    changes: list[dict[str, Any]] = [
        {},
        *({"bias": bias} for bias in ("all", "attention", "qkv", "mlp", "none")),
        {"window": 5},
        {"no_rope_every": 2},
        {"rope_fraction": 0.5},
        {"head_size": 6},
        {"n_expert_shared": 1},
        {"norm_topk": False},
        {"expert_bias": True},
        {"attention_scale_by_layer": True},
    ]
    exported, refused = 0, list[tuple[str, str]]()
    for number, change in enumerate(changes):
        try:
            config = replace(plain, **change)
        except UsageError:
            continue  # not a model of ours
        ours, folder = build_model(config=config, dtype=torch.float32).eval(), tmp_path / str(number)
        folder.mkdir()
        contents = config_to_hf(config, 1)
        try:
            refuse_other_model(config.resolved(), contents)
        except UserError as error:
            refused.append((str(error), f"model.{next(iter(change))} is "))
            continue
        (folder / "config.json").write_text(json.dumps(contents))
        save_file(weights_to_hf(state_tensors(ours), family), folder / "model.safetensors", {"format": "pt"})
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        rows = tokens(V)[:, :15]
        torch.testing.assert_close(theirs(rows).logits, ours(rows), rtol=1e-4, atol=1e-4, msg=str(change))
        exported += 1
    assert exported > 1
    assert all(named in sentence for sentence, named in refused)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, LLAMA3 | {"type": "llama3"}])
def test_rope_is_read_in_the_spelling_of_transformers_4(scaling: dict[str, Any]):
    base = TINY | {"model_type": "llama", "pad_token_id": 0}
    old = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type")}
    new = {"rope_type": scaling["type"], "rope_theta": 500.0} | {k: v for k, v in old.items() if k != "type"}
    assert config_from_hf(base | {"rope_theta": 500.0, "rope_scaling": old}) == config_from_hf(
        base | {"rope_parameters": new}
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "lama"}, "model_type 'lama'.*llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn', regpt implements default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no original_max_position_embeddings"),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "n_head = 6 is not divisible by model.n_kv_head = 4"),
        (
            {"model_type": "gemma3_text", "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            "regpt implements every k-th layer",
        ),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "softcapping = 30.0, regpt implements None"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}, "with and without a sliding window"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1, 1]}, "no_rope_layers"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step = 2, regpt implements 1 only"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers = \[0\], regpt implements \[\] only"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv = 8.0, regpt implements None only"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "n_expert_active is 9, but there are 8 experts"),
        ({"model_type": "gpt_neox", "use_parallel_residual": False}, "use_parallel_residual = False"),
    ],
)
def test_a_model_that_we_do_not_implement_is_refused_in_one_sentence(change: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence) as refused:
        config_from_hf(TINY | {"model_type": "llama"} | change)
    assert "\n" not in str(refused.value)
