"""Adapters of a run: their base and first values, their checkpoints, and what is said of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regpt.checkpoint.base import AdapterRecord, BaseRecord, hash_weights, open_base, write_base
from regpt.checkpoint.load import Checkpoint
from regpt.config import RunConfig
from regpt.errors import UsageError, UserError
from regpt.model.adapters import (
    adapter_parameters,
    adapter_summary,
    base_tensors,
    begin_adapters,
    load_adapters,
    load_base,
    quantization_error,
)
from regpt.model.transformer import Transformer
from regpt.model.weights import load_weights, state_tensors

if TYPE_CHECKING:
    from regpt.runs.begin import Run


def refuse_without_base(config: RunConfig, init_from: str | None) -> None:
    if config.adapter.r and init_from is None:
        raise UsageError(
            f"adapter.r is {config.adapter.r}, but there is no model to adapt; add --init-from MODEL, or leave out "
            "the adapter"
        )


def refuse_remote(config: RunConfig, remote: bool) -> None:
    if config.adapter.r and remote:
        raise UsageError(
            "a run with adapters has its base next to its checkpoints, in a local folder; give a local --out"
        )


def begin_base(run: "Run", source: str, weights: Mapping[str, Tensor]) -> None:
    """The base of `run` is `weights`, of the model `source`; its adapters begin without an effect."""
    load_weights(run.model, weights)
    if run.config.adapter.r:
        begin_adapters(run.model, run.config.train.seed)
        error = quantization_error(run.model, weights)
        run.base = BaseRecord(hash_weights(weights), run.config.adapter.base, source, error)


def learned(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint holds: the adapters, or all weights where there are none."""
    return {name: p.detach() for name, p in adapter_parameters(model).items()} or state_tensors(model)


def load_learned(model: Transformer, weights: Mapping[str, Tensor]) -> None:
    (load_adapters if model.adapter else load_weights)(model, weights)


def restore_weights(run: "Run", checkpoint: Checkpoint) -> None:
    """Load the weights of `checkpoint`, and the base of its adapters.

    Raises:
        UserError: one of both has adapters, the other not; see `open_base`.
    """
    record = checkpoint.adapter()
    if (record is not None) != bool(run.config.adapter.r):
        ours = "trains adapters" if run.config.adapter.r else "trains all weights"
        raise UserError(
            f"the run {ours} and checkpoint {str(checkpoint.folder)!r} does not; start a new run with --init-from "
            "instead, or leave the settings of [adapter] as they were"
        )
    if record is not None:
        run.base, tensors = open_base(checkpoint.folder, record)
        load_base(run.model, tensors)
    load_learned(run.model, checkpoint.weights())


def record_of(run: "Run") -> AdapterRecord | None:
    return AdapterRecord(run.config.adapter, run.base.sha256) if run.base else None


def keep_base(run: "Run", folder: Path) -> None:
    """Store the base of `run` in its `folder`, where it is not yet; its main process does."""
    if run.base is not None and run.mesh.is_main:
        write_base(folder, base_tensors(run.model), run.base)
    run.mesh.wait()


def facts_of(run: "Run") -> dict[str, Any]:
    """For env.json."""
    if run.base is None:
        return {}
    base = {"base": run.base.source, "base_sha256": run.base.sha256, "quantization_error": run.base.error}
    return {"adapter": adapter_summary(run.model) | base}


def said_of(model: Transformer) -> str:
    """For the line about what is trained; "" without adapters."""
    if model.adapter is None:
        return ""
    found, base = adapter_summary(model), model.adapter.base
    named, quantized = found["adapted"], "" if base == "none" else f", base in {base}"
    return f" ({found['trained']:,} of them in adapters of {len(named)} layers such as {named[0]} learn{quantized})"
