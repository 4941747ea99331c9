"""Hugging Face's GPT-2 and ours: the same weights under other names, some transposed; nothing here touches a disk.

Their linear layers are `Conv1D`, OpenAI's name for a linear layer whose weight is (in, out); ours are `nn.Linear`,
(out, in). The rest is spelling: the prefix `transformer.`, and buffers that hold the causal mask in older files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.model.transformer import NORM_EPS

PREFIX = "transformer."
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"
READ = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those of 8 bits need scales
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# Our field: its key in config.json, the other spelling that transformers accepts, GPT-2's value when neither is there.
SHAPE_KEYS = {
    "n_layer": ("n_layer", "num_hidden_layers", 12),
    "n_head": ("n_head", "num_attention_heads", 12),
    "n_embd": ("n_embd", "hidden_size", 768),
    "vocab_size": ("vocab_size", "vocab_size", 50257),
    "max_seq_len": ("n_positions", "max_position_embeddings", 1024),
}
# What we implement of the fields that change the forward pass; a missing key has the same value in transformers.
IMPLEMENTED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The shape that the contents of a `config.json` describe.

    Raises:
        UserError: another architecture, a variant of GPT-2 that we do not implement, or a size that is no number.
    """
    if hf.get("model_type") != "gpt2":
        raise UserError(
            f"config.json has model_type {hf.get('model_type')!r}, regpt reads 'gpt2'; choose a GPT-2 model"
        )
    for key, implemented in IMPLEMENTED.items():
        if hf.get(key, implemented) != implemented:
            raise UserError(
                f"config.json has {key} = {hf[key]!r}, regpt implements {implemented!r} only; choose another model"
            )
    shape = {}
    for field, (key, alias, default) in SHAPE_KEYS.items():
        shape[field] = value = hf.get(key, hf.get(alias, default))
        if type(value) is not int:  # a bool is no size either
            raise UserError(f"config.json has {key} = {value!r}, which must be a whole number; repair the file")
    if hf.get("n_inner") not in (None, 4 * shape["n_embd"]):
        width = 4 * shape["n_embd"]
        raise UserError(
            f"config.json has n_inner = {hf['n_inner']!r}, regpt implements 4·n_embd = {width} only; "
            "choose another model"
        )
    return ModelConfig(**shape)


def config_to_hf(config: ModelConfig, eot: int) -> dict[str, Any]:
    """Contents of the `config.json` from which transformers builds this model; `eot` is the id of `<|endoftext|>`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(config, field) for field, (key, _, _) in SHAPE_KEYS.items()},
        "n_ctx": config.max_seq_len,  # read by older tools instead of n_positions
        "n_inner": None,
        **IMPLEMENTED,
        "initializer_range": 0.02,
        # Fine-tuning elsewhere then starts as training here ended. (Reading a model, we leave theirs out.)
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "bos_token_id": eot,
        "eos_token_id": eot,
        "use_cache": True,
        "dtype": "float32",
    }


class WeightsFromHF(Mapping[str, Tensor]):
    """Hugging Face's tensors under our names and in our layout, each read from `tensors` only when it is asked for.

    The tied weight may be stored as `wte.weight`, as `lm_head.weight`, or as both.

    Args:
        rows: of the token embedding as it is stored; with `n_vocab`, those from there on are padding and left out.

    Raises:
        UserError: a tensor that is there with and without prefix, or an `lm_head.weight` that differs from the token
            embedding: our head is tied to it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rows: int | None = None, n_vocab: int | None = None):
        self.tensors, self.rows, self.n_vocab = tensors, rows, n_vocab
        kept = [name for name in tensors if not is_mask(name)]
        self.theirs = {name.removeprefix(PREFIX): name for name in kept}
        if len(self.theirs) < len(kept):
            twice = next(name for name in kept if self.theirs[name.removeprefix(PREFIX)] != name)
            raise UserError(f"the weights hold {twice!r} with and without {PREFIX!r}; remove one of them")
        head = self.theirs.pop(HEAD, None)
        embedding = self.theirs.setdefault(EMBEDDING, head) if head else None
        if head and embedding and head != embedding and not torch.equal(tensors[head], tensors[embedding]):
            raise UserError(
                "the weights hold an lm_head.weight that differs from wte.weight, regpt ties the two; "
                "choose a model with a tied head"
            )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[self.theirs[name]]
        if tensor.dtype not in READ:
            raise UserError(
                f"weight {name!r} is stored as {tensor.dtype}, regpt reads floating point of 16 bits and more; "
                "choose a model that is not quantised"
            )
        if name == EMBEDDING and self.rows is not None:
            if tensor.shape[:1] != (self.rows,):
                raise UserError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, config.json has vocab_size {self.rows}; restore "
                    "the folder or choose another model"
                )
            tensor = tensor[: self.n_vocab]
        if not tensor.isfinite().all():
            raise UserError(f"weight {name!r} holds numbers that are not finite; choose another model")
        return transposed(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.theirs)

    def __len__(self) -> int:
        return len(self.theirs)


def weights_to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our `weights` under `GPT2LMHeadModel`'s names and in its layout, contiguous; the tied head is left out."""
    return {PREFIX + name: transposed(name, tensor).contiguous() for name, tensor in weights.items()}


def transposed(name: str, tensor: Tensor) -> Tensor:
    """`tensor` between `Conv1D` (in, out) and `nn.Linear` (out, in), either way; others as they are. A view."""
    return tensor.t() if CONV1D.fullmatch(name) and tensor.dim() == 2 else tensor


def is_mask(name: str) -> bool:
    """Whether `name` is a causal mask that older files store as a buffer of the attention."""
    return MASK_BUFFER.fullmatch(name.removeprefix(PREFIX)) is not None
