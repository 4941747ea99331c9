"""Adapters as a folder of peft's: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from regpt.errors import UsageError, UserError
from regpt.files import exists, is_folder, resolved, whole_folder, write_json
from regpt.hf.families import SPELLINGS
from regpt.model.adapter_config import HEAD, AdapterConfig
from regpt.structured import read_object
from regpt.tensors import REMEDY, TensorFiles, write_tensors

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "regpt.json"
PREFIX = "base_model.model."
# Ends of names: ours and peft's.
SPELLED = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight", ".lora_magnitude": ".lora_magnitude_vector"}
# Settings that change what is computed and that are not implemented here; other values than these are refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


class PeftAdapter(NamedTuple):
    """What such a folder holds, in our names.

    Attributes:
        base: MODEL that it is for.
        base_sha256: of its weights (`checkpoint.base.hash_weights`), where regpt wrote the folder; else "".
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    base: str
    base_sha256: str


def to_peft(name: str, family: str) -> str:
    """peft's name of our adapter tensor `name`."""
    module, _, kind = name.rpartition(".")
    spelling = SPELLINGS[family]
    prefix = "" if f"{module}.weight" == spelling.head else spelling.prefix
    return f"{PREFIX}{prefix}{module}{SPELLED[f'.{kind}']}"


def from_peft(name: str, family: str) -> str:
    """Our name of peft's tensor `name`.

    Raises:
        UserError: it is no tensor of an adapter of a linear layer.
    """
    for ours, theirs in SPELLED.items():
        if name.startswith(PREFIX) and name.endswith(theirs):
            return name.removeprefix(PREFIX).removesuffix(theirs).removeprefix(SPELLINGS[family].prefix) + ours
    raise UserError(
        f"{WEIGHTS} holds {name!r}, regpt reads adapters of linear layers alone (no embeddings, biases, modules); "
        "merge them with peft's merge_and_unload and open that model"
    )


def export_peft(
    config: AdapterConfig, tensors: Mapping[str, Tensor], family: str, base: str, base_sha256: str, folder: Path
) -> Path:
    """Write the adapters `tensors` of the model `base` as `folder`, whole or not at all; returns it.

    Raises:
        UserError: the folder is not empty, or an embedding is adapted.
    """
    folder = resolved(folder)
    if exists(folder) and not (is_folder(folder) and not any(folder.iterdir())):
        raise UserError(
            f"{str(folder)!r} exists and is not empty, an export needs a new folder; choose another --out or delete it"
        )
    embedding = SPELLINGS[family].embedding.removesuffix("weight") + "lora_A"
    if embedding in tensors:
        raise UserError(
            "the embedding is adapted, which peft stores in another form; export the merged model with --format hf"
        )
    names = {name: to_peft(name, family) for name in tensors}
    modules = sorted({name.removeprefix(PREFIX).removesuffix(SPELLED[".lora_A"]) for name in names.values()
                      if name.endswith(SPELLED[".lora_A"])})  # fmt: skip
    with whole_folder(folder) as temporary:
        write_json(temporary / CONFIG, peft_config(config, modules, base, family == "gpt2"))
        write_tensors(temporary / WEIGHTS, {names[name]: tensor for name, tensor in tensors.items()})
        write_json(temporary / ORIGIN, {"base": base, "base_sha256": base_sha256})
    return folder


def peft_config(config: AdapterConfig, modules: list[str], base: str, conv1d: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": modules,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def base_of(folder: Path) -> str:
    """MODEL that the adapters in `folder` are for.

    Raises:
        UserError: they name none.
    """
    base = read_object(folder / CONFIG, REMEDY).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{str(folder / CONFIG)!r} names no base model; set base_model_name_or_path to its folder")
    return base


def read_peft(folder: Path, family: str) -> PeftAdapter:
    """The adapters in `folder`, for a base of `family`.

    Raises:
        UserError: the folder is damaged, or has settings that regpt does not implement.
    """
    hf = read_object(folder / CONFIG, REMEDY)
    for key, allowed in FIXED.items():
        if (value := hf.get(key, allowed[0])) not in allowed:
            raise UserError(
                f"{str(folder / CONFIG)!r} has {key} = {value!r}, regpt implements {allowed[0]!r}; merge it "
                "with peft's merge_and_unload and open that model"
            )
    tensors = TensorFiles([folder / WEIGHTS])
    ours = {from_peft(name, family): tensors[name] for name in tensors}
    adapted = [name.removesuffix(".lora_A") for name in ours if name.endswith(".lora_A")]
    head = SPELLINGS[family].head.removesuffix(".weight")
    modules = tuple(HEAD if name == head else name for name in adapted)
    values: dict[str, Any] = {
        "r": hf.get("r"),
        "alpha": float(hf.get("lora_alpha", 8)),
        "dropout": float(hf.get("lora_dropout") or 0),
    }
    values |= {"rslora": bool(hf.get("use_rslora")), "dora": bool(hf.get("use_dora"))}
    try:
        config = AdapterConfig(**values, targets=modules)
    except (UsageError, TypeError, ValueError) as error:
        raise UserError(f"{str(folder / CONFIG)!r} cannot be used: {error}") from None
    origin = read_object(folder / ORIGIN, REMEDY) if exists(folder / ORIGIN) else {}
    return PeftAdapter(config, ours, base_of(folder), str(origin.get("base_sha256", "")))
