"""The run folder. Its layout is stable; see docs/formats.md."""

import json
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import regpt
from regpt.checkpoint.load import checkpoints
from regpt.config import RunConfig, read_config
from regpt.console.text import counted, without_user
from regpt.errors import UserError, word
from regpt.files import PARTIAL, exists, is_file, is_folder, locked, sync, write_errors, write_json, write_text
from regpt.parallel.mesh import Mesh

CONFIG, LOCK = "config.toml", ".lock"
UNFINISHED = CONFIG + PARTIAL  # a config.toml that is being written


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """The folder `run`, made if need be, is this process's own: no other one can write there before it has ended.

    Raises:
        UserError: another process has it, or it cannot be written to.
    """
    with ExitStack() as stack:
        with write_errors(run, "make it writable or choose another folder"):
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run / LOCK, run, "choose another folder"))
        yield


def create_run(run: Path, config: RunConfig, env: dict[str, Any], beside: Sequence[str] = ()) -> None:
    """Make the folder with config.toml and env.json; what is named in `beside` may be in it already.

    Raises:
        UserError: the folder holds a run already, or other files, or cannot be written.
    """
    refuse_used_folder(run, beside)
    with write_errors(run, "choose another --out"):
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "env.json", env)
        write_text(run / CONFIG, config.to_toml())  # last: it makes a run of the folder
        sync(run.absolute().parent)


def write_run_config(run: Path, config: RunConfig) -> None:
    """Replace config.toml, whole or not at all, when it says something else.

    Raises:
        UserError: the folder cannot be written.
    """
    if (run / CONFIG).read_text(encoding="utf-8") != config.to_toml():
        write_text(run / CONFIG, config.to_toml(), free_space(run))  # half of one may be valid, and mean something else


def is_run(run: Path) -> bool:
    return is_file(run / CONFIG)


def refuse_used_folder(run: Path, beside: Sequence[str] = ()) -> None:
    """Raise a UserError unless `run` can become the folder of a new run."""
    if exists(run / CONFIG):
        raise UserError(
            f"{str(run)!r} already holds a run; go on with: regpt train --resume {word(run)}, or choose another --out"
        )
    if exists(run) and not is_folder(run):
        raise UserError(f"--out {str(run)!r} is a file; choose a folder that does not exist yet")
    if is_folder(run) and any(path.name not in (*beside, LOCK, UNFINISHED, "env.json") for path in run.iterdir()):
        raise UserError(f"{str(run)!r} is not empty; choose a folder for the run that does not exist yet")


def read_run_config(run: Path) -> RunConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: the folder does not exist or holds no run.
    """
    path = run / CONFIG
    if not is_file(path):
        if is_run(run.parent.parent):
            raise UserError(
                f"{str(run)!r} is no run but lies in one; give the run itself, {word(run.parent.parent)}, or start a "
                f"new run from a checkpoint with: regpt train --fork-from {word(run)} --out RUN2"
            )
        if folders := checkpoints(run):
            raise UserError(
                f"run folder {str(run)!r} has lost its {CONFIG}; restore it, or start a new run from its newest "
                f"checkpoint with: regpt train --fork-from {word(folders[-1])} --out RUN2"
            )
        what = f"holds no run (no {CONFIG})" if is_folder(run) else "does not exist"
        raise UserError(
            f"run folder {str(run)!r} {what}; start one with: regpt train RECIPE --data DIR --out {word(run)}"
        )
    return read_config(str(path))


def whole_lines(path: Path) -> int:
    """Bytes of the lines of a file that have an end."""
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def free_space(run: Path) -> str:
    """The remedy where a file of the run cannot be written."""
    return f"free some space or make the place writable, then go on with: regpt train --resume {word(run)}"


class JsonLines:
    """An append-only file of one JSON object a line, each written at once. A last line torn by a crash is cut off.

    Use it as a context.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """

    def __init__(self, path: Path):
        self.path = path
        with write_errors(path, free_space(path.parent)):
            whole = whole_lines(path) if path.exists() else 0
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)
            self.file.truncate(whole)

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        with write_errors(self.path, free_space(self.path.parent)):
            while line:
                line = line[self.file.write(line) :]

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def describe_environment(mesh: Mesh, data: dict[str, Any], parameters: int, argv: Sequence[str]) -> dict[str, Any]:
    """The content of env.json: environment of a run; `data` describes its data."""
    return {
        **made_with(mesh),
        "commit": source_commit(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "argv": [without_user(word) for word in argv],
        "started": time.time(),
        "parameters": parameters,
        "data": data,
    }


def made_with(mesh: Mesh) -> dict[str, Any]:
    """Facts about the computing device."""
    return {
        "regpt": regpt.__version__,
        "torch": torch.__version__,
        "host": platform.node(),
        "device": device_name(mesh.device),
        "world_size": mesh.world_size,
    }


def device_name(device: torch.device) -> str:
    """Name of the computing device: the GPU's name, or the kind of device and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {counted(torch.get_num_threads(), 'thread')}"


def source_commit() -> str | None:
    """Commit of the checkout that regpt runs from, with `+` when it has changes; None for an installed package."""
    here = Path(regpt.__file__).parent
    try:
        git = ["git", "-C", str(here)]
        inside = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10)
        if inside.returncode:
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else None
