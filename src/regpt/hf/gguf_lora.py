"""Adapters as a GGUF file that llama.cpp adds to a model when it runs it (llama-adapter.cpp is the only definition)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from regpt.errors import UserError
from regpt.hf.gguf import TYPES, write_gguf
from regpt.hf.gguf_archs import ARCHS
from regpt.hf.gguf_models import arch_of, permuted, their_name
from regpt.model.adapter_config import AdapterConfig
from regpt.model.config import ModelConfig

LORA_TYPES = ("f32", "f16", "bf16")
SPELLED = {"lora_A": "lora_a", "lora_B": "lora_b"}


def export_gguf_lora(
    config: ModelConfig, adapter: AdapterConfig, tensors: Mapping[str, Tensor], base: str, path: Path, kind: str
) -> None:
    """Write the adapters `tensors` of a model of shape `config` as a GGUF file of the type `kind`.

    Args:
        base: what they are for, as a note in the file.

    Raises:
        UserError: llama.cpp has no such adapters or no such model, or the file cannot be written.
    """
    refuse_other_adapters(config, adapter)
    if kind not in LORA_TYPES:
        raise UserError(f"adapters are written in {', '.join(LORA_TYPES)}, not in {kind}; choose one of them as --type")
    arch, shape = arch_of(config), config.resolved()
    metadata = {
        "general.architecture": arch,
        "general.type": "adapter",
        "general.file_type": TYPES[kind].file_type,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.scale * adapter.r),  # llama.cpp divides by the rank, whatever scaled it
        "regpt.base": base,
    }
    found: dict[str, tuple[Tensor, str]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        theirs = their_name(f"{module}.weight", ARCHS[arch])
        if ARCHS[arch].interleaved and part == "lora_B":  # its rows are the weight's
            tensor = permuted(theirs, tensor, shape, back=False)
        found[f"{theirs}.{SPELLED[part]}"] = tensor, kind
    write_gguf(path, metadata, found)


def refuse_other_adapters(config: ModelConfig, adapter: AdapterConfig) -> None:
    reasons = {
        "DoRA's magnitudes (adapter.dora)": adapter.dora,
        "adapters of the embedding": "embedding" in adapter.targets or adapter.tied == "shared",
    }
    for what, given in reasons.items():
        if given:
            raise UserError(
                f"llama.cpp adds no {what} to a model that it runs; export the merged model with --format gguf in "
                "another type than tq2_0"
            )
