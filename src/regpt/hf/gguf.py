"""GGUF, the file format of llama.cpp: metadata and tensors in one file, written and read.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. Header, metadata (key, type,
value), descriptions of tensors (name, shape with the fastest dimension first, type, offset), then their data. What keys
and tensors mean for a model: `hf/gguf_models.py`.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.files import is_file, refuse_lfs_pointer, replacing

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 added big-endian files only
ALIGNMENT = 32  # of each tensor, unless `general.alignment` states another
MAX_DIMS = 4  # GGML_MAX_DIMS
BOOL, STRING, ARRAY, UINT32, INT32, FLOAT32 = 7, 8, 9, 4, 5, 6
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # as in `struct`
CHUNK = 1 << 22  # numbers that are converted at once
RESTORE = "copy or download it again"


# ---- types of tensors: rows of float32 to bytes and back ------------------------------------------------------------


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """(blocks, 32) float32 to (blocks, 34) bytes: a scale in float16, 32 whole numbers (ggml's
    quantize_row_q8_0_ref)."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * inverse(scale)
    size = np.abs(scaled)
    whole = np.trunc(size)
    rounded = np.copysign(whole + (size - whole >= 0.5), scaled).astype(np.int8)  # halves away from zero, as C's roundf
    return np.concatenate([scale.astype("<f2").view(np.uint8), rounded.view(np.uint8)], axis=1)


def dequantize_q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scale * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def quantize_q4_0(x: np.ndarray) -> np.ndarray:
    """(blocks, 32) float32 to (blocks, 18) bytes: a scale in float16, 32 numbers of four bits, number i and i + 16 in
    one byte (ggml's quantize_row_q4_0_ref). The number farthest from 0 becomes -8."""
    farthest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale = farthest / np.float32(-8)
    digits = np.minimum(np.trunc(x * inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return np.concatenate([scale.astype("<f2").view(np.uint8), digits[:, :16] | digits[:, 16:] << 4], axis=1)


def dequantize_q4_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    digits = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return scale * (digits.astype(np.float32) - 8)


def quantize_tq2_0(x: np.ndarray) -> np.ndarray:
    """(blocks, 256) float32 to (blocks, 66) bytes: -1, 0 and 1 in two bits, four numbers that are 32 apart in one byte,
    then a scale in float16 (ggml's quantize_row_tq2_0_ref)."""
    scale = np.abs(x).max(axis=1, keepdims=True)
    digits = (np.rint(x * inverse(scale)) + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    codes = np.bitwise_or.reduce(digits << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    return np.concatenate([codes.reshape(-1, 64), scale.astype("<f2").view(np.uint8)], axis=1)


def dequantize_tq2_0(blocks: np.ndarray) -> np.ndarray:
    codes, scale = blocks[:, :64].reshape(-1, 2, 1, 32), np.ascontiguousarray(blocks[:, 64:]).view("<f2")
    digits = codes >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return (digits.reshape(-1, 256).astype(np.float32) - 1) * scale.astype(np.float32)


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale in float32, 0 for blocks of zeros."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint8).numpy()


def from_bfloat16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # to infinity, which `encode` refuses
        return x.astype("<f2").view(np.uint8)


@dataclass(frozen=True)
class GGUFType:
    """A type of tensor: rows are divided into blocks of `block` numbers, `size` bytes each.

    Attributes:
        code: ggml's number of the type.
        encode: (n, block) float32 → (n, size) bytes.
        decode: the other way.
        file_type: `general.file_type` of a file whose matrices have this type (llama.cpp's LLAMA_FTYPE).
    """

    code: int
    block: int
    size: int
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    file_type: int


TYPES: dict[str, GGUFType] = {
    "f32": GGUFType(0, 1, 4, lambda x: x.astype("<f4").view(np.uint8), lambda b: b.view("<f4").astype(np.float32), 0),
    "f16": GGUFType(1, 1, 2, to_float16, lambda b: b.view("<f2").astype(np.float32), 1),
    "bf16": GGUFType(30, 1, 2, to_bfloat16, from_bfloat16, 32),
    "q8_0": GGUFType(8, 32, 34, quantize_q8_0, dequantize_q8_0, 7),
    "q4_0": GGUFType(2, 32, 18, quantize_q4_0, dequantize_q4_0, 2),
    "tq2_0": GGUFType(35, 256, 66, quantize_tq2_0, dequantize_tq2_0, 37),
}
# Others that files of today hold, for an error that names them (ggml.h, enum ggml_type).
# fmt: off
OTHER_TYPES = {
    3: "q4_1", 6: "q5_0", 7: "q5_1", 9: "q8_1", 10: "q2_K", 11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K", 15: "q8_K",
    16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs",
    24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 34: "tq1_0", 39: "mxfp4",
}
# fmt: on


# ---- writing --------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, str]]) -> None:
    """A GGUF file of `metadata` (str, bool, int below 2³², float, list of str, int or float) and `tensors`: name →
    values and the name of a type, whose block divides the rows. Whole or not at all.

    Raises:
        UserError: it cannot be written, or a number that the type does not hold.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += packed_string(key) + packed_value(value)
    offset = 0
    for name, (tensor, kind) in tensors.items():
        dims = tuple(reversed(tensor.shape))
        head += packed_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", TYPES[kind].code, offset)
        offset += aligned(stored_bytes(tuple(tensor.shape), TYPES[kind]))
    with replacing(path, "free some space or choose another --out") as file:
        write_aligned(file, [head])
        for name, (tensor, kind) in tensors.items():
            write_aligned(file, encode(name, tensor, kind))


def packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def packed_value(value: Any) -> bytes:
    """Type and value of a metadata entry."""
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(packed_string, value))
        kind, code = (INT32, "i") if isinstance(value[0], int) else (FLOAT32, "f")
        return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, kind, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + packed_string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    return struct.pack("<II", UINT32, value) if isinstance(value, int) else struct.pack("<If", FLOAT32, value)


def encode(name: str, tensor: Tensor, kind: str) -> Iterator[np.ndarray]:
    """The bytes of `tensor` as `kind`, some rows at a time."""
    type_ = TYPES[kind]
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(CHUNK):
        numbers = piece.cpu().float().numpy()
        data = type_.encode(numbers.reshape(-1, type_.block))
        if kind == "tq2_0" and not np.array_equal(type_.decode(data).ravel(), numbers):
            raise UserError(
                f"weight {name!r} is not -1, 0 or 1 times a scale of its 256 neighbours, which tq2_0 holds; export a "
                "run with --adapter.base ternary, or choose another --type"
            )
        if kind != "f32" and not np.isfinite(type_.decode(data.reshape(-1, type_.size))).all():
            raise UserError(f"weight {name!r} holds numbers beyond {kind}'s range; choose --type bf16 or f32")
        yield data


def write_aligned(file: IO[bytes], pieces: Iterable[Any]) -> None:
    for piece in pieces:
        file.write(piece)
    file.write(bytes(-file.tell() % ALIGNMENT))


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def stored_bytes(shape: tuple[int, ...], type_: GGUFType) -> int:
    return math.prod(shape) // type_.block * type_.size


# ---- reading --------------------------------------------------------------------------------------------------------


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that is named .gguf or begins like one."""
    if not is_file(path):
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    type: GGUFType
    offset: int  # from the beginning of the file


class GGUFFile(Mapping[str, Tensor]):
    """A GGUF file: `metadata`, and its tensors by name, each read and made float32 when it is asked for.

    Raises:
        UserError: not a GGUF file, a truncated or damaged one, or a type of tensor that regpt does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise self.error("is not a GGUF file: it does not begin with GGUF")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self.stored = self.read_head()
        except UnicodeDecodeError:
            raise self.error("is damaged: a name in it is not UTF-8") from None

    def read_head(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        self.at = 4
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            big = version.to_bytes(4, "little") in [v.to_bytes(4, "big") for v in VERSIONS]
            what = "is big-endian" if big else f"has version {version} of the format"
            raise self.error(f"{what}, regpt reads little-endian files of versions 2 and 3", "convert it again")
        n_tensors, n_keys = self.unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise self.error(f"is damaged: it has the key {key!r} twice")
            metadata[key] = self.value(*self.unpack("I"))
        described = [self.description() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"is damaged: general.alignment is {alignment!r}, which is no power of two")
        return metadata, dict(self.located(described, aligned(self.at, alignment), alignment))

    def located(
        self, described: list[tuple[str, tuple[int, ...], GGUFType, int]], start: int, alignment: int
    ) -> Iterator[tuple[str, StoredTensor]]:
        seen: set[str] = set()
        for name, shape, type_, offset in described:
            if name in seen or offset % alignment or (shape[-1] if shape else 1) % type_.block:
                raise self.error(f"is damaged: tensor {name!r} is described twice or in an impossible way")
            seen.add(name)
            if start + offset + stored_bytes(shape, type_) > len(self.data):
                raise self.truncated(f"tensor {name!r} ends beyond it")
            yield name, StoredTensor(shape, type_, start + offset)

    def description(self) -> tuple[str, tuple[int, ...], GGUFType, int]:
        """Name, shape, type and offset of a tensor."""
        name, (n_dims,) = self.string(), self.unpack("I")
        if n_dims > MAX_DIMS:
            raise self.error(f"is damaged: tensor {name!r} has {n_dims} dimensions")
        shape = tuple(reversed(self.unpack(f"{n_dims}Q")))
        code, offset = self.unpack("IQ")
        found = next((type_ for type_ in TYPES.values() if type_.code == code), None)
        if found is None:
            given = OTHER_TYPES.get(code, f"number {code}")
            raise self.error(
                f"holds tensor {name!r} of type {given}, regpt reads {', '.join(TYPES)}", "choose such a file"
            )
        return name, shape, found, offset

    def unpack(self, form: str) -> tuple[Any, ...]:
        try:
            found = struct.unpack_from("<" + form, self.data, self.at)
        except struct.error:
            raise self.truncated("its description ends beyond it") from None
        self.at += struct.calcsize("<" + form)
        return found

    def string(self) -> str:
        (size,) = self.unpack("Q")
        if size > len(self.data) - self.at:
            raise self.truncated("a text ends beyond it")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, n = self.unpack("IQ")
            if n * (8 if inner == STRING else 1) > len(self.data) - self.at:
                raise self.truncated("a list ends beyond it")
            if inner == STRING:
                return [self.string() for _ in range(n)]
            values = self.unpack(f"{n}{self.scalar(inner)}")
            return [*map(shortest, values)] if inner == FLOAT32 else [*values]
        (value,) = self.unpack(self.scalar(kind))
        return shortest(value) if kind == FLOAT32 else value

    def scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.error(f"is damaged: it has metadata of the unknown type {kind}")
        return SCALARS[kind]

    def error(self, what: str, remedy: str = RESTORE) -> UserError:
        return UserError(f"{str(self.path)!r} {what}; {remedy}")

    def truncated(self, what: str) -> UserError:
        return self.error(f"is truncated: it has {len(self.data):,} bytes and {what}")

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        type_, size = stored.type, stored_bytes(stored.shape, stored.type)
        blocks = np.frombuffer(self.data, np.uint8, size, stored.offset).reshape(-1, type_.size)
        rows = max(1, CHUNK // type_.block)
        made = np.empty((len(blocks), type_.block), np.float32)
        for start in range(0, len(blocks), rows):
            made[start : start + rows] = type_.decode(blocks[start : start + rows])
        tensor = torch.from_numpy(made).reshape(stored.shape)
        if not tensor.isfinite().all():
            raise self.error(f"holds numbers in tensor {name!r} that are not finite", "choose another model")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def shortest(value: float) -> float:
    """The number that was meant by a float32: the one with the fewest digits (1e-5, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))
