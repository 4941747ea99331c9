"""Matrix products with what surrounds them: bias, residual, GELU and its derivative, accumulation into float32.

torch calls the same library (cuBLASLt) but offers few of its epilogues, not those that a backward pass needs. The
library is already in the process, so this file calls it by its documented C interface (NVIDIA, cuBLAS, section 3).
Every product asks for several algorithms once, times them on its own operands, and keeps the fastest, also on disk.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable, Hashable
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Values from cublasLt.h and library_types.h, version 13.
COMPUTE_32F = 68
DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD, BIAS_TYPE = 3, 4, 7, 8, 11, 12, 26
A_SCALE_POINTER, B_SCALE_POINTER, FAST_ACCUMULATION = 17, 18, 25
POINTER_MODE, POINTER_MODE_DEVICE = 2, 1
PREFERENCE_WORKSPACE = 1
EPILOGUES = {"none": 1, "bias": 4, "gelu_aux_bias": 164, "dgelu": 192}
WORKSPACE_BYTES = 64 * 2**20  # NVIDIA advises 32 MiB on Hopper; more lets split products be chosen
ALLOC_FAILED, NOT_SUPPORTED = 3, 15  # of cublasStatus_t
ALIGNMENT = 16  # bytes, of every operand: what the kernels load at once; torch's allocations have 512
CANDIDATES = 8
TRIAL_MS, ROUNDS, MUCH_SLOWER = 4.0, 3, 1.25
TUNED_FILE = "algorithm.bin"  # SHA-256 of what follows, then the algorithm
DIGEST_BYTES = 32


class Algorithm(Structure):
    _fields_ = [("data", c_uint64 * 8)]


class Heuristic(Structure):
    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@lru_cache
def library() -> ctypes.CDLL:
    """The cuBLASLt that torch was built with.

    Raises:
        OSError: it is not there (a torch without CUDA).
    """
    major = (torch.version.cuda or "0").split(".")[0]
    lib = ctypes.CDLL(f"libcublasLt.so.{major}")
    lib.cublasLtMatrixLayoutCreate.argtypes = [POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64]
    lib.cublasLtMatmulDescSetAttribute.argtypes = [c_void_p, c_int, c_void_p, c_size_t]
    lib.cublasLtMatmulPreferenceSetAttribute.argtypes = [c_void_p, c_int, c_void_p, c_size_t]
    lib.cublasLtMatmulAlgoGetHeuristic.argtypes = [c_void_p] * 7 + [c_int, POINTER(Heuristic), POINTER(c_int)]
    lib.cublasLtMatmulAlgoCheck.argtypes = [c_void_p] * 6 + [POINTER(Algorithm), POINTER(Heuristic)]
    lib.cublasLtMatmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
    lib.cublasLtGetVersion.restype = c_size_t
    return lib


class Tuned:
    """The algorithms found fastest, on disk where Triton keeps its compiled kernels: a machine tunes once.

    Args:
        about: further parts of every key: the device, the library's version.
        cache: makes Triton's cache manager for a hexadecimal name.
    """

    def __init__(self, about: str, cache: Callable[[str], Any] | None = None):
        if cache is None:
            from triton.runtime.cache import get_cache_manager as cache  # pyright: ignore[reportMissingImports]

            assert cache is not None
        self.about, self.cache = about, cache

    def get(self, key: Hashable) -> bytes | None:
        """The bytes last `put`; None where they are missing or damaged."""
        path = self.place(key).get_file(TUNED_FILE)
        kept = b"" if path is None else Path(path).read_bytes()
        digest, algorithm = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
        return algorithm if digest == hashlib.sha256(algorithm).digest() else None

    def put(self, key: Hashable, algorithm: bytes) -> None:
        self.place(key).put(hashlib.sha256(algorithm).digest() + algorithm, TUNED_FILE)

    def place(self, key: Hashable) -> Any:
        return self.cache(hashlib.sha256(f"{self.about} {key}".encode()).hexdigest())


def tuned_on(device: torch.device) -> Tuned:
    """Algorithms tuned on such a device with this version of the library."""
    return Tuned(f"{torch.cuda.get_device_name(device)} cuBLASLt {library().cublasLtGetVersion()} {WORKSPACE_BYTES}")


class Unsupported(RuntimeError):
    """The library proposes an algorithm and then does not support it."""


def check_status(status: int, call: str) -> None:
    if status:
        name = " (CUBLAS_STATUS_ALLOC_FAILED)" if status == ALLOC_FAILED else ""
        raise (Unsupported if status == NOT_SUPPORTED else RuntimeError)(
            f"{call} failed with cuBLAS status {status}{name}"
        )


def fastest(candidates: int, time: Callable[[int, int], float]) -> int:
    """The number of the fastest candidate; `time(i, runs)` is the milliseconds of one of `runs` runs of candidate i,
    infinite for one that cannot be run.

    One run finds the far slower ones. The others run in turn: on a busy device, at its power limit, the order is
    another than on a cool one.
    """
    once = [time(i, 1) for i in range(candidates)]
    if min(once) == math.inf:
        raise RuntimeError("cuBLASLt supports none of the algorithms that it proposes")
    left = [i for i, ms in enumerate(once) if ms <= MUCH_SLOWER * min(once)]
    if len(left) == 1:
        return left[0]
    runs = max(1, min(50, int(TRIAL_MS / min(once))))
    totals = dict.fromkeys(left, 0.0)
    for _ in range(ROUNDS):
        for i in left:
            totals[i] += time(i, runs)
    return min(left, key=totals.__getitem__)


@dataclass
class ProductPlan:
    """One product of given shapes: its descriptors, made once, and the algorithm found fastest."""

    operation: c_void_p
    layouts: list[c_void_p]  # of cuBLAS's A, B, C and D
    algorithm: Algorithm | None = None


class Products:
    """Products on one device.

    Args:
        device: a CUDA device.
        tune: time the algorithms on first use; otherwise take the library's first choice, which is the same every time.
        tuned: keeps what was found fastest, for the next process; None keeps nothing.
    """

    def __init__(self, device: torch.device, *, tune: bool = True, tuned: Tuned | None = None):
        self.lib = library()
        self.tune, self.tuned = tune, tuned if tune else None
        self.handle = c_void_p()
        check_status(self.lib.cublasLtCreate(byref(self.handle)), "cublasLtCreate")
        self.workspaces: dict[int, Tensor] = {}  # one for each stream: products on two streams run at the same time
        self.plans: dict[tuple[Any, ...], ProductPlan] = {}
        self.one, self.zero = c_float(1.0), c_float(0.0)
        self.constants = torch.tensor([0.0, 1.0], device=device).unbind()  # where one factor is on the device, both are

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: str = "none",
        bias: Tensor | None = None,
        aux: Tensor | None = None,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
        fast: bool = False,
    ) -> Tensor:
        """out = epilogue(scale · op(a) · op(b) + add), all of them contiguous matrices, aligned to 16 bytes.

        A plan is found by shapes and types: it holds the row strides and assumes the alignment.

        Args:
            a: (M, K), or (K, M) with `transpose_a`; 16-bit floats, or FP8.
            b: (K, N), or (N, K) with `transpose_b`; the dtype of a, or the other FP8. FP8 takes `transpose_b` and not
                `transpose_a`, and not two e5m2.
            out: (M, N), the dtype of a, or float32; of FP8, bfloat16 or float32.
            epilogue: none; bias: + bias; gelu_aux_bias: GELU(tanh) of the sum with bias, which is also written to aux;
                dgelu: times the derivative of GELU at aux.
            bias: (N,), the dtype of out.
            aux: (M, N).
            add: (M, N) with the dtype of out; `out` itself accumulates.
            scale: float32 scalar on the device; None is 1.
            scales: of a and b, where they are FP8: float32 scalars on the device.
            fast: FP8 may be summed with fewer bits than float32 has.
        """
        for matrix in (a, b, out, aux, add):
            assert matrix is None or (matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT == 0), (
                f"a product takes contiguous, aligned operands; this one has strides {matrix.stride()}"
            )
        options = None if bias is None else bias.dtype, add is None, add is out, scale is None, fast
        key = (a.shape, b.shape, a.dtype, b.dtype, out.dtype, transpose_a, transpose_b, epilogue, *options)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.describe(a, b, out, transpose_a, transpose_b, epilogue, bias, scale, fast)
        self.point(plan, bias, aux, scales)
        if plan.algorithm is None:
            plan.algorithm = self.recall(plan, key)
        if plan.algorithm is None:
            plan.algorithm = self.choose(plan, a, b, out, add, scale)
            if self.tuned is not None:
                self.tuned.put(key, bytes(plan.algorithm))
        self.run(plan, plan.algorithm, a, b, out, add, scale)
        return out

    def describe(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        transpose_a: bool,
        transpose_b: bool,
        epilogue: str,
        bias: Tensor | None,
        scale: Tensor | None,
        fast: bool,
    ) -> ProductPlan:
        """cuBLAS counts columns first: a row-major out = a · b is its outᵀ = bᵀ · aᵀ, and a and b change places."""
        operation = c_void_p()
        create = self.lib.cublasLtMatmulDescCreate
        check_status(create(byref(operation), COMPUTE_32F, DATA_TYPES[torch.float32]), "cublasLtMatmulDescCreate")
        self.set(operation, TRANSA, c_int32(transpose_b))
        self.set(operation, TRANSB, c_int32(transpose_a))
        self.set(operation, EPILOGUE, c_uint32(EPILOGUES[epilogue]))
        if "gelu" in epilogue:
            self.set(operation, AUX_LD, c_int64(out.size(1)))
        if bias is not None:
            self.set(operation, BIAS_TYPE, c_int32(DATA_TYPES[bias.dtype]))
        if scale is not None:
            self.set(operation, POINTER_MODE, c_int32(POINTER_MODE_DEVICE))
        if fast:
            self.set(operation, FAST_ACCUMULATION, c_int8(1))
        return ProductPlan(operation, [self.layout(matrix) for matrix in (b, a, out, out)])

    def layout(self, matrix: Tensor) -> c_void_p:
        rows, columns = matrix.shape
        found = c_void_p()
        create = self.lib.cublasLtMatrixLayoutCreate
        status = create(byref(found), DATA_TYPES[matrix.dtype], columns, rows, matrix.stride(0))
        check_status(status, "cublasLtMatrixLayoutCreate")
        return found

    def set(self, operation: c_void_p, attribute: int, value: Any) -> None:
        set_attribute = self.lib.cublasLtMatmulDescSetAttribute
        check_status(set_attribute(operation, attribute, byref(value), ctypes.sizeof(value)), f"attribute {attribute}")

    def point(
        self, plan: ProductPlan, bias: Tensor | None, aux: Tensor | None, scales: tuple[Tensor, Tensor] | None
    ) -> None:
        if bias is not None:
            self.set(plan.operation, BIAS_POINTER, c_void_p(bias.data_ptr()))
        if aux is not None:
            self.set(plan.operation, AUX_POINTER, c_void_p(aux.data_ptr()))
        if scales is not None:  # a and b change places, see `describe`
            self.set(plan.operation, A_SCALE_POINTER, c_void_p(scales[1].data_ptr()))
            self.set(plan.operation, B_SCALE_POINTER, c_void_p(scales[0].data_ptr()))

    def recall(self, plan: ProductPlan, key: tuple[Any, ...]) -> Algorithm | None:
        """The algorithm that another process found fastest, if it is intact and the library still takes it."""
        data = None if self.tuned is None else self.tuned.get(key)
        if data is None or len(data) != ctypes.sizeof(Algorithm):
            return None
        algorithm, result = Algorithm.from_buffer_copy(data), Heuristic()
        arguments = (self.handle, plan.operation, *plan.layouts, byref(algorithm), byref(result))
        usable = self.lib.cublasLtMatmulAlgoCheck(*arguments) == 0 and result.workspace <= WORKSPACE_BYTES
        return algorithm if usable else None

    def choose(
        self, plan: ProductPlan, a: Tensor, b: Tensor, out: Tensor, add: Tensor | None, scale: Tensor | None
    ) -> Algorithm:
        """The fastest of the library's candidates on these operands."""
        preference = c_void_p()
        check_status(self.lib.cublasLtMatmulPreferenceCreate(byref(preference)), "cublasLtMatmulPreferenceCreate")
        limit = c_size_t(WORKSPACE_BYTES)
        set_attribute = self.lib.cublasLtMatmulPreferenceSetAttribute
        check_status(
            set_attribute(preference, PREFERENCE_WORKSPACE, byref(limit), 8), "cublasLtMatmulPreferenceSetAttribute"
        )
        found, count = (Heuristic * CANDIDATES)(), c_int()
        arguments = (self.handle, plan.operation, *plan.layouts, preference, CANDIDATES, found, byref(count))
        check_status(self.lib.cublasLtMatmulAlgoGetHeuristic(*arguments), "cublasLtMatmulAlgoGetHeuristic")
        self.lib.cublasLtMatmulPreferenceDestroy(preference)
        algorithms = [each.algorithm for each in found[: count.value] if each.state == 0]
        if not algorithms:
            raise RuntimeError(f"cuBLASLt has no algorithm for {tuple(a.shape)} by {tuple(b.shape)}")
        if not self.tune:
            return algorithms[0]
        if add is out:  # what is accumulated must not be written to in trials
            out = add = torch.zeros_like(out)

        def trial(i: int, runs: int) -> float:
            try:
                return self.time(plan, algorithms[i], runs, a, b, out, add, scale)
            except torch.AcceleratorError as error:  # the device is lost: say with what
                sizes = f"{tuple(a.shape)} by {tuple(b.shape)}, {a.dtype}"
                error.add_note(f"in a trial of cuBLASLt's algorithm {i} of {len(algorithms)} for {sizes}")
                raise

        torch.cuda.synchronize(out.device)  # a fault of what was launched before is not one of a trial
        return algorithms[fastest(len(algorithms), trial)]

    def time(self, plan: ProductPlan, algorithm: Algorithm, runs: int, *operands: Any) -> float:
        """Milliseconds of one of `runs` runs; infinite if the library does not support it after all."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            self.run(plan, algorithm, *operands)
        except Unsupported:
            return math.inf
        start.record()
        for _ in range(runs):
            self.run(plan, algorithm, *operands)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / runs

    def run(
        self,
        plan: ProductPlan,
        algorithm: Algorithm,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        add: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        alpha, beta = byref(self.one), byref(self.zero if add is None else self.one)
        if scale is not None:
            alpha, beta = scale.data_ptr(), self.constants[0 if add is None else 1].data_ptr()
        of_a, of_b, of_c, of_d = plan.layouts
        stream = torch.cuda.current_stream(out.device).cuda_stream
        workspace, added = self.workspace(stream, out.device), out if add is None else add
        status = self.lib.cublasLtMatmul(
            self.handle, plan.operation, alpha, b.data_ptr(), of_a, a.data_ptr(), of_b, beta, added.data_ptr(), of_c,
            out.data_ptr(), of_d, byref(algorithm), workspace.data_ptr(), WORKSPACE_BYTES, stream,
        )  # fmt: skip
        check_status(status, "cublasLtMatmul")

    def workspace(self, stream: int, device: torch.device) -> Tensor:
        if stream not in self.workspaces:
            self.workspaces[stream] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return self.workspaces[stream]
