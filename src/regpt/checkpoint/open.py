"""`open_model`: what every command means by MODEL."""

import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from regpt.checkpoint.base import AdapterParts, AdapterRecord, hash_weights, open_base, plain_shapes
from regpt.checkpoint.best import BEST, best_last
from regpt.checkpoint.fetch import fetch_model
from regpt.checkpoint.load import CHECKPOINTS, STEP_FOLDER, checkpoint_folder, checkpoints, load_checkpoint, of_newest
from regpt.checkpoint.manifest import AVERAGE, MODEL, WEIGHTS
from regpt.errors import UsageError, UserError, nearest
from regpt.files import exists, file_sha256, identity, is_file, is_folder, unless_gone
from regpt.hf.folder import CONFIG, hf_config, hf_tokenizer, hf_weights, stored_dtype, weight_files
from regpt.hf.gguf import GGUFFile, is_gguf
from regpt.hf.gguf_models import GGUFWeights, config_from_gguf
from regpt.hf.gguf_tokenizer import tokenizer_from_gguf
from regpt.hf.hub import SHORT_NAMES, download_model, repository
from regpt.hf.peft import CONFIG as PEFT
from regpt.hf.peft import WEIGHTS as PEFT_WEIGHTS
from regpt.hf.peft import base_of, read_peft
from regpt.kernels.masked import with_masks_as_data
from regpt.model.adapters import Merged
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer
from regpt.model.weights import allocate, load_weights, state_tensors, without_memory
from regpt.remote import is_address
from regpt.text.companions import read_companions
from regpt.text.folder import CHAT
from regpt.text.tokenizer import Tokenizer

FILES = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".toml")
ALLOWED = (
    "a run folder, a checkpoint folder, the address of one (s3://…), a Hugging Face folder, a GGUF file, or a hub name "
    f"({', '.join(SHORT_NAMES)}, or OWNER/NAME)"
)


@dataclass(frozen=True)
class WeightFile:
    """A file that weights were read from.

    Attributes:
        sha256: as a manifest has it; "" where none does.
        found: the file when it was read (`files.identity`).
    """

    path: Path
    sha256: str = ""
    found: tuple[int, int, int] | None = None

    def hash(self) -> str:
        """SHA-256 of its bytes; reads them where no manifest has it.

        Raises:
            UserError: the file was changed since the weights were read.
        """
        if not self.sha256 and identity(self.path) != self.found:
            raise UserError(f"{str(self.path)!r} was changed after its weights were read; open the model again")
        return self.sha256 or file_sha256(self.path)


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to read and write text.

    Attributes:
        model: in eval mode, on the device asked for.
        tokenizer: the one it was trained with.
        step: updates done, for a checkpoint of ours.
        source: the folder or hub name it was read from; and whether its weights are the average.
        dtype: type in which the weights are stored.
        folder: of a Hugging Face model, with its other files.
        companions: chat template and options of generation, by file name (`text.companions`).
        files: of the weights.
        adapter: where they are those of a base with adapters, merged; the adapters.
    """

    model: Transformer
    tokenizer: Tokenizer
    step: int | None
    source: str
    dtype: torch.dtype = torch.float32
    folder: Path | None = None
    companions: Mapping[str, str] = field(default_factory=dict)
    files: tuple[WeightFile, ...] = ()
    adapter: AdapterParts | None = None

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the file of the weights; of several files that of the lines that `sha256sum` prints of them.

        Raises:
            UserError: the weights were not read from files, or these were changed since.
        """
        if not self.files:
            raise UserError(f"the weights of {self.source!r} were not read from files, so no hash is known of them")
        if len(self.files) == 1:
            return self.files[0].hash()
        files = sorted(self.files, key=lambda one: one.path.name)
        return sha256("".join(f"{one.hash()}  {one.path.name}\n" for one in files).encode()).hexdigest()


def open_model(name: str, device: torch.device | str = "cpu", *, ema: bool = False, narrow: bool = False) -> OpenModel:
    """The model that `name` means: a run's newest intact checkpoint, a checkpoint (RUN/checkpoints/best is that of the
    lowest validation loss), one of them at an address (s3://…; copied to this machine), a Hugging Face folder, one of
    peft's with its base, a GGUF file, a hub name.

    Args:
        ema: with the moving average of the weights instead of the last ones.
        narrow: hold weights in bfloat16 where all of them are stored in it; in float32 otherwise.

    Raises:
        UsageError: `name` is none of these.
        UserError: it is one, but damaged, of a kind that we do not implement, or not to be had.
    """
    if is_address(name):
        opened = open_checkpoint(fetch_model(name), device, ema=ema, narrow=narrow)
        return replace(opened, source=f"{name}, step {opened.step}" + ", average" * ema)
    path = Path(name)
    best = (path.parent.name, path.name) == (CHECKPOINTS, BEST)
    if best or is_folder(path / CHECKPOINTS):
        run, listed = (path.parents[1], best_last) if best else (path, checkpoints)
        read = partial(open_checkpoint, device=device, ema=ema, narrow=narrow, verified=True)
        return of_newest(run, read, optimizer=False, listed=listed)
    if is_file(path / MODEL) or (is_folder(path) and STEP_FOLDER.fullmatch(path.name)):
        if opened := unless_gone(path, lambda: open_checkpoint(path, device, ema=ema, narrow=narrow)):
            return opened
        raise UserError(f"checkpoint {name!r} was deleted while it was read; use another checkpoint of the run")
    if ema:
        raise UsageError(f"model {name!r} is no run and no checkpoint, which alone have an average; leave out --ema")
    if is_file(path / CONFIG):
        return open_hf(path, name, device, narrow=narrow)
    if is_file(path / PEFT):
        return open_peft(path, name, device)
    if is_gguf(path):
        return open_gguf(path, name, device)
    repo = repository(name)
    if exists(path) or repo is None or not may_be_model(name):
        what = "holds no model" if exists(path) else "does not exist"
        stepped = re.fullmatch(rf"(.+)[@:](\d{{1,15}}|{BEST})", name)  # as --draft and regpt serve write it
        if stepped and checkpoints(Path(stepped[1])):
            folder = BEST if stepped[2] == BEST else checkpoint_folder(Path(), int(stepped[2])).name
            raise UsageError(
                f"model {name!r} {what}; give the checkpoint's folder, {stepped[1]}/{CHECKPOINTS}/{folder}"
            )
        raise UsageError(f"model {name!r} {what}{nearest(name, SHORT_NAMES)}; a model is {ALLOWED}")
    return open_hf(download_model(repo), repo, device, narrow=narrow)


def may_be_model(name: str) -> bool:
    """Whether `name` exists or may be a hub name; `runs/typo` is no OWNER/NAME where there is a folder `runs`, nor is
    `typo/model.gguf`."""
    path = Path(name)
    inside_folder = len(path.parts) > 1 and is_folder(path.parts[0])
    of_file = path.suffix.lower() in FILES  # the hub's names of models have no such end
    return exists(path) or (repository(name) is not None and not inside_folder and not of_file)


def open_checkpoint(
    folder: Path, device: torch.device | str, *, ema: bool, narrow: bool = False, verified: bool = False
) -> OpenModel:
    checkpoint = load_checkpoint(folder, optimizer=False, verified=verified)
    weights, average = checkpoint.weights(), checkpoint.average()
    if ema and average is None:
        raise UsageError(
            f"checkpoint {str(folder)!r} keeps no average of its weights; leave out --ema, or train with "
            "--train.ema-decay 0.999"
        )
    # What does not learn has no average.
    chosen = ChainMap(cast(Any, average), cast(Any, weights)) if ema else weights
    stored = set() if ema else {*weights.dtype_of.values()}
    parts, adapters = None, chosen
    if (record := checkpoint.adapter()) is not None:
        base, tensors = open_base(folder, record)
        shapes = plain_shapes(checkpoint.config)
        of_base = partial(Merged, shapes, tensors, {}, record.adapter)
        parts = AdapterParts(record.adapter, adapters, record.base_sha256, base.source, of_base)
        chosen = Merged(shapes, tensors, adapters, record.adapter)
    held = torch.bfloat16 if narrow and stored == {"BF16"} else torch.float32
    model = build(checkpoint.config, chosen, device, str(folder), held)
    source = f"{folder}, average" if ema else str(folder)
    dtype = torch.bfloat16 if "BF16" in stored else torch.float32  # float64 runs are tests
    names = checkpoint.manifest.tensor_files(AVERAGE if ema else WEIGHTS)
    files = tuple(WeightFile(folder / one.file, one.sha256) for one in checkpoint.manifest.files if one.file in names)
    tokenizer, companions = checkpoint.tokenizer(), checkpoint.companions()
    return OpenModel(
        model, tokenizer, checkpoint.step, source, dtype, companions=companions, files=files, adapter=parts
    )


def open_hf(folder: Path, source: str, device: torch.device | str, *, narrow: bool = False) -> OpenModel:
    config = hf_config(folder)
    tokenizer = hf_tokenizer(folder, config.vocab_size)
    files = tuple(WeightFile(path, found=identity(path)) for path in weight_files(folder))
    weights = hf_weights(folder, config, tokenizer.n_vocab)
    config = replace(config, vocab_size=tokenizer.n_vocab)  # its real size: rows of padding are left out
    dtype = stored_dtype(folder)
    held = dtype if narrow and dtype == torch.bfloat16 else torch.float32
    model = build(config, weights, device, source, held)
    return OpenModel(model, tokenizer, None, source, dtype, folder, read_companions(folder), files)


def open_peft(folder: Path, source: str, device: torch.device | str) -> OpenModel:
    """A folder of peft's with the base that it names, merged.

    Raises:
        UserError: the base has other weights than the adapters were trained on, where the folder says which, or lacks
            what they adapt.
    """
    base = open_model(base_of(folder), device)
    found = read_peft(folder, base.model.config.family)
    weights, config = state_tensors(base.model), base.model.config
    if found.base_sha256 and (digest := hash_weights(weights)) != found.base_sha256:
        raise UserError(
            f"the adapters in {source!r} are for the base {found.base_sha256[:12]}, {found.base!r} has the weights "
            f"{digest[:12]}; set base_model_name_or_path of {PEFT} to the model that they were trained on"
        )
    shapes, own = plain_shapes(config), AdapterRecord(found.config, found.base_sha256).shapes(config)
    for name, tensor in found.tensors.items():
        if own.get(name) != tuple(tensor.shape):
            wanted = own.get(name, "no such layer")
            raise UserError(f"adapter {name!r} in {source!r} has shape {tuple(tensor.shape)}, its base has {wanted}")
    load_weights(base.model, Merged(shapes, weights, found.tensors, found.config))  # each weight in its own place
    parts = AdapterParts(
        found.config, found.tensors, found.base_sha256, found.base, lambda: state_tensors(open_model(found.base).model)
    )
    path = folder / PEFT_WEIGHTS
    files = (*base.files, WeightFile(path, found=identity(path)))
    return replace(base, source=f"{source} on {base.source}", dtype=torch.float32, files=files, adapter=parts)


def open_gguf(path: Path, source: str, device: torch.device | str) -> OpenModel:
    files = (WeightFile(path, found=identity(path)),)
    file = GGUFFile(path)
    try:
        config = config_from_gguf(file)
    except UsageError as error:  # a shape that no model has
        raise UserError(f"model {source!r} cannot be read: {error}") from None
    tokenizer = tokenizer_from_gguf(file, config.vocab_size)
    weights = GGUFWeights(file, config, tokenizer.n_vocab)
    config = replace(config, vocab_size=tokenizer.n_vocab)  # rows of padding are left out
    template = file.metadata.get("tokenizer.chat_template")
    companions = {CHAT: template} if isinstance(template, str) else {}
    model = build(config, weights, device, source)
    return OpenModel(model, tokenizer, None, source, companions=companions, files=files)


def build(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    device: torch.device | str,
    source: str,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A model of shape `config` on `device`, filled tensor by tensor, so that the weights are in memory once."""
    with without_memory():
        model = make_model(config, with_masks_as_data(PLAIN, torch.device(device)))
    try:
        return load_weights(allocate(model, device, dtype), weights).eval()
    except UserError as error:
        raise UserError(f"model {source!r} cannot be read: {error}") from None
