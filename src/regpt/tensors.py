"""Named tensors in safetensors files: one file, or several with an index, written and read."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regpt.errors import UserError
from regpt.files import is_file, is_plain_name, refuse_lfs_pointer, sync, write_json
from regpt.structured import MAX_BYTES, read_object

REMEDY = "restore the file or choose another model"
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"  # the names that transformers gives, too


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file of `tensors`, from any device, synced to the disk; transformers asks for the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(mode)  # the library's file is its owner's alone; ours is readable to whom the user lets read
    sync(path)


def write_divided(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_bytes: int) -> None:
    """`STEM.safetensors`; beyond `max_bytes` `STEM-00001-of-00004.safetensors`, … with an index of what is where.

    Consecutive tensors share a file; one that alone is larger than `max_bytes` has its own.
    """
    parts = list(divide(tensors, max_bytes))
    if len(parts) == 1:
        write_tensors(folder / f"{stem}{SUFFIX}", parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}{SUFFIX}"
        write_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / f"{stem}{INDEX_SUFFIX}", {"metadata": {"total_size": total}, "weight_map": weight_map})


def divide(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, together at most `max_bytes` (or one that is larger); one empty part of no tensors."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def find_divided(folder: Path, stem: str) -> list[Path]:
    """The files that `write_divided` wrote, the index left out; none when there is neither a file nor an index.

    Raises:
        UserError: the index is damaged.
    """
    if is_file(folder / f"{stem}{SUFFIX}"):
        return [folder / f"{stem}{SUFFIX}"]
    index = folder / f"{stem}{INDEX_SUFFIX}"
    return [folder / name for name in shard_names(index)] if is_file(index) else []


def shard_names(index: Path) -> list[str]:
    """The files that an index names, each once.

    Raises:
        UserError: it names none, or something that is no file of its folder.
    """
    weight_map = read_object(index, REMEDY).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_plain_name(name) for name in names):
        raise UserError(f"{str(index)!r} has no weight_map from tensors to plain file names; {REMEDY}")
    return sorted(set(names))


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name; each is read, to the CPU, only when it is asked for.

    Each file is opened once and stays mapped as long as this exists: what is deleted meanwhile can still be read.

    Raises:
        UserError: a file that is missing or damaged, a name that two files hold, or a tensor of a type that is not
            among `dtypes` (in safetensors' names, such as F32), where these are given.
    """

    def __init__(self, files: Iterable[Path], dtypes: Collection[str] = ()):
        self.file_of: dict[str, Path] = {}
        self.shape_of: dict[str, tuple[int, ...]] = {}
        self.dtype_of: dict[str, str] = {}  # in safetensors' names
        self.handles: dict[Path, Any] = {}
        for file in files:
            with readable(file):
                tensors = self.handles[file] = safe_open(file, framework="pt")
                refuse_repeated_names(file)
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    if name in self.file_of:
                        raise UserError(
                            f"tensor {name!r} is in both {self.file_of[name]} and {file}; remove one of them"
                        )
                    header = tensors.get_slice(name)
                    dtype = str(header.get_dtype())
                    if dtypes and dtype not in dtypes:
                        raise UserError(
                            f"tensor {name!r} in {str(file)!r} has type {dtype}, must be {' or '.join(dtypes)}; "
                            f"{REMEDY}"
                        )
                    self.file_of[name], self.shape_of[name] = file, tuple(header.get_shape())
                    self.dtype_of[name] = dtype

    def __getitem__(self, name: str) -> Tensor:
        file = self.file_of[name]
        with readable(file):
            return self.handles[file].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


def refuse_repeated_names(file: Path) -> None:
    """Raise a UserError when a header that the library finds sound names a tensor twice: only one would be read."""
    with file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        if size > MAX_BYTES:
            raise UserError(f"the header of {str(file)!r} has {size:,} bytes, more than {MAX_BYTES:,}; {REMEDY}")
        header = raw.read(size)
    pairs: list[tuple[str, Any]] = json.loads(header, object_pairs_hook=list)
    twice, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise UserError(f"tensor {twice!r} is twice in {str(file)!r}; {REMEDY}")


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """What is wrong with a safetensors file is a UserError; torch, which maps the file, raises RuntimeError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_file(file):
            refuse_lfs_pointer(file)
        raise UserError(f"cannot read {str(file)!r} as safetensors ({error}); {REMEDY}") from None
