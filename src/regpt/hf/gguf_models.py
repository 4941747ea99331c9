"""Our models as files of llama.cpp's architectures: keys and tensors, either way (llama.cpp's convert_hf_to_gguf.py and
llama-model.cpp are the only definition)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.hf.gguf import TYPES, GGUFFile, write_gguf
from regpt.hf.gguf_archs import ARCH_OF, ARCHS, Arch
from regpt.hf.gguf_tokenizer import tokenizer_to_gguf
from regpt.hf.weights import GPT2_BIASED
from regpt.model.config import ModelConfig
from regpt.model.layers import rope_frequencies
from regpt.model.transformer import Transformer
from regpt.model.weights import state_tensors
from regpt.text.tokenizer import Tokenizer

BLOCK = re.compile(r"(?:h|layers)\.(\d+)\.(.+)\.(weight|bias)")
THEIR_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
TYPES_OF_EMBEDDINGS = {"tq2_0": "f16"}  # of embedding and head, where theirs is another than the blocks'
FREQUENCIES = "rope_freqs.weight"  # divisors of the rotation's frequencies: how llama.cpp has Llama 3's stretching
# Its parameters, from which the divisors follow; files of others hold the divisors alone.
STRETCH = ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len")


def export_gguf(
    model: Transformer,
    tokenizer: Tokenizer,
    path: Path,
    kind: str,
    chat_template: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Write `model`, or another of its shape with `weights`, as a GGUF file whose matrices have the type `kind`;
    returns the tensors that have f16 instead, because the blocks of `kind` do not divide their rows.

    Raises:
        UserError: llama.cpp has no such model or tokenizer, or the file cannot be written.
    """
    metadata = config_to_gguf(model.config) | tokenizer_to_gguf(tokenizer, model.config.vocab_size)
    metadata |= {"general.file_type": TYPES[kind].file_type, "general.quantization_version": 2}  # GGML_QNT_VERSION
    metadata |= {"tokenizer.chat_template": chat_template} if chat_template else {}
    tensors = weights_to_gguf(weights or state_tensors(model), model.config, kind)
    write_gguf(path, metadata, tensors)
    return [name for name, (_, given) in tensors.items() if given == "f16" not in (kind, TYPES_OF_EMBEDDINGS.get(kind))]


def arch_of(config: ModelConfig) -> str:
    """The architecture that computes what a model of `config` does.

    Raises:
        UserError: there is none.
    """
    shape, name = config.resolved(), ARCH_OF.get(config.family)
    arch = ARCHS.get(name or "")
    checks = {
        f"model.family {config.family}": arch is None,
        f"model.activation {shape.activation}": arch is not None and shape.activation != arch.activation,
        "model.attention_scale_by_layer": shape.attention_scale_by_layer,
        f"model.rope_fraction {shape.rope_fraction:g}": shape.rope_fraction != 1,
    }
    if arch and arch.windows:
        checks |= {
            "model.window 0": shape.window == 0,
            "model.full_attention_every 0": shape.full_attention_every == 0,
            f"model.query_pre_attn_scalar {shape.query_pre_attn_scalar}": shape.query_pre_attn_scalar
            != gemma_scalar(shape.n_layer, shape.n_embd, shape.n_head, shape.head_size),
        }
    elif 0 < shape.window < shape.max_seq_len:
        checks |= {f"model.window {shape.window}, below model.max_seq_len": True}
    if arch:
        checks |= {
            f"model.bias {shape.bias}": shape.bias not in arch.biases,
            f"model.no_rope_every {shape.no_rope_every}": shape.no_rope_every != arch.no_rope_every,
            "heads that are not n_embd wide together": arch.square and shape.n_head * shape.head_size != shape.n_embd,
        }
    for reason, fails in checks.items():
        if fails:
            raise UserError(
                f"llama.cpp has no architecture that computes this model, with {reason}; GGUF is written of "
                f"{', '.join(ARCH_OF)} as published, choose --format hf"
            )
    assert name is not None
    return name


def gemma_scalar(n_layer: int, n_embd: int, n_head: int, head_size: int) -> int:
    """`query_pre_attn_scalar` in llama.cpp, which knows Gemma 3's 27B by its layers."""
    return n_embd // n_head if n_layer == 62 else head_size


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """Keys that describe `config`, those of the architecture after its name."""
    name, shape = arch_of(config), config.resolved()
    keys: dict[str, Any] = {
        "context_length": shape.max_seq_len,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_inner,
        "block_count": shape.n_layer,
        "vocab_size": shape.vocab_size,
        "attention.head_count": shape.n_head,
    }
    if shape.family == "gpt2":
        keys["attention.layer_norm_epsilon"] = float(shape.norm_eps)
    else:
        keys |= {"attention.head_count_kv": shape.n_kv_head, "attention.layer_norm_rms_epsilon": float(shape.norm_eps)}
        keys |= dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"), shape.head_size
        )
        keys["rope.freq_base"] = float(shape.rope_theta)
    if ARCHS[name].windows:
        keys["attention.sliding_window"] = shape.window
        keys["attention.sliding_window_pattern"] = shape.full_attention_every
        keys["rope.freq_base_swa"] = float(shape.rope_local_theta or shape.rope_theta)
    if shape.rope_type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(shape.rope_factor)}
    described = {"general.architecture": name} | {f"{name}.{key}": value for key, value in keys.items()}
    if shape.rope_type == "llama3":
        described |= {f"regpt.{key}": getattr(shape, key) for key in STRETCH}
    return described


def weights_to_gguf(weights: Mapping[str, Tensor], config: ModelConfig, kind: str) -> dict[str, tuple[Tensor, str]]:
    """Our `weights` under their names, each with its type: matrices have `kind`, or f16 where its blocks do not divide
    their rows; norms, biases and positions f32, as llama.cpp writes them."""
    name, shape = arch_of(config), config.resolved()
    made: dict[str, Tensor] = {}
    if config.family == "gpt2":  # theirs has all biases
        biased = {n.removesuffix("weight") + "bias": w for n, w in weights.items() if GPT2_BIASED.fullmatch(n)}
        weights = {n: w.new_zeros(len(w)) for n, w in biased.items()} | {**weights}
    for ours, tensor in weights.items():
        theirs = their_name(ours, ARCHS[name])
        tensor = permuted(theirs, tensor, shape, back=False) if ARCHS[name].interleaved else tensor
        made[theirs] = tensor.float() + ARCHS[name].offset if is_offset(theirs, ARCHS[name]) else tensor
    if ARCHS[name].own_head:
        made.setdefault("output.weight", made["token_embd.weight"])
    if config.rope_type == "llama3":
        made[FREQUENCIES] = divisors(config)
    return {n: (t, type_for(n, t, kind)) for n, t in made.items()}


def is_offset(theirs: str, arch: Arch) -> bool:
    return bool(arch.offset) and theirs.endswith("norm.weight")


def type_for(name: str, tensor: Tensor, kind: str) -> str:
    if tensor.dim() < 2 or name == "position_embd.weight":
        return "f32"
    if name in ("token_embd.weight", "output.weight") and kind in TYPES_OF_EMBEDDINGS:
        return TYPES_OF_EMBEDDINGS[kind]
    if kind == "tq2_0" and tensor.size(-1) % TYPES[kind].block:
        raise UserError(
            f"{name} has rows of {tensor.size(-1)} numbers, llama.cpp's tq2_0 has blocks of {TYPES[kind].block}; "
            "choose another --type"
        )
    return "f16" if tensor.size(-1) % TYPES[kind].block else kind


def their_name(name: str, arch: Arch) -> str:
    if found := BLOCK.fullmatch(name):
        return f"blk.{found[1]}.{arch.names[found[2]]}.{found[3]}"
    module, _, kind = name.rpartition(".")
    return f"{arch.names[module]}.{kind}"


def permuted(name: str, tensor: Tensor, shape: ModelConfig, *, back: bool) -> Tensor:
    """Rows of q and k from our order, halves of a head, to interleaved pairs, or `back`; others as they are."""
    heads = {"attn_q": shape.n_head, "attn_k": shape.n_kv_head}.get(name.split(".")[-2], 0)
    if not heads or tensor.size(0) % (2 * heads):
        return tensor
    half = tensor.size(0) // heads // 2
    rows = tensor.unflatten(0, (heads, half, 2) if back else (heads, 2, half))
    return rows.transpose(1, 2).reshape(tensor.shape)


def divisors(config: ModelConfig) -> Tensor:
    """(D/2,) by which Llama 3's stretching divides each frequency."""
    plain = ModelConfig(n_head=1, n_embd=config.rotated_size, family="llama", rope_theta=config.rope_theta)
    cpu = torch.device("cpu")
    return rope_frequencies(plain, cpu) / rope_frequencies(config, cpu)


class GGUFWeights(Mapping[str, Tensor]):
    """Our names → the tensors of a file, each read when it is asked for; `n_vocab` rows of embedding and head.

    Raises:
        UserError: a tensor that the architecture does not have.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, n_vocab: int) -> None:
        self.file, self.shape, self.n_vocab = file, config.resolved(), n_vocab
        self.arch = ARCHS[file.metadata["general.architecture"]]
        ours = {theirs: module for module, theirs in self.arch.names.items()}
        self.theirs: dict[str, str] = {}
        for name in file:
            found = THEIR_BLOCK.fullmatch(name)
            part, kind = found.group(2, 3) if found else name.rpartition(".")[::2]
            if name == FREQUENCIES and config.rope_type == "llama3":
                continue
            if part not in ours:
                raise file.error(f"has the tensor {name!r}, which regpt's model lacks", "choose another model")
            blocks = "h" if self.arch.family == "gpt2" else "layers"
            self.theirs[f"{blocks}.{found[1]}.{ours[part]}.{kind}" if found else f"{ours[part]}.{kind}"] = name

    def __getitem__(self, name: str) -> Tensor:
        theirs = self.theirs[name]
        tensor = self.file[theirs]
        if theirs in ("token_embd.weight", "output.weight"):
            return tensor[: self.n_vocab]
        tensor = permuted(theirs, tensor, self.shape, back=True) if self.arch.interleaved else tensor
        return tensor - self.arch.offset if is_offset(theirs, self.arch) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.theirs)

    def __len__(self) -> int:
        return len(self.theirs)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The shape that a file describes, with as many tokens as its embedding has rows.

    Raises:
        UserError: an architecture or a variant that regpt does not implement, a missing key, a contradiction.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHS:
        raise file.error(f"has the architecture {name!r}, regpt reads {', '.join(ARCHS)}", "choose another model")
    if file.metadata.get("general.type") == "adapter":
        raise file.error("holds adapters without a model", "give the base, or the run that they are from")
    arch, keys = ARCHS[name], Keys(file, name)
    sizes = {field: keys.size(key) for field, key in SIZES.items()}
    if "token_embd.weight" not in file.stored:
        raise file.error("has no token_embd.weight, so it is no language model", "choose another model")
    rows = file.stored["token_embd.weight"].shape[0]
    if keys.size("vocab_size", rows) != rows:
        raise file.error(
            f"contradicts itself: {name}.vocab_size is {keys.size('vocab_size')}, its embedding has {rows} rows"
        )
    values: dict[str, Any] = {**sizes, "family": arch.family, "vocab_size": rows, "bias": bias_of(file, arch)}
    values |= {"tie_embeddings": "output.weight" not in file.stored, "no_rope_every": arch.no_rope_every}
    if arch.family == "gpt2":
        values["norm_eps"] = keys.number("attention.layer_norm_epsilon")
        return ModelConfig(**values).normalized()
    values["n_kv_head"] = keys.size("attention.head_count_kv", sizes["n_head"])
    values["norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    values["rope_theta"] = keys.number("rope.freq_base", 10_000.0)
    values["head_size"] = size = keys.size("attention.key_length", sizes["n_embd"] // max(sizes["n_head"], 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, size) != size:
            what = f"has {name}.{key} = {keys.size(key)} and heads of {size}, regpt implements one size only"
            raise file.error(what, "choose another model")
    values |= windows_of(keys, values) if arch.windows else {}
    return ModelConfig(**values, **scaling_of(file, keys, values)).normalized()


def windows_of(keys: "Keys", values: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of Gemma 3's layers; the defaults are llama.cpp's."""
    sizes = (values[name] for name in ("n_layer", "n_embd", "n_head", "head_size"))
    return {
        "window": keys.size("attention.sliding_window", 0),
        "full_attention_every": keys.size("attention.sliding_window_pattern", 6),
        "rope_local_theta": keys.number("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": gemma_scalar(*sizes),
    }


SIZES = {
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
    "max_seq_len": "context_length",
    "n_inner": "feed_forward_length",
}


@dataclass(frozen=True)
class Keys:
    """The keys of a file's architecture."""

    file: GGUFFile
    arch: str

    def size(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # one a layer
            value = value[0]
        if type(value) is not int:
            raise self.file.error(f"has {self.arch}.{key} = {value!r}, which must be a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if type(value) is not float:
            raise self.file.error(f"has {self.arch}.{key} = {value!r}, which must be a number")
        return value


def bias_of(file: GGUFFile, arch: Arch) -> str:
    """Which linear layers have biases, of the tensors of the first block."""
    if arch.family == "gpt2":
        return "all"
    has = {part for part in ("attn_q", "attn_output", "ffn_up") if f"blk.0.{part}.bias" in file.stored}
    mlp = "ffn_up" in has
    if "attn_output" in has:
        return "all" if mlp else "attention"
    return "qkv" if "attn_q" in has else "mlp" if mlp else "none"


def scaling_of(file: GGUFFile, keys: Keys, values: dict[str, Any]) -> dict[str, Any]:
    """Our fields of stretched rotation."""
    kind = file.metadata.get(f"{keys.arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise file.error(
            f"has the rope scaling {kind!r}, regpt reads none, linear and Llama 3's", "choose another model"
        )
    if kind == "linear":
        return {"rope_type": "linear", "rope_factor": keys.number("rope.scaling.factor")}
    if FREQUENCIES not in file.stored:
        return {}
    given = file[FREQUENCIES].flatten()
    own = {key: file.metadata.get(f"regpt.{key}") for key in STRETCH}
    known = [type(value) for value in own.values()] == [float, float, float, int]
    stretch: dict[str, Any] = {"rope_type": "llama3"} | (own if known else stretch_of(given, values))
    expected = divisors(ModelConfig(**values, **stretch))
    if given.shape != expected.shape or not torch.allclose(given, expected, rtol=1e-4, atol=0):
        raise file.error(f"contradicts itself: {FREQUENCIES} is not how Llama 3 stretches", "choose another model")
    return stretch


def stretch_of(given: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of Llama 3's stretching from its divisors, its factors of frequency being 1 and 4 as published: the
    longest row of before follows from a wavelength that is stretched in part."""
    plain = ModelConfig(n_head=1, n_embd=values["head_size"], family="llama", rope_theta=values["rope_theta"])
    waves = 2 * torch.pi / rope_frequencies(plain, torch.device("cpu")).double()
    factor = float(f"{max(float(given.max()), 1.0):.5g}")
    between = (given > 1.001) & (given < factor * 0.999) if len(given) == len(waves) else given > torch.inf
    longest = 8192  # Llama 3's
    if between.any():
        kept = (1 / given[between].double() - 1 / factor) / (1 - 1 / factor)
        longest = round(float((waves[between] * (1 + 3 * kept)).median()))
    return dict(zip(STRETCH, (factor, 1.0, 4.0, longest)))
