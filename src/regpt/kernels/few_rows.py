"""Products of a few rows on a CPU, by a C file that the machine's compiler translates once (`few_rows.c`).

A decode step multiplies one row, or a few, by every weight: it can be no faster than memory is read. PyTorch's products
of one row read at half that speed; this kernel reads float32 as fast as the memory, and Q8_0 (llama.cpp's 8.5 bits a
weight) in a third to a quarter of the time.
"""

import contextlib
import copy
import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from regpt.model.layers import Linear
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer
from regpt.remote.download import REMOTE_OPTIONS

MOST = 8  # rows; of few_rows.c
VECTOR, LARGEST_HEAD = 16, 256  # of heads; of few_rows.c
GROUP = 32  # weights that share a scale
SOURCE = Path(__file__).with_name("few_rows.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_S = 60.0


@dataclass
class FewRows:
    """The compiled products.

    Attributes:
        library: the loaded file.
        threads: of each product; 0 until `one_thread` sets it: as many as PyTorch's.
    """

    library: ctypes.CDLL
    threads: int = 0

    def fits(self, x: Tensor, n_in: int) -> bool:
        return (
            x.dtype == torch.float32
            and x.device.type == "cpu"
            and 0 < x.numel() <= MOST * n_in
            and not torch.is_grad_enabled()
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`ops.linear`; by PyTorch where it does not fit."""
        if not (self.fits(x, weight.size(1)) and weight.dtype == torch.float32 and weight.is_contiguous()):
            return PLAIN.linear(x, weight, bias)
        return self.product(x, weight, None, bias)

    def product(self, x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
        """x (..., C) · weightᵀ + bias for at most `MOST` rows; weight (F, C) float32, or int8 with scales (F, C / 32)
        float16. The bits of a row do not depend on the others."""
        n_out, n_in = weight.shape
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], n_out))
        self.library.few_rows(
            x.data_ptr(),
            weight.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // n_in,
            n_in,
            n_out,
            self.threads or torch.get_num_threads(),
        )
        return y

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one query q (H, 1, D) to all of k and v (G, S, D), whose heads may be apart: (H, 1, D)."""
        H, _, D = q.shape
        G, S, _ = k.shape
        q = q if q.stride(0) == D else q.contiguous()
        y = torch.empty(H, 1, D)
        pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()
        threads = self.threads or torch.get_num_threads()
        self.library.attend_one(*pointers, H, H // G, D, S, k.stride(0), D**-0.5, threads)
        return y

    def attends(self, k: Tensor, v: Tensor) -> bool:
        """Whether `attend_one` computes it."""
        D = k.size(2)
        fits = k.dtype == torch.float32 and D % VECTOR == 0 and D <= LARGEST_HEAD
        return fits and k.stride() == v.stride() == (k.stride(0), D, 1)


def with_few_rows(model: Transformer, kernel: FewRows) -> Transformer:
    """A model with the same parameters, not copies, whose plain products are `kernel`'s."""
    shared = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())}).eval()
    for module in (shared, *shared.modules()):
        if isinstance(module, Linear | Transformer):
            ops = module.ops
            by = kernel.linear if ops.linear is PLAIN.linear else ops.linear
            module.ops = replace(ops, linear=by, head=kernel.linear if ops.head is PLAIN.head else ops.head)
    return shared


@contextlib.contextmanager
def one_thread(kernel: FewRows | None) -> Iterator[None]:
    """PyTorch's operations have one thread, the products of `kernel` as many as PyTorch had: those of small operations
    wait for each other, which on a busy machine takes much longer than the operations."""
    threads = torch.get_num_threads()
    if kernel is not None:
        kernel.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def load_few_rows() -> FewRows | None:
    """The products, compiled on the first use on a machine (a second) and kept in `~/.cache/regpt`; None where there
    is no compiler, or where what it made does not load or computes something else."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), "")
    try:
        return checked(compiled(compiler)) if compiler else None
    except (OSError, subprocess.SubprocessError):
        return None


def compiled(compiler: str) -> ctypes.CDLL:
    """The library for this processor, made where it is not there yet."""
    about = "\n".join((SOURCE.read_text(encoding="utf-8"), *FLAGS, compiler, platform.machine(), processor()))
    name = f"few_rows-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    folder = REMOTE_OPTIONS.folder / "compiled"
    if (folder / name).is_file():
        return ctypes.CDLL(str(folder / name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder)
    except OSError:  # a home that cannot be written: compiled again by each process
        folder, place = None, tempfile.TemporaryDirectory()
    with place as temporary:
        made = Path(temporary) / name
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
        if folder is not None:
            made = made.replace(folder / name)
        return ctypes.CDLL(str(made))  # stays loaded when the file is gone


def processor() -> str:
    """What the compiled file depends on: a home may be that of several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({one for one in lines if one.startswith(("model name", "flags", "Features"))}))


def checked(library: ctypes.CDLL) -> FewRows | None:
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.few_rows.argtypes, library.few_rows.restype = (pointer,) * 5 + (number,) * 4, None
    library.attend_one.argtypes = (pointer,) * 4 + (number,) * 5 + (ctypes.c_float, number)
    library.attend_one.restype = None
    kernel = FewRows(library)
    x, weight = torch.arange(80.0).view(2, 40).sin(), torch.arange(120.0).view(3, 40).cos()
    found = kernel.product(x, weight, None, None)
    q, k = weight[:, None, :VECTOR], torch.arange(240.0).view(3, 5, VECTOR).sin()
    right = torch.allclose(found, PLAIN.linear(x, weight, None), atol=1e-5)
    expected = PLAIN.attention(q[None], k[None], k[None], None)[0]
    return kernel if right and torch.allclose(kernel.attend_one(q, k, k), expected, atol=1e-5) else None
