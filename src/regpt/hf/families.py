"""Hugging Face's models and ours: the same shapes in other spellings, as a table; nothing here touches a disk. The
weights: `hf.weights`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regpt.errors import UserError, nearest
from regpt.model.config import FAMILIES, ModelConfig

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
SIZES = {  # our field: its keys in config.json, of which the first is written
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "max_seq_len": ("max_position_embeddings",),
    "n_inner": ("intermediate_size",),
}
GROUPED = SIZES | {"n_kv_head": ("num_key_value_heads",), "head_size": ("head_dim",)}
CHOSEN = {"n_expert_active": ("num_experts_per_tok",)}
GPT2_SIZES = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "vocab_size": ("vocab_size",),
    "max_seq_len": ("n_positions", "max_position_embeddings"),
    "n_inner": ("n_inner",),
}
LAYER_KINDS, ROTATED = ("sliding_attention", "full_attention"), (1, 0)  # of most layers, and of every k-th
DERIVED = ("n_inner", "n_kv_head", "head_size")  # null or missing: what `ModelConfig.resolved` derives


@dataclass(frozen=True)
class Spelling:
    """How transformers spells a family.

    Attributes:
        architecture: the class in `architectures`.
        sizes: our field → keys that hold it.
        eps, activation: keys of the two.
        biases: keys of booleans: biases of attention, of MLPs; empty where the family decides.
        defaults: values of missing keys in transformers; a size of 0 is derived.
        fixed: keys that change the forward and their only implemented value, which a missing key has too.
        prefix: of all weights but the head's.
        embedding, head: names of the token embedding and of a head of its own.
        experts: names of a mixture of experts: of its module, of an expert's gate, up and down.
    """

    architecture: str
    defaults: Mapping[str, Any]
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: GROUPED)
    eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    biases: tuple[str, str] = ("", "")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = "model."
    embedding: str = "embed_tokens.weight"
    head: str = "lm_head.weight"
    experts: tuple[str, str, str, str] | None = None


LLAMA = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 2048}
QWEN = LLAMA | {"max_position_embeddings": 32768, "num_key_value_heads": 32}
SPELLINGS: dict[str, Spelling] = {  # by model_type, which is our family
    "gpt2": Spelling(
        "GPT2LMHeadModel",
        {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
        GPT2_SIZES,
        "layer_norm_epsilon",
        "activation_function",
        fixed={"scale_attn_weights": True, "add_cross_attention": False},
        prefix="transformer.",
        embedding="wte.weight",
    ),
    "llama": Spelling("LlamaForCausalLM", LLAMA, biases=("attention_bias", "mlp_bias")),
    "mistral": Spelling(
        "MistralForCausalLM",
        LLAMA | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Spelling("Qwen2ForCausalLM", QWEN),
    "qwen3": Spelling("Qwen3ForCausalLM", QWEN | {"head_dim": 128}, biases=("attention_bias", "")),
    "olmo2": Spelling("Olmo2ForCausalLM", LLAMA | {"rms_norm_eps": 1e-5}, biases=("attention_bias", "")),
    "smollm3": Spelling(
        "SmolLM3ForCausalLM",
        LLAMA
        | {"tie_word_embeddings": True, "max_position_embeddings": 32768, "num_key_value_heads": 4}
        | {"rope_theta": 2e6, "no_rope_layer_interval": 4},
        biases=("attention_bias", "mlp_bias"),
    ),
    "gpt_neox": Spelling(
        "GPTNeoXForCausalLM",
        {"tie_word_embeddings": False, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "max_position_embeddings": 2048}
        | {"rotary_pct": 0.25, "attention_bias": True},
        SIZES,
        "layer_norm_eps",
        biases=("attention_bias", ""),
        fixed={"use_parallel_residual": True},
        prefix="gpt_neox.",
        embedding="embed_in.weight",
        head="embed_out.weight",
    ),
    "gemma3_text": Spelling(
        "Gemma3ForCausalLM",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"}
        | {"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
        | {"sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        GROUPED | {"query_pre_attn_scalar": ("query_pre_attn_scalar",)},
        activation="hidden_activation",
        biases=("attention_bias", ""),
        fixed={"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "mixtral": Spelling(
        "MixtralForCausalLM",
        LLAMA
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6}
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
        GROUPED | {"n_expert": ("num_local_experts", "num_experts")} | CHOSEN,
        experts=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "olmoe": Spelling(
        "OlmoeForCausalLM",
        LLAMA
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8}
        | {"norm_topk_prob": False},
        SIZES | {"n_kv_head": ("num_key_value_heads",), "n_expert": ("num_experts", "num_local_experts")} | CHOSEN,
        biases=("attention_bias", ""),
        fixed={"clip_qkv": None},
        experts=("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    "qwen3_moe": Spelling(
        "Qwen3MoeForCausalLM",
        LLAMA
        | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 768, "norm_topk_prob": False, "use_sliding_window": False},
        GROUPED | {"n_inner": ("moe_intermediate_size",), "n_expert": ("num_experts", "num_local_experts")} | CHOSEN,
        biases=("attention_bias", ""),
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},  # experts in every layer
        experts=("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
}


def spelling_of(model_type: object) -> Spelling:
    if model_type not in SPELLINGS:
        near = nearest(str(model_type), list(SPELLINGS))
        raise UserError(
            f"config.json has model_type {model_type!r}{near}, regpt reads {', '.join(SPELLINGS)}; choose such a model"
        )
    return SPELLINGS[str(model_type)]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The shape that the contents of a `config.json` describe.

    Raises:
        UserError: another architecture, a variant that we do not implement, or a value of the wrong type.
    """
    family = str(hf.get("model_type"))
    spelling = spelling_of(hf.get("model_type"))
    values = {**spelling.defaults, **hf}
    for key, implemented in spelling.fixed.items():
        if hf.get(key, implemented) != implemented and (implemented or hf[key] is not None):  # null: false, or empty
            raise UserError(
                f"config.json has {key} = {hf[key]!r}, regpt implements {implemented!r} only; choose another model"
            )
    if hf.get("quantization_config"):
        raise UserError("config.json has a quantization_config, regpt reads weights that are not quantized only")
    shape: dict[str, Any] = {name: size_of(values, hf, keys, name) for name, keys in spelling.sizes.items()}
    act = values[spelling.activation]
    if act not in ACTIVATIONS:
        raise UserError(
            f"config.json has {spelling.activation} = {act!r}, regpt implements {', '.join(ACTIVATIONS)}; choose "
            "another model"
        )
    shape |= {"activation": ACTIVATIONS[act], "norm_eps": float(values[spelling.eps]), "bias": bias_of(family, values)}
    shape |= {"tie_embeddings": values["tie_word_embeddings"] is True}
    if FAMILIES[family].layered:
        shape |= layers_of(values, shape["n_layer"])
        values = {**values, "rope_parameters": (values.get("rope_parameters") or {}).get("full_attention")}
    else:
        shape["window"] = window_of(values)
    if shape["window"] > shape["max_seq_len"]:
        shape["window"] = 0  # no row is that long
    if family == "gpt2":
        shape["attention_scale_by_layer"] = values.get("scale_attn_by_inverse_layer_idx") is True
    if FAMILIES[family].rotary:
        shape |= rope_of(values)
    if family == "smollm3":
        shape["no_rope_every"] = every_kth(
            values, "no_rope_layers", shape["n_layer"], ROTATED, values["no_rope_layer_interval"]
        )
    if "norm_topk_prob" in spelling.defaults:
        shape["norm_topk"] = values["norm_topk_prob"] is True
    return ModelConfig(family=family, **shape).normalized()  # pyright: ignore[reportArgumentType]


def size_of(values: Mapping[str, Any], hf: Mapping[str, Any], keys: tuple[str, ...], name: str) -> int:
    """The size under the first of `keys` that the file has, else transformers' default."""
    key = next((key for key in keys if key in hf), keys[0])
    value = values.get(key)
    if value is None and name in DERIVED:
        return 0
    if type(value) is not int:  # a bool is no size either
        raise UserError(f"config.json has {key} = {value!r}, which must be a whole number; repair the file")
    return value


def bias_of(family: str, values: Mapping[str, Any]) -> str:
    """`ModelConfig.bias` from the booleans of the family's spelling."""
    attention, mlp = SPELLINGS[family].biases
    if not attention:
        return FAMILIES[family].bias
    with_attention = bool(values.get(attention))
    with_mlp = bool(values.get(mlp)) if mlp else FAMILIES[family].bias == "all"
    return {(True, True): "all", (True, False): "attention", (False, True): "mlp"}.get(
        (with_attention, with_mlp), "none"
    )


def window_of(values: Mapping[str, Any]) -> int:
    """Keys that a query sees; 0: all."""
    window, kinds = values.get("sliding_window"), set(values.get("layer_types") or ())
    if not window or values.get("use_sliding_window") is False or kinds == {"full_attention"}:
        return 0
    some = "use_sliding_window" in values and values.get("model_type") != "qwen3_moe"  # whose layers are alike
    if len(kinds) > 1 or (some and kinds != {"sliding_attention"}):
        raise UserError(
            "config.json has layers with and without a sliding window, regpt implements one kind a model; choose "
            "another model"
        )
    return int(window)


def layers_of(values: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """Our fields of layers with and without a window, and of the rotation of the former."""
    rope = (values.get("rope_parameters") or {}).get("sliding_attention") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"config.json stretches the rotation of layers with a window ({rope['rope_type']!r}), which regpt does not "
            "implement; choose another model"
        )
    theta = float(rope.get("rope_theta", values["rope_local_base_freq"]))
    every = every_kth(values, "layer_types", n_layer, LAYER_KINDS, values["sliding_window_pattern"])
    return {"full_attention_every": every, "window": values["sliding_window"], "rope_local_theta": theta}


def every_kth(values: Mapping[str, Any], key: str, n_layer: int, kinds: tuple[Any, Any], default: int) -> int:
    """k where the list under `key` has the second of `kinds` for every k-th layer, 0 where for none."""
    found = values.get(key)
    if not found:
        return default
    every = found.index(kinds[1]) + 1 if kinds[1] in found else 0
    if found != each_layer(every, n_layer, kinds):
        raise UserError(f"config.json has {key} = {found}, regpt implements every k-th layer; choose another model")
    return every


def each_layer(every: int, n_layer: int, kinds: tuple[Any, Any]) -> list[Any]:
    return [kinds[every > 0 and (layer + 1) % every == 0] for layer in range(n_layer)]


def rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of rotary positions, of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    given = {**old, **new}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(
            f"config.json has the rope type {kind!r}, regpt implements default, linear and llama3; choose another model"
        )
    theta = given.get("rope_theta", values.get("rope_theta", values.get("rotary_emb_base", 10_000.0)))
    share = given.get("partial_rotary_factor", values.get("partial_rotary_factor", values.get("rotary_pct", 1.0)))
    rope = {"rope_theta": float(theta), "rope_fraction": float(share), "rope_type": kind}
    if kind != "default":
        rope["rope_factor"] = float(given.get("factor", 0))
    if kind == "llama3":
        longest = given.get("original_max_position_embeddings", values.get("original_max_position_embeddings"))
        if type(longest) is not int:
            raise UserError(
                "config.json has rope type llama3, but no original_max_position_embeddings; repair the file"
            )
        rope["rope_original_max_seq_len"] = longest
        rope |= {f"rope_{key}": float(given.get(key, 0)) for key in ("low_freq_factor", "high_freq_factor")}
    return rope


def config_to_hf(config: ModelConfig, eot: int, dtype: str = "float32", ends: Sequence[int] = ()) -> dict[str, Any]:
    """Contents of the `config.json` from which transformers 4 and 5 build this model; `eot` is the id of the token
    that starts a document, which also ends a text unless `ends` are given. `export` refuses what it cannot describe.
    """
    spelling, shape = SPELLINGS[config.family], config.resolved()
    usual = spelling.defaults[spelling.activation]  # of two spellings of one function the family's
    acts = (name for name, ours in ACTIVATIONS.items() if ours == shape.activation)
    act = usual if ACTIVATIONS[usual] == shape.activation else next(acts)
    contents: dict[str, Any] = {
        "architectures": [spelling.architecture],
        "model_type": config.family,
        **{keys[0]: getattr(shape, name) for name, keys in spelling.sizes.items()},
        **spelling.fixed,
        spelling.activation: act,
        spelling.eps: shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": eot,
        "eos_token_id": one_or_list(ends or (eot,)),
        "pad_token_id": None,  # transformers has a token of its own for some families
        "use_cache": True,
        "dtype": dtype,
    }
    attention, mlp = spelling.biases
    if attention:
        contents[attention] = shape.bias in ("all", "attention")
    if mlp:
        contents[mlp] = shape.bias in ("all", "mlp")
    if "norm_topk_prob" in spelling.defaults:
        contents["norm_topk_prob"] = shape.norm_topk
    return contents | (gpt2_keys(shape) if config.family == "gpt2" else rotary_keys(shape))


def one_or_list(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def gpt2_keys(shape: ModelConfig) -> dict[str, Any]:
    return {
        "n_ctx": shape.max_seq_len,  # read by older tools instead of n_positions
        "n_inner": None if shape.n_inner == 4 * shape.n_embd else shape.n_inner,
        "scale_attn_by_inverse_layer_idx": shape.attention_scale_by_layer,
        "reorder_and_upcast_attn": False,  # another order of the same sums, in float32 always here
        # Fine-tuning elsewhere then starts as training here ended. (Reading a model, we leave theirs out.)
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape.dropout),
    }


def rotary_keys(shape: ModelConfig) -> dict[str, Any]:
    """Keys of positions and windows as transformers 4 spells them, which 5 reads too."""
    keys: dict[str, Any] = {"rope_theta": shape.rope_theta, "attention_dropout": shape.dropout}
    if shape.family == "gpt_neox":
        keys = {"rotary_emb_base": shape.rope_theta, "rotary_pct": shape.rope_fraction}
        keys |= {"attention_dropout": shape.dropout, "hidden_dropout": shape.dropout}
    scaling: dict[str, Any] = {"rope_type": shape.rope_type, "factor": shape.rope_factor}
    if shape.rope_type == "llama3":
        scaling |= {
            "low_freq_factor": shape.rope_low_freq_factor,
            "high_freq_factor": shape.rope_high_freq_factor,
            "original_max_position_embeddings": shape.rope_original_max_seq_len,
        }
    keys["rope_scaling"] = None if shape.rope_type == "default" else scaling
    if shape.family in ("mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen3_moe"):
        keys["sliding_window"] = shape.window or None
    if shape.family == "gemma3_text":
        keys["sliding_window"] = shape.window or shape.max_seq_len
        keys["rope_local_base_freq"] = shape.rope_local_theta or shape.rope_theta
        keys["sliding_window_pattern"] = shape.full_attention_every or shape.n_layer + 1
        keys["layer_types"] = each_layer(shape.full_attention_every, shape.n_layer, LAYER_KINDS)
    if shape.family in ("qwen2", "qwen3", "smollm3"):
        kind = "sliding_attention" if shape.window else "full_attention"
        keys |= {
            "use_sliding_window": bool(shape.window),
            "max_window_layers": 0,
            "layer_types": [kind] * shape.n_layer,
        }
    if shape.family == "qwen3_moe":
        keys |= {"use_sliding_window": bool(shape.window), "intermediate_size": shape.n_inner}
    if shape.family == "smollm3":
        every = shape.no_rope_every
        keys["no_rope_layers"] = each_layer(every, shape.n_layer, ROTATED)
        keys["no_rope_layer_interval"] = every or shape.n_layer + 1
    return keys
