"""Versions, CPU, memory, disk, extras: what needs no GPU."""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import psutil
import torch

import regpt
from regpt.console.text import counted
from regpt.tools.doctor.doctor import Trial, attempt
from regpt.tools.measure import disk_write_bytes, free_disk_bytes, memory_bytes
from regpt.train.memory import available_memory

GIB = 2**30
BUNDLES = ("all", "dev")  # extras that name other extras
PACKAGES = ("torch", "numpy", "triton", "safetensors", "tokenizers", "tiktoken")
# What of an extra is worth having, in a few words.
PURPOSES = {
    "offline": "GPT-2's vocabulary without a download",
    "data": "Parquet, Zstandard, the hub, near duplicates",
    "buckets": "data and runs at s3:// and gs://",
    "docs": "the manual as a site",
    "notebook": "the notebook of the manual",
    "fast": "tokenization several times as fast",
    "ray": "preparation on many machines",
    "report": "pictures",
    "hopper": "faster attention on Hopper GPUs",
    "lm-eval": "the standard evaluation harness",
    "serve": "the server and its web page",
    "wandb": "metrics to Weights & Biases",
    "tensorboard": "metrics to TensorBoard",
}


def host_trials(folder: Path) -> Iterator[Trial]:
    yield from versions()
    yield Trial("host", "CPU", "note", cpu())
    yield attempt("host", "memory", memory)
    yield attempt("host", "disk", lambda: disk(folder))
    yield from extras()


def versions() -> Iterator[Trial]:
    yield Trial("versions", "regpt", "note", regpt.__version__)
    yield Trial("versions", "Python", "note", f"{platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        found = installed(name)
        yield Trial("versions", name, "note", found or "not installed")
    cuda = torch.version.cuda
    yield Trial("versions", "CUDA", "note", f"torch was built for {cuda}" if cuda else "torch was built without CUDA")


def installed(name: str) -> str | None:
    """The version of a package, None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    cores, threads = counted(psutil.cpu_count() or 1, "core"), counted(torch.get_num_threads(), "thread")
    return (
        f"{platform.processor() or platform.machine()}, {cores}, {threads}, {torch.backends.cpu.get_cpu_capability()}"
    )


def memory() -> tuple[str, float, str]:
    total, free = memory_bytes(torch.device("cpu")) / GIB, available_memory() / GIB
    return f"{total:.1f} GiB, {free:.1f} GiB free", total, "GiB"


def disk(folder: Path) -> tuple[str, float, str]:
    rate = disk_write_bytes(folder) / 1e6
    return f"{rate:,.0f} MB/s written and synced, {free_disk_bytes(folder) / GIB:,.0f} GiB free", rate, "MB/s"


def extras() -> Iterator[Trial]:
    """Every extra of the installed package: which of its packages are missing, and how to get them."""
    try:
        required = distribution("regpt").requires or []
    except PackageNotFoundError:
        yield Trial("extras", "regpt", "no", "it runs from its source and is not installed: pip install -e .")
        return
    for extra, packages in packages_of_extras(required).items():
        missing = [name for name in packages if installed(name) is None]
        purpose = PURPOSES.get(extra, "")
        if missing:
            how = f"pip install 'regpt[{extra}]'"
            yield Trial("extras", extra, "no", f"{purpose}: {', '.join(missing)} missing; {how}".lstrip(": "))
        else:
            yield Trial("extras", extra, "ok", purpose)


def packages_of_extras(required: list[str]) -> dict[str, list[str]]:
    """Extra → names of its packages, from lines such as `pyarrow>=18; extra == "data"`."""
    found: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"""extra\s*==\s*["']([\w.-]+)["']""", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and extra[1] not in BUNDLES and name[0] != "regpt":
            found.setdefault(extra[1], []).append(name[0])
    return found
