"""The frozen base of a run with adapters: stored once, in RUN/base, and named by its hash in every checkpoint."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from regpt.checkpoint.manifest import File, check_sha256, check_size, damaged, stem_of, validated
from regpt.errors import UserError
from regpt.files import file_sha256, is_file, whole_folder, write_json
from regpt.model.adapter_config import AdapterConfig, BaseFormat
from regpt.model.adapters import adapt, adapter_parameters
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import InitialWeights, without_memory
from regpt.structured import read_object
from regpt.tensors import REMEDY, SUFFIX, TensorFiles, write_divided

BASE, CONTENT, STEM = "base", "base.json", "base"
MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class AdapterRecord:
    """`adapter.json` of a checkpoint that holds adapters alone.

    Attributes:
        base_sha256: of the weights that they are for, see `hash_weights`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    adapter: AdapterConfig
    base_sha256: str
    format_version: int = 1

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name → shape of the adapters of a model of shape `config`."""
        with without_memory():
            model = adapt(make_model(config), self.adapter)
        return {name: tuple(p.shape) for name, p in adapter_parameters(model).items()}


@dataclass(frozen=True)
class BaseRecord:
    """`base.json`.

    Attributes:
        sha256: of the weights before they were quantized, see `hash_weights`.
        format: in which linear layers of blocks are stored.
        source: the MODEL that they are from, as it was typed.
        error: of quantization: length of the difference over that of the weights, of all that are quantized.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sha256: str
    format: BaseFormat = "none"
    source: str = ""
    error: float = 0.0
    files: tuple[File, ...] = field(default=())
    format_version: int = 1


@dataclass(frozen=True)
class AdapterParts:
    """Adapters and what they are for, before a merge.

    Attributes:
        base: MODEL that the base is from.
        weights: reads the base's, as the adapters were trained on them.
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    base_sha256: str
    base: str
    weights: Callable[[], Mapping[str, Tensor]]


def read_adapter_record(path: Path) -> AdapterRecord:
    content = json.dumps(read_object(path, REMEDY))
    return validated(AdapterRecord, content, path, "does not describe adapters")


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values in float32: the same in whatever file and order weights are stored."""
    digest = sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def write_base(run: Path, tensors: Mapping[str, Tensor], record: BaseRecord) -> None:
    """Write `tensors` and `record` as RUN/base, whole or not at all; nothing where that is there."""
    if is_file(run / BASE / CONTENT):
        return
    with whole_folder(run / BASE) as temporary:
        write_divided(temporary, STEM, tensors, MAX_FILE_BYTES)
        paths = sorted(temporary.iterdir())
        files = tuple(File(path.name, path.stat().st_size, file_sha256(path)) for path in paths)
        write_json(temporary / CONTENT, asdict(record) | {"files": [asdict(file) for file in files]})


def open_base(checkpoint: Path, record: AdapterRecord) -> tuple[BaseRecord, TensorFiles]:
    """The base of the adapters in `checkpoint`, from the run that it lies in, after its files were compared with their
    hashes.

    Raises:
        UserError: it is missing, damaged, or another one than the adapters were trained on.
    """
    folder = checkpoint.absolute().parents[1] / BASE
    if not is_file(folder / CONTENT):
        raise UserError(
            f"checkpoint {str(checkpoint)!r} holds adapters alone, and their base {str(folder)!r} is missing; copy "
            "the whole run, or export the model with regpt export"
        )
    found = validated(
        BaseRecord, json.dumps(read_object(folder / CONTENT, REMEDY)), folder / CONTENT, "does not describe a base"
    )
    if found.sha256 != record.base_sha256 or found.format != record.adapter.base:
        raise UserError(
            f"the adapters in {str(checkpoint)!r} are for the base {record.base_sha256[:12]} ({record.adapter.base}), "
            f"{str(folder)!r} is {found.sha256[:12]} ({found.format}, from {found.source}); put them into the run that "
            "they were trained in"
        )
    for file in found.files:
        check_size(folder, file)
        check_sha256(folder, file)
    names = sorted(file.file for file in found.files if file.file.endswith(SUFFIX) and stem_of(file.file) == STEM)
    if not names:
        raise damaged(folder / CONTENT, "names no weights")
    return found, TensorFiles([folder / name for name in names])


def plain_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weights of a model without adapters."""
    with without_memory():
        return InitialWeights(make_model(config), seed=0).shapes
