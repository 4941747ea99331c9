"""Runs and checkpoints of a store, copied to this machine: the files that are needed, checked before they count."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from regpt.checkpoint.best import BEST, METRICS, by_loss, validation_losses
from regpt.checkpoint.load import (
    CHECKPOINTS,
    STEP_FOLDER,
    none_intact,
    print_warning,
    refuse_other_step,
    step_of,
    verify_checkpoint,
)
from regpt.checkpoint.manifest import MANIFEST, STATE, check_sizes, read_checkpoint_manifest
from regpt.errors import UserError
from regpt.files import discard, rename, temporary_name
from regpt.remote import is_address
from regpt.remote.download import REMOTE_OPTIONS, download_lock
from regpt.remote.lease import FOLDER as LEASE
from regpt.remote.retry import NotTransferred
from regpt.remote.store import Store

CONFIG = "config.toml"  # the last file to be copied next to checkpoints: it makes a run of a folder
STORED_STEP = re.compile(r"step-\d{8,}")
Warn = Callable[[str], None]


def folder_name(url: str) -> str:
    """Name of the copy of `url`: its last two parts, and a hash of all of it."""
    parts = [part for part in url.rstrip("/").partition("://")[2].split("/") if part]
    return f"{plain('-'.join(parts[-2:]))}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}"


def plain(name: str) -> str:
    """`name` with letters, digits and a few signs only, for a folder."""
    return re.sub(r"[^\w.-]", "-", name).lstrip(".") or "run"


def fetch_model(url: str, *, optimizer: bool = False, warn: Warn = print_warning) -> Path:
    """Download the checkpoint that `url` means, a run's newest intact one or a checkpoint; return its local folder.

    It is kept in the copy of its run, and downloaded again only if its manifest has changed.

    Args:
        optimizer: also its optimizer's tensors, two thirds of the bytes.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    run_url, step = split_address(url)
    store, run = Store(run_url), copy_of(run_url)
    with download_lock(run.parent / "copy"):
        get(store, CONFIG, run / CONFIG)
        names, folder = [""], None
        while folder is None and names != (names := chosen_checkpoints(store, step, run)):
            # Once more where others have been written, and these deleted, meanwhile.
            folder, _ = first_intact(store, names, run, optimizer=optimizer, warn=warn)
    if folder is None:
        raise none_intact(url, len(names))
    return folder


def local_run(name: str) -> Path:
    """Folder of the run `name`; of an address, a local copy without checkpoints: configuration, metrics, samples,
    evaluations.

    Raises:
        UserError: there is no run at the address, or it cannot be read.
    """
    if not is_address(name):
        return Path(name)
    store = Store(name)
    run = copy_of(store.url)
    with download_lock(run.parent / "copy"):
        for path in set(run.iterdir()) - {run / CHECKPOINTS}:  # some may have gone there
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        get_run_files(store, run)
    return run


def copy_of(url: str) -> Path:
    """Folder of the copy of the run at `url`, with the run's own name; made if need be."""
    folder = REMOTE_OPTIONS.folder / "fetched" / folder_name(url) / plain(url.rstrip("/").rsplit("/", 1)[-1])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def restore(store: Store, run: Path, warn: Warn = print_warning) -> list[str]:
    """Download the run, with its newest intact checkpoint, into `run`; return the names of the damaged ones.

    Raises:
        UserError: there is no run, none of its checkpoints is intact, or it cannot be read.
    """
    names = chosen_checkpoints(store, "", run)
    folder, damaged = first_intact(store, names, run, optimizer=True, warn=warn)
    if names and folder is None:
        raise none_intact(store.url, len(names))
    get_run_files(store, run)
    return damaged


def split_address(url: str) -> tuple[str, str]:
    """The address of the run, and the name of the checkpoint (or `best`) that `url` names in it, if it does."""
    parts = url.rstrip("/").rsplit("/", 2)
    if len(parts) == 3 and parts[1] == CHECKPOINTS and (STEP_FOLDER.fullmatch(parts[2]) or parts[2] == BEST):
        return parts[0], parts[2]
    return url.rstrip("/"), ""


def chosen_checkpoints(store: Store, name: str, run: Path) -> list[str]:
    """The checkpoints that may be meant by `name`, the first choice first: by the step, or for `best` by the validation
    loss of the metrics, which are downloaded into `run`."""
    if name and name != BEST:
        return [name]
    names = [name for name, is_complete in store.tries(lambda: stored_checkpoints(store)).items() if is_complete]
    if name == BEST:
        get(store, METRICS, run / METRICS)
        return by_loss(names, validation_losses(run / METRICS))
    return names


def stored_checkpoints(store: Store) -> dict[str, bool]:
    """Checkpoint folders of the run in `store`, the newest first, and whether they have a manifest."""
    files = store.files(CHECKPOINTS)
    folders = filter(STORED_STEP.fullmatch, {name.split("/")[1] for name in files})
    names = sorted(folders, key=lambda name: step_of(Path(name)), reverse=True)
    return {name: f"{CHECKPOINTS}/{name}/{MANIFEST}" in files for name in names}


def first_intact(
    store: Store, names: list[str], run: Path, *, optimizer: bool, warn: Warn
) -> tuple[Path | None, list[str]]:
    """The first of `names` that is what its manifest says, as a folder in `run`; and the damaged ones before it."""
    damaged: list[str] = []
    for name in names:
        try:
            return get_checkpoint(store, name, run, optimizer=optimizer), damaged
        except NotTransferred:
            raise
        except UserError as error:
            damaged.append(name)
            warn(f"skipped {store.url}/{CHECKPOINTS}/{name}: {error}")
    return None, damaged


def get_checkpoint(store: Store, name: str, run: Path, *, optimizer: bool) -> Path:
    """Download a checkpoint, whole or not at all, unless it is there already; returns its folder.

    Raises:
        NotTransferred: it cannot be read.
        UserError: it is not what its manifest says, or has none.
    """
    place, folder = f"{CHECKPOINTS}/{name}", run / CHECKPOINTS / name
    temporary = temporary_name(folder)
    try:
        if not get(store, f"{place}/{MANIFEST}", temporary / MANIFEST):
            raise UserError(f"it has no {MANIFEST}, so it is not complete")
        if is_copy(folder, (temporary / MANIFEST).read_bytes(), optimizer=optimizer):
            return folder
        for file in read_checkpoint_manifest(temporary).needed(optimizer=optimizer):
            get(store, f"{place}/{file.file}", temporary / file.file)
        verify_checkpoint(temporary, optimizer=optimizer)
        refuse_other_step(temporary / STATE, name)
        discard(folder)
        rename(temporary, folder)
    except NotTransferred:
        raise
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), f"{store.url}/{place}")) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def is_copy(folder: Path, manifest: bytes, *, optimizer: bool) -> bool:
    """Whether `folder` has this manifest and the files that are needed."""
    try:
        check_sizes(folder, optimizer=optimizer)
        return (folder / MANIFEST).read_bytes() == manifest
    except UserError:
        return False


def get_run_files(store: Store, run: Path) -> None:
    """Download the files next to checkpoints, config.toml last; a UserError where that one is not there."""
    names = [name for name in store.tries(store.files) if name.split("/")[0] not in (CHECKPOINTS, LEASE)]
    if CONFIG not in names:
        raise UserError(f"{store.url} holds no run (no {CONFIG}); check the address")
    for name in sorted(names, key=lambda name: name == CONFIG):
        get(store, name, run / name)


def get(store: Store, name: str, path: Path) -> bool:
    """Download the file `name` as `path`; False where there is no such file."""
    return store.tries(lambda: store.get(name, path), name=name)
