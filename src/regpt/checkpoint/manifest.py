"""`manifest.json` of a checkpoint: its files with size and SHA-256, written last, checked before anything is read."""

import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from regpt.errors import UserError
from regpt.files import file_sha256, is_file, is_folder, is_plain_name, refuse_lfs_pointer, stat_or_none, write_json
from regpt.structured import MAX_BYTES, parse_as, parse_json, read_small
from regpt.tensors import REMEDY, SUFFIX

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL, TOKENIZER, STATE = "model.json", "tokenizer.json", "state.json"
ADAPTER = "adapter.json"  # settings of adapters, where the weights are theirs alone, and the hash of their base
IMPORTED = "imported.json"  # chat template and options of generation of the model that a run began with
# Stems of tensor files: model.safetensors, or model-00001-of-00004.safetensors … with model.safetensors.index.json.
WEIGHTS, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"
FILES = (MODEL, TOKENIZER, STATE)
T = TypeVar("T")
DIVIDED = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class File:
    """One file of the folder."""

    __pydantic_config__ = {"extra": "forbid"}

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Every file of the folder but the manifest itself."""

    __pydantic_config__ = {"extra": "forbid"}

    files: tuple[File, ...]
    format_version: int = FORMAT_VERSION

    def names(self) -> set[str]:
        return {file.file for file in self.files}

    def needed(self, *, optimizer: bool) -> list[File]:
        """All files, or all but the optimizer's tensors."""
        return [file for file in self.files if optimizer or stem_of(file.file) != OPTIMIZER]

    def tensor_files(self, stem: str) -> list[str]:
        """The tensor files of `stem`, sorted; none when it was not stored."""
        return sorted(name for name in self.names() if stem_of(name) == stem)


def stem_of(name: str) -> str:
    """`optimizer` for `optimizer.safetensors` and `optimizer-00001-of-00004.safetensors`; "" for any other file."""
    divided = DIVIDED.fullmatch(name)
    return divided[1] if divided else name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else ""


def write_manifest(folder: Path) -> None:
    """Describe the files that lie in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    listed = tuple(File(path.name, path.stat().st_size, file_sha256(path)) for path in files)
    write_json(folder / MANIFEST, asdict(CheckpointManifest(listed)))


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of the checkpoint `folder`.

    Raises:
        UserError: it is missing, is no manifest, has another format version, lacks a file that every checkpoint has,
            or names something outside the folder.
    """
    path = folder / MANIFEST
    if path.is_symlink():
        raise damaged(path, "is a symbolic link")
    if not is_file(path):
        what = "has no manifest.json, so it is no complete checkpoint" if is_folder(folder) else "does not exist"
        raise UserError(f"checkpoint {str(folder)!r} {what}; use another checkpoint of the run")
    content = read_small(path, REMEDY)
    refuse_other_version(content, path)
    manifest = validated(CheckpointManifest, content, path, "is not a manifest")
    check_names(manifest, path)
    return manifest


def validated(kind: type[T], content: bytes | str, path: Path, problem: str) -> T:
    """The `kind` that the JSON `content` of the file `path` describes; a UserError with the `problem` otherwise."""
    try:
        return parse_as(kind, content)
    except ValueError as error:
        raise damaged(path, f"{problem} ({error})") from None


def refuse_other_version(content: bytes, path: Path) -> None:
    """Raise a UserError for a manifest of another format, whatever else it holds; nothing for what is no manifest."""
    try:
        version = parse_json(content)["format_version"]
    except (ValueError, TypeError, KeyError):
        return
    if type(version) is int and version != FORMAT_VERSION:
        remedy = "install a newer regpt" if version > FORMAT_VERSION else "restore it"
        raise UserError(
            f"checkpoint file {str(path)!r} has format version {version}, this regpt reads {FORMAT_VERSION}; {remedy} "
            "or use another checkpoint of the run"
        )


def check_names(manifest: CheckpointManifest, path: Path) -> None:
    """Raise a UserError unless the names lie in the folder and are those of a whole checkpoint."""
    for name in manifest.names():
        if not is_plain_name(name):
            raise damaged(path, f"names {name!r}, which is no plain file name")
    for name in FILES:
        if name not in manifest.names():
            raise damaged(path, f"lacks {name!r}")
    for stem in (WEIGHTS, OPTIMIZER):
        if not manifest.tensor_files(stem):
            raise damaged(path, f"lacks '{stem}{SUFFIX}'")
    for stem in (WEIGHTS, OPTIMIZER, AVERAGE):
        files = manifest.tensor_files(stem)
        if files and files != expected_files(stem, len(files)):
            raise damaged(path, f"names {', '.join(files)}, which are not all files of {stem!r} and nothing else")


def expected_files(stem: str, count: int) -> list[str]:
    """The names of `count` tensor files of `stem`."""
    divided = [f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]
    return [f"{stem}{SUFFIX}"] if count == 1 else divided


def check_sizes(folder: Path, *, optimizer: bool = True) -> CheckpointManifest:
    """The manifest of `folder`, after a look at every file that it names: quick, and enough to see a torn copy.

    Args:
        optimizer: also at the optimizer's tensors, which a copy for sampling and evaluation leaves out.

    Raises:
        UserError: as in `read_checkpoint_manifest`, or a file is missing, is a symbolic link, or has another size.
    """
    manifest = read_checkpoint_manifest(folder)
    for file in manifest.needed(optimizer=optimizer):
        check_size(folder, file)
    return manifest


def check_size(folder: Path, file: File) -> None:
    """Raise a UserError unless `file` is a file of `folder` and has the size that the manifest says."""
    path = folder / file.file
    if path.is_symlink():
        raise damaged(path, "is a symbolic link")
    found = stat_or_none(path)
    if found is None or not stat.S_ISREG(found.st_mode):
        raise damaged(path, "is missing")
    if found.st_size != file.size:
        refuse_lfs_pointer(path)
        raise damaged(path, f"has {found.st_size:,} bytes instead of {file.size:,}")
    if file.file in (*FILES, IMPORTED, ADAPTER) and file.size > MAX_BYTES:
        raise damaged(path, f"has {file.size:,} bytes, more than {MAX_BYTES:,}, too much for its kind")


def check_sha256(folder: Path, file: File) -> None:
    """Raise a UserError unless the bytes of `file` can be read and are those that the manifest says."""
    try:
        digest = file_sha256(folder / file.file)
    except OSError as error:
        raise damaged(folder / file.file, f"cannot be read ({error.strerror})") from None
    if digest != file.sha256:
        raise damaged(folder / file.file, "has been changed or damaged (its SHA-256 differs from the manifest's)")


class DamagedFile(UserError):
    """What is wrong with the file `name` of a checkpoint: `what`."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"checkpoint file {str(path)!r} {what}; restore it or use another checkpoint of the run")
        self.name, self.what = path.name, what


def damaged(path: Path, what: str) -> DamagedFile:
    return DamagedFile(path, what)
