"""Text → shards: divide the sources, encode the partitions wherever there is room, put them together in order.

The bytes written depend on the sources, the tokenizer and the options; never on the number of workers, where they run,
or how often the work was interrupted. Each partition's tokens lie in `OUT/.work` until they are in a shard, so an
attempt that was killed loses what it had in hand, and the same command goes on.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from regpt.data.manifest import Manifest
from regpt.errors import UsageError, UserError
from regpt.files import exists, is_folder, locked, write_json
from regpt.prepare.assemble import STATE
from regpt.prepare.corpus import default_fraction, split_rule
from regpt.prepare.decontaminate import Evaluations, read_evaluations
from regpt.prepare.finished import finished
from regpt.prepare.formats import check_text
from regpt.prepare.job import Job, Progress
from regpt.prepare.named import NAMED_OPTIONS, Listing, NamedOptions, list_sources
from regpt.prepare.parts import RESTART
from regpt.prepare.placement import Placement, count_workers, start_pool
from regpt.prepare.settings import TEXT_OPTIONS, Filters, Settings, TextOptions
from regpt.prepare.write import FULL, remove_leftovers
from regpt.remote.download import DownloadProgress
from regpt.structured import read_json
from regpt.text.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000  # the size of FineWeb-Edu's shards in build-nanogpt
WORK = ".work"
FLAGS = {  # of the settings that an attempt must share with the one that it goes on from
    "tokenizer_sha256": "--tokenizer",
    "val_fraction": "--val-fraction",
    "min_chars": "--min-chars",
    "dedup": "--dedup",
    "evaluations": "--decontaminate",
    **{field.name: f"--{field.name.replace('_', '-')}" for field in fields(TextOptions)},
}
NO_FILTERS = Filters()


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: Tokenizer,
    *,
    val_sources: Sequence[str] = (),
    val_fraction: float | None = None,
    text: TextOptions = TEXT_OPTIONS,
    shard_tokens: int = SHARD_TOKENS,
    filters: Filters = NO_FILTERS,
    workers: int | None = None,
    executor: Literal["local", "ray"] = "local",
    address: str | None = None,
    encoder: Literal["auto", "exact"] = "auto",
    restart: bool = False,
    named: NamedOptions = NAMED_OPTIONS,
    progress: Callable[[Progress], None] | None = None,
    download: DownloadProgress | None = None,
) -> Manifest:
    """Write the shards of `sources` and their manifest into the folder `out`; go on where an earlier attempt stopped.

    A document is held out when the first 8 bytes of the SHA-256 of its text, as a fraction of 2^64, are below
    `val_fraction`: copies of a text share a split, and adding files moves no document. A corpus of one document is cut
    into two at the end of a line. The default fraction is 0.1 for sources below 10 MB, 0.005 above. `val_sources` are
    held out instead, when given. `restart` gives up what an attempt with other options has done. `workers`,
    `executor`, `address` and `encoder` (see `Placement`) change no byte.

    Raises:
        UserError: sources that cannot be read or are empty, a split without documents, options out of range, an `out`
            that already holds a data set, is in use, or was begun with other options, or a full disk.
    """
    placement = Placement(workers, executor, address, encoder)
    check_options(sources, val_fraction, shard_tokens, filters, placement)
    check_text(text)
    check_out(out)
    listing = list_sources(sources, val_sources, named, text)
    count = 1 if is_finished(out) else count_workers(placement, filters)
    try:
        with start_pool(count, placement, listing.files, tokenizer) or contextlib.nullcontext() as pool:
            evaluations = read_evaluations(filters.decontaminate) if filters.decontaminate else None
            share = default_fraction(listing.train) if val_fraction is None else val_fraction
            rule = split_rule(listing.train, bool(listing.val), share, text, download)
            settings = make_settings(tokenizer, placement, rule, share, text, filters, evaluations)
            places = (out, out / WORK, tokenizer, settings, shard_tokens, placement)
            job = Job(*places, count, pool, evaluations, progress, download)
            if is_finished(out):
                manifest = finished(out, tokenizer, job.options(), known_records(listing))
            else:
                with in_work_folder(job.work, out, settings, evaluations, restart):
                    manifest = job.run(listing)
            listing.discard()
            return manifest
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"the disk of {out} is full; free space, then the same command goes on") from None


def make_settings(
    tokenizer: Tokenizer,
    placement: Placement,
    rule: str,
    val_fraction: float,
    text: TextOptions,
    filters: Filters,
    evaluations: Evaluations | None,
) -> Settings:
    return Settings(
        tokenizer=tokenizer.to_json(),
        tokenizer_sha256=tokenizer.sha256,
        n_vocab=tokenizer.n_vocab,
        eot=tokenizer.eot,
        encoder=placement.encoder,
        rule=rule,
        val_fraction=val_fraction,
        text=text,
        min_chars=filters.min_chars,
        dedup=filters.dedup,
        evaluations=tuple(file["sha256"] for file in evaluations.files) if evaluations else (),
    )


def known_records(listing: Listing) -> list[dict[str, Any]]:
    """What the manifest would say of the sources; of files elsewhere as much as is known without a download."""
    splits = ["train"] * len(listing.train) + ["val"] * len(listing.val)
    return [{**source.known(), "split": split} for source, split in zip(listing.files, splits)]


def check_options(
    sources: Sequence[str], val_fraction: float | None, shard_tokens: int, filters: Filters, placement: Placement
) -> None:
    if not sources:
        raise UsageError("no SOURCE given; give files, folders, globs or a named set")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UsageError(f"val fraction is {val_fraction}, must be at least 0 and below 1")
    if shard_tokens < 1:
        raise UsageError(f"shard tokens is {shard_tokens}, must be at least 1")
    if placement.workers is not None and placement.workers < 1:
        raise UsageError(f"workers is {placement.workers}, must be at least 1")
    if filters.min_chars < 0:
        raise UsageError(f"min chars is {filters.min_chars}, must be at least 0")
    if placement.address is not None and placement.executor != "ray":
        raise UsageError(f"address {placement.address!r} is of a Ray cluster; add --executor ray, or leave it out")


def check_out(out: Path) -> None:
    if is_finished(out):
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a process that was killed before it could tidy up
    if exists(out) and not is_folder(out):
        raise UserError(f"--out {out} is a file; give a folder")


def is_finished(out: Path) -> bool:
    return exists(out / "manifest.json")


@contextlib.contextmanager
def in_work_folder(work: Path, out: Path, settings: Settings, evaluations: Evaluations | None, restart: bool):
    """Hold `work` for this process; afterwards it is gone if everything is finished, or nothing is."""
    make_folder(work, out)
    try:
        with locked(work / "lock", out):
            if is_finished(out):  # by another process, meanwhile
                raise UserError(f"{out} already holds a data set; repeat the command to compare it")
            if restart:
                clear(work, out)
            begin(work, out, settings)
            if evaluations:
                evaluations.save(work)
            try:
                yield
            finally:
                if is_finished(out):
                    clear(work)
                elif not is_begun(work):
                    clear(work, out)
    finally:
        with contextlib.suppress(OSError):  # not empty
            work.rmdir()
            out.rmdir()


def make_folder(work: Path, out: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from None


def begin(work: Path, out: Path, settings: Settings) -> None:
    """Note the settings, or compare them with those of the attempt to go on from."""
    file, now = work / "settings.json", json.loads(json.dumps(asdict(settings)))
    if is_begun(work) and file.is_file():
        before = read_json(file, RESTART)
        if not isinstance(before, dict) or not isinstance(text := before.get("text", {}), dict):
            raise UserError(f"{str(file)!r} holds no settings; {RESTART}")
        before, new = before | text, now | now["text"]
        for name, flag in FLAGS.items():
            if before.get(name, new[name]) != new[name]:
                was = f" ({shown(before[name])}, now {shown(new[name])})"
                raise UserError(
                    f"{out} holds an unfinished preparation with another {flag}{was}; "
                    "repeat its options to go on, or add --restart to give it up"
                )
    for path in work.glob("*.partial"):  # of processes that were killed
        with contextlib.suppress(OSError):  # Windows, while a process ends
            path.unlink()
    write_json(file, now)


def is_begun(work: Path) -> bool:
    """Has any partition been encoded?"""
    return (work / STATE).exists() or any(work.glob("part-*.json"))


def clear(work: Path, out: Path | None = None) -> None:
    """Delete everything in `work` but the lock, and the unfinished shards in `out`."""
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    if out:
        remove_leftovers(out)


def shown(value: Any) -> str:
    """A setting in a message; hashes shortened."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return ", ".join(item[:12] if isinstance(item, str) else str(item) for item in values) or "none"
