"""A `config.json` against the tensors next to it, by their headers: nothing is read and no memory is taken."""

import re
from collections.abc import Mapping
from pathlib import Path

from regpt.errors import UserError
from regpt.hf.families import SPELLINGS
from regpt.hf.weights import CONV1D, is_buffer
from regpt.model.transformer import Transformer
from regpt.model.weights import real_shape

FLOATING = ("F64", "F32", "F16", "BF16")
PREFIX = re.compile("|".join(re.escape(one.prefix) for one in SPELLINGS.values()))
LAYER = re.compile(r"(?:h|layers)\.(\d+)\.")
SIZES = (  # of a name: the fields of `ModelConfig` that decide its two dimensions
    (r"embed_tokens|embed_in|embed_out|lm_head|wte", ("vocab_size", "n_embd")),
    (r"wpe", ("max_seq_len", "n_embd")),
    (r"gate_proj|up_proj|c_fc|dense_h_to_4h", ("n_inner", "n_embd")),
    (r"down_proj|mlp\.c_proj|dense_4h_to_h", ("n_embd", "n_inner")),
    (r"q_proj|q_norm", ("n_head", "n_embd")),
    (r"[kv]_proj|k_norm", ("n_kv_head", "n_embd")),
    (r"o_proj", ("n_embd", "n_head")),
)


def bare(name: str) -> str:
    """`name` of a tensor without the prefix of its family."""
    found = PREFIX.match(name)
    return name[found.end() :] if found else name


def refuse_quantized(dtypes: Mapping[str, str], folder: Path) -> None:
    """Raise a UserError for a weight that is stored in whole numbers or 8 bits."""
    for name, dtype in dtypes.items():
        if dtype not in FLOATING and not is_buffer(bare(name)):
            raise UserError(
                f"model {str(folder)!r} is quantized: its tensor {name!r} is stored as {dtype}, regpt reads floating "
                "point of 16 bits and more; choose the model before it was quantized"
            )


def check_shapes(model: Transformer, stored: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise a UserError that names a tensor and the key of config.json that contradicts its shape."""
    shape, sizes = model.config.resolved(), SPELLINGS[model.config.family].sizes
    names = {bare(name): name for name in stored if not is_buffer(bare(name))}
    layers = {int(found[1]): name for name in names if (found := LAYER.match(name))}
    missing = [name for k in range(shape.n_layer) if k not in layers for name in own_names(model, k)]
    if extra := [name for k, name in layers.items() if k >= shape.n_layer]:
        raise contradiction(folder, sizes["n_layer"][0], shape.n_layer, f"the weights hold {names[extra[0]]!r}")
    if layers and missing:
        raise contradiction(folder, sizes["n_layer"][0], shape.n_layer, f"the weights lack {missing[0]!r}")
    for name, parameter in model.named_parameters():
        wanted, turned = real_shape(model, name, parameter), CONV1D.fullmatch(name) is not None
        found = stored.get(names.get(name, ""), wanted[::-1] if turned else wanted)
        found = found[::-1] if turned else found
        differing = [k for k, (one, other) in enumerate(zip(found, wanted)) if one != other]
        if not differing or (name in model.padded_names and differing == [0]):  # of which the reader has a sentence
            continue
        key = field_of(name, differing[0])
        raise contradiction(
            folder,
            sizes.get(key, (key,))[0],
            getattr(shape, key),
            f"tensor {names[name]!r} has shape {found[::-1] if turned else found}, which should be "
            f"{wanted[::-1] if turned else wanted}",
        )


def own_names(model: Transformer, layer: int) -> list[str]:
    found = ((name, LAYER.match(name)) for name, _ in model.named_parameters())
    return [name for name, match in found if match and int(match[1]) == layer]


def field_of(name: str, dim: int) -> str:
    """The field of `ModelConfig` that decides dimension `dim` of our tensor `name`."""
    fields = next((fields for pattern, fields in SIZES if re.search(pattern, name)), ("n_embd", "n_embd"))
    return fields[dim]


def contradiction(folder: Path, key: str, value: object, what: str) -> UserError:
    return UserError(
        f"model {str(folder)!r} contradicts itself: config.json has {key} = {value}, but {what}; restore the folder or "
        "choose another model"
    )
