"""llama.cpp's architectures that compute our families: names of tensors, and what is fixed in its code."""

from collections.abc import Mapping
from dataclasses import dataclass

GPT2_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
LLAMA_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
OLMO_NAMES = LLAMA_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA_NAMES = LLAMA_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Arch:
    """An architecture of llama.cpp.

    Attributes:
        family: ours, of a file.
        names: our modules → theirs.
        interleaved: rotated pairs are (2i, 2i + 1) of a head, so that rows of q and k have another order than ours.
        biases: values of `ModelConfig.bias` that it implements.
        square: n_head · head_size must be n_embd.
        own_head: a head must be stored, also where it is the embedding.
        no_rope_every: fixed in their code.
        activation: of its MLPs.
        offset: what its norms' weights are larger by than ours.
        windows: layers have windows as Gemma's, and keys for them.
    """

    family: str
    names: Mapping[str, str]
    interleaved: bool = False
    biases: tuple[str, ...] = ("none",)
    square: bool = False
    own_head: bool = False
    no_rope_every: int = 0
    activation: str = "silu"
    offset: float = 0.0
    windows: bool = False


LLAMA = Arch("llama", LLAMA_NAMES, interleaved=True, biases=("none", "all", "attention", "mlp", "qkv"))
ARCHS: dict[str, Arch] = {
    "gpt2": Arch(
        "gpt2", GPT2_NAMES, biases=("all", "attention", "qkv", "mlp", "none"), square=True, activation="gelu_tanh"
    ),
    "llama": LLAMA,
    "qwen2": Arch("qwen2", LLAMA_NAMES, biases=("qkv",), square=True),
    "qwen3": Arch("qwen3", LLAMA_NAMES | QK_NORM),
    "olmo2": Arch("olmo2", OLMO_NAMES | QK_NORM, square=True, own_head=True),
    "smollm3": Arch("smollm3", LLAMA_NAMES, interleaved=True, square=True, no_rope_every=4),
    "gemma3": Arch("gemma3_text", GEMMA_NAMES | QK_NORM, activation="gelu_tanh", offset=1.0, windows=True),
}
ARCH_OF = {arch.family: name for name, arch in ARCHS.items()} | {"mistral": "llama"}  # family → architecture
