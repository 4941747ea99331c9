"""Versions, CPU, memory, disk, extras."""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil
import torch

import regpt
from regpt.console.text import counted
from regpt.kernels.few_rows import COMPILERS, load_few_rows
from regpt.tools.doctor.doctor import Trial
from regpt.tools.measure import free_disk_bytes, installed, memory_bytes
from regpt.train.memory import available_memory

GIB = 2**30
BUNDLES = ("all", "dev")  # extras that name other extras
PACKAGES = ("torch", "numpy", "triton", "safetensors", "tokenizers", "tiktoken")


def host_trials(folder: Path) -> Iterator[Trial]:
    yield from versions()
    yield Trial("host", "CPU", "note", cpu())
    fast = load_few_rows() is not None
    said = (
        "compiles the products of texts on a CPU" if fast else f"none works ({', '.join(COMPILERS)}): texts on a CPU "
    )
    yield Trial("host", "C compiler", "ok" if fast else "no", said if fast else said + "are slower, int8 is refused")
    total, free = memory_bytes(torch.device("cpu")) / GIB, available_memory() / GIB
    yield Trial("host", "memory", "note", f"{total:.1f} GiB, {free:.1f} GiB free")
    yield Trial("host", "disk", "note", f"{free_disk_bytes(folder) / GIB:,.0f} GiB free")
    yield from extras()


def versions() -> Iterator[Trial]:
    yield Trial("versions", "regpt", "note", regpt.__version__)
    yield Trial("versions", "Python", "note", f"{platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        yield Trial("versions", name, "note", installed(name) or "not installed")
    cuda = torch.version.cuda
    yield Trial("versions", "CUDA", "note", f"torch was built for {cuda}" if cuda else "torch was built without CUDA")


def cpu() -> str:
    cores, threads = counted(psutil.cpu_count() or 1, "core"), counted(torch.get_num_threads(), "thread")
    return (
        f"{platform.processor() or platform.machine()}, {cores}, {threads}, {torch.backends.cpu.get_cpu_capability()}"
    )


def extras() -> Iterator[Trial]:
    """Every extra of the installed package: its packages, or those that are missing and how to install them."""
    try:
        required = distribution("regpt").requires or []
    except PackageNotFoundError:
        yield Trial("extras", "regpt", "no", "regpt is not installed, it runs from its source: pip install -e .")
        return
    for extra, packages in packages_of_extras(required).items():
        missing = [name for name in packages if installed(name) is None]
        if missing:
            yield Trial("extras", extra, "no", f"{', '.join(missing)} missing; pip install 'regpt[{extra}]'")
        else:
            yield Trial("extras", extra, "ok", ", ".join(packages))


def packages_of_extras(required: list[str]) -> dict[str, list[str]]:
    """Extra → names of its packages, from lines such as `pyarrow>=18; extra == "data"`."""
    found: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"""extra\s*==\s*["']([\w.-]+)["']""", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and extra[1] not in BUNDLES and name[0] != "regpt":
            found.setdefault(extra[1], []).append(name[0])
    return found
