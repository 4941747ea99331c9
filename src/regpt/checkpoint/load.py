"""Find checkpoints and read them, after their files have been checked."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from regpt.checkpoint.base import AdapterRecord, plain_shapes, read_adapter_record
from regpt.checkpoint.manifest import (
    ADAPTER,
    AVERAGE,
    FORMAT_VERSION,
    IMPORTED,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    CheckpointManifest,
    File,
    check_sha256,
    check_size,
    damaged,
    read_checkpoint_manifest,
    stem_of,
    validated,
)
from regpt.checkpoint.state import RunState, read_state
from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.files import SUCCESSOR, identity, is_folder, unless_gone
from regpt.model.config import ModelConfig
from regpt.structured import read_object
from regpt.tensors import REMEDY, TensorFiles
from regpt.text.companions import COMPANIONS
from regpt.text.open import open_tokenizer
from regpt.text.tokenizer import Tokenizer

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
STEP_FOLDER = re.compile(rf"step-(\d{{8,}})(?:{re.escape(SUCCESSOR)})?")
T = TypeVar("T")
DTYPES = ("F32", "F64", "BF16")  # of weights, moments and averages, each of one type; others are no rounding of ours
CODES = "U8"  # of moments in 8 bits, next to their scales


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked; its tensors are read from the disk when they are asked for.

    Attributes:
        folder: where it lies.
        config: shape of the model.
        state: what the run stored; `step` is the number of updates done.
        manifest: its files.
    """

    folder: Path
    config: ModelConfig
    state: RunState
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        return self.state.step

    def weights(self) -> TensorFiles:
        """Name → weight at its real shape, for `load_weights`; of a checkpoint of adapters, them alone."""
        return self.tensors(WEIGHTS)

    def adapter(self) -> AdapterRecord | None:
        """Of a checkpoint that holds adapters alone."""
        there = ADAPTER in self.manifest.names()
        return read_adapter_record(self.folder / ADAPTER) if there else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of its weights, as the model's shape has them; nothing is built for it."""
        record = self.adapter()
        return plain_shapes(self.config) if record is None else record.shapes(self.config)

    def optimizer(self) -> TensorFiles:
        """`exp_avg/<parameter>`, `exp_avg_sq/<parameter>` → tensor, without padding rows."""
        return self.tensors(OPTIMIZER)

    def average(self) -> TensorFiles | None:
        """Name → exponential moving average of the weight; None when the run keeps none."""
        return self.tensors(AVERAGE) if self.manifest.tensor_files(AVERAGE) else None

    def tensors(self, stem: str) -> TensorFiles:
        files = [self.folder / name for name in self.manifest.tensor_files(stem)]
        return tensors_of_one_type(files, stem)

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.folder / TOKENIZER)

    def companions(self) -> dict[str, str]:
        """Chat template and options of generation of the model that the run began with, by file name."""
        if IMPORTED not in self.manifest.names():
            return {}
        return {
            name: text
            for name, text in read_object(self.folder / IMPORTED, REMEDY).items()
            if name in COMPANIONS and isinstance(text, str)  # nothing else becomes a file of an export
        }


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where `run` keeps its checkpoint after `step` updates."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of `run`, the oldest step first, whether intact or not.

    Where a crash left the successor of a folder next to it (`files.put_in_place`), the successor comes later.
    """
    folders = (run / CHECKPOINTS).glob("step-*") if is_folder(run) else ()
    real = (f for f in folders if STEP_FOLDER.fullmatch(f.name) and f.is_dir() and not f.is_symlink())
    return sorted(real, key=lambda folder: (step_of(folder), folder.name))


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = STEP_FOLDER.fullmatch(folder.name)
    assert match
    return int(match[1])


def print_warning(message: str) -> None:
    print_note(f"warning: {message}")


def newest_checkpoint(run: Path, *, optimizer: bool = True, warn: Callable[[str], None] = print_warning) -> Path:
    """The newest checkpoint of `run` that passes `verify_checkpoint`; `warn` and errors as in `of_newest`."""
    return of_newest(run, lambda folder: folder, optimizer=optimizer, warn=warn)


def of_newest(
    run: Path,
    use: Callable[[Path], T],
    *,
    optimizer: bool = True,
    warn: Callable[[str], None] = print_warning,
    listed: Callable[[Path], list[Path]] = checkpoints,
) -> T:
    """`use(folder)` of the newest checkpoint of `run` that passes `verify_checkpoint`.

    The run may go on meanwhile: where a checkpoint was pruned or replaced, also while it was used, this looks again.

    Args:
        warn: receives what is wrong with damaged ones, which are kept.
        listed: the folders of `run` from the last choice to the first; by default the oldest to the newest.

    Raises:
        UserError: there is none, or what `use` raises.
    """
    seen, folders = None, listed(run)
    while seen != (seen := [identity(folder) for folder in folders]):
        for folder in reversed(folders):
            try:
                intact = unless_gone(folder, lambda: verify_checkpoint(folder, optimizer=optimizer) or True)  # noqa: B023
            except UserError as error:
                warn(f"skipped {folder.name}: {error}")
                continue
            if intact and (found := unless_gone(folder, lambda: (use(folder),))):  # noqa: B023
                return found[0]
        folders = listed(run)
    raise none_intact(str(run), len(folders))


def none_intact(run: str, count: int) -> UserError:
    """The error for a run, none of whose `count` complete checkpoints can be used."""
    what, advice = "it has no complete checkpoint yet", "wait until it has saved one, check the address"
    if count:
        what, advice = f"none of its {count} checkpoints is intact", "start it again with another --out"
    return UserError(f"run {run} cannot be opened, {what}; {advice}, or choose another run")


def load_checkpoint(folder: Path, *, optimizer: bool = True, verified: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, after `verify_checkpoint` (`optimizer` as there) unless the caller has just done it.

    Raises:
        UserError: a file is missing, changed or damaged, or was written by a regpt with another format.
    """
    if not verified:
        verify_checkpoint(folder, optimizer=optimizer)
    return Checkpoint(
        folder, read_model_config(folder / MODEL), read_state(folder / STATE), read_checkpoint_manifest(folder)
    )


def verify_checkpoint(folder: Path, *, optimizer: bool = True) -> None:
    """Everything that can be known of a checkpoint without a run: its files, and that every number in them is finite.

    Args:
        optimizer: also read the optimizer's tensors, two thirds of the bytes, which only a resume needs.

    Raises:
        UserError: naming the first file that is missing, changed, no file of the folder, or not what it should be.
    """
    for _, error in damages(folder, optimizer=optimizer):
        raise error


def damages(
    folder: Path, *, optimizer: bool = True, look: Callable[[str], None] = lambda file: None
) -> Iterator[tuple[str, UserError]]:
    """The files of the checkpoint `folder` that are not as they should be, with their problems: quick ones first.

    Args:
        optimizer: as in `verify_checkpoint`.
        look: receives the name of each file before it is read.
    """
    name, damaged_files = MANIFEST, set[str]()
    try:
        files = read_checkpoint_manifest(folder).needed(optimizer=optimizer)
        for file, check in [*((file, check_size) for file in files), *((file, check_content) for file in files)]:
            if file.file in damaged_files:
                continue
            if check is check_content:
                look(file.file)
            try:
                check(folder, file)
            except UserError as error:
                damaged_files.add(file.file)
                yield file.file, error
        name = MODEL
        if not damaged_files:
            refuse_disagreement(load_checkpoint(folder, verified=True))
    except UserError as error:
        yield name, error


def check_content(folder: Path, file: File) -> None:
    """Raise a UserError unless the file has its SHA-256 and holds the content that its name promises, which may be
    anything for other names."""
    check_sha256(folder, file)
    readers = {MODEL: read_model_config, STATE: read_state, TOKENIZER: open_tokenizer, ADAPTER: read_adapter_record}
    name = file.file
    if name in readers:
        readers[name](folder / name)
    elif stem_of(name):
        tensors = tensors_of_one_type([folder / name], stem_of(name))
        for tensor_name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise damaged(folder / name, f"holds numbers in {tensor_name!r} that are not finite")


def tensors_of_one_type(files: list[Path], stem: str) -> TensorFiles:
    """The tensors of `files`; those of an optimizer may be codes of 8 bits, too.

    Raises:
        UserError: a tensor of a type that no run stores, or of another type than the others.
    """
    found = TensorFiles(files, (*DTYPES, CODES) if stem == OPTIMIZER else DTYPES)
    kinds = Counter(kind for kind in found.dtype_of.values() if kind != CODES)
    for kind, _ in kinds.most_common()[1:]:
        name = next(name for name, own in found.dtype_of.items() if own == kind)
        others = kinds.most_common()[0][0]
        raise UserError(f"tensor {name!r} in {str(found.file_of[name])!r} has type {kind}, others {others}; {REMEDY}")
    return found


def refuse_disagreement(checkpoint: Checkpoint) -> None:
    """Raise a UserError unless the folder's name fits the state, and tokenizer and weights the model in model.json;
    nothing is read or built for it."""
    refuse_other_step(checkpoint.folder / STATE, checkpoint.folder.name)
    tokens, vocab_size = checkpoint.tokenizer().n_vocab, checkpoint.config.vocab_size
    if tokens != vocab_size:
        raise damaged(checkpoint.folder / TOKENIZER, f"has {tokens:,} tokens, {MODEL} has {vocab_size:,}")
    stored, blocks = checkpoint.tensors(WEIGHTS).shape_of, checkpoint.config.n_layer
    if blocks > len(stored) and checkpoint.adapter() is None:  # thousands of blocks take seconds to describe
        raise damaged(checkpoint.folder / MODEL, f"asks for {blocks:,} blocks, there are {len(stored):,} tensors")
    shapes = checkpoint.shapes()
    for stem, complete in ((WEIGHTS, True), (AVERAGE, False)):  # what does not learn has no average
        stored = checkpoint.tensors(stem).shape_of
        for name, shape in shapes.items():
            if stored.get(name, None if complete else shape) != shape:
                has = f"{name!r} of shape {stored[name]}" if name in stored else f"no {name!r}"
                raise damaged(checkpoint.folder / MODEL, f"asks for {name!r} of shape {shape}, the tensors have {has}")


def refuse_other_step(state: Path, name: str) -> None:
    """Raise a UserError where the `name` of a checkpoint's folder says another step than its `state`."""
    step = read_state(state).step
    if STEP_FOLDER.fullmatch(name) and step_of(Path(name)) != step:
        right = checkpoint_folder(Path(), step).name
        raise damaged(state, f"is of step {step:,}, but the folder is called {name!r}; rename that to {right}")


def read_model_config(path: Path) -> ModelConfig:
    """The model's shape from `model.json`."""
    content = read_object(path, REMEDY)
    if content.pop("format_version", None) != FORMAT_VERSION:
        raise damaged(path, f"does not have format version {FORMAT_VERSION}")
    return validated(ModelConfig, json.dumps(content), path, "does not describe a model")
