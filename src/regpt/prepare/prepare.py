"""Prepare token shards from text: partition the sources, encode partitions in parallel, assemble them in order.

The bytes written depend on the sources, the tokenizer and the options; never on the number of workers, where they run,
or how often the work was interrupted. Encoded partitions are files in `OUT/.work` until they are in a shard, so a
killed attempt loses only the partitions being encoded, and the same command continues it.
"""

import functools
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import regpt
from regpt.data.manifest import WORK, Manifest, Shard
from regpt.errors import UsageError
from regpt.files import finish_file
from regpt.prepare.decontaminate import Evaluations, read_evaluations
from regpt.prepare.named import Listing, list_sources
from regpt.prepare.partition import (
    Counts,
    Partition,
    Split,
    is_encoded,
    load_summary,
    partitions,
    target_bytes,
    total,
)
from regpt.prepare.readers import check_text
from regpt.prepare.records import Records, check_finished
from regpt.prepare.settings import NO_FILTERS, TEXT_OPTIONS, Filters, Settings, TextOptions
from regpt.prepare.shards import Assembly, finish_folder
from regpt.prepare.sources import localized
from regpt.prepare.split import Unusable, check_splits, check_texts, default_fraction, split_rule
from regpt.prepare.work import begin, check_out, clear, is_finished, naming_full_disk, work_folder
from regpt.prepare.workers import MAX_WORKERS, Pool, available_cores, encode_here, start_pool
from regpt.remote.download import REMOTE_OPTIONS, DownloadProgress, RemoteOptions
from regpt.text.fast import WrongTokens, accelerate, can_accelerate, encoder_name, find_model, save_model
from regpt.text.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000  # the size of FineWeb-Edu's shards in build-nanogpt


@dataclass(frozen=True)
class Progress:
    """Documents, text bytes and tokens encoded so far; `done` is the fraction of the source bytes, from 0 to 1.

    `found_bytes` and `found_tokens` were encoded by an earlier attempt: exclude them from speeds.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    done: float = 0.0
    found_bytes: int = 0
    found_tokens: int = 0


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
    encoder: Literal["auto", "exact"] = "auto",
    restart: bool = False,
    remote: RemoteOptions = REMOTE_OPTIONS,
    progress: Callable[[Progress], None] | None = None,
    download: DownloadProgress | None = None,
) -> Manifest:
    """Write the shards of `sources` and their manifest into the folder `out`; continue an earlier attempt.

    A document is held out when the first 8 bytes of the SHA-256 of its text, as a fraction of 2^64, are below
    `val_fraction`: copies of a text share a split, and adding files moves no document. A corpus of one document is
    split in two at the end of a line. The default fraction is 0.1 for sources below 10 MB, 0.005 above. `val_sources`
    are held out instead, when given. `restart` discards an attempt with other options. These do not change the bytes:
    `workers` (processes; None is one per core, 16 at most) and `encoder` (`auto` uses the package `gigatoken` if it is
    installed).

    Raises:
        UserError: sources that cannot be read or are empty, a split without documents, options out of range, an `out`
            that already holds a data set, is in use, or was begun with other options, or a full disk.
    """
    check_options(sources, val_fraction, shard_tokens, filters.min_chars, workers)
    if val_sources and val_fraction is not None:
        raise UsageError("--val holds out whole sources and --val-fraction a part of the documents; give one of them")
    check_text(text)
    check_out(out)
    listing = list_sources(sources, val_sources, remote, text)
    count = 1 if is_finished(out) else workers or min(available_cores(), MAX_WORKERS)
    with naming_full_disk(out), start_pool(count, listing.files, tokenizer) or nullcontext() as pool:
        evaluations = read_evaluations(filters.decontaminate) if filters.decontaminate else None
        share = default_fraction(listing.train) if val_fraction is None else val_fraction
        rule = split_rule(listing.train, bool(listing.val), share, text, download)
        hashes = tuple(file["sha256"] for file in evaluations.files) if evaluations else ()
        identity = (tokenizer.to_json(), tokenizer.sha256, tokenizer.n_vocab, tokenizer.eot)
        settings = Settings(*identity, encoder, rule, share, text, filters.min_chars, filters.dedup, hashes)
        job = Job(out, tokenizer, settings, shard_tokens, evaluations, count, pool, progress, download)
        return job.manifest(listing, restart)


def check_options(
    sources: Sequence[str], val_fraction: float | None, shard_tokens: int, min_chars: int, workers: int | None
) -> None:
    if not sources:
        raise UsageError("no SOURCE given; give files, folders, globs or a named set")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}, must be at least 0 and below 1")
    counts = (("--shard-tokens", shard_tokens, 1), ("--workers", workers, 1), ("--min-chars", min_chars, 0))
    for name, value, least in counts:
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}, must be at least {least}")


@dataclass
class Job:
    """One `data prepare` job. Without a `pool`, `threads` threads of this process encode."""

    out: Path
    tokenizer: Tokenizer
    settings: Settings
    shard_tokens: int
    evaluations: Evaluations | None
    threads: int
    pool: Pool | None
    progress: Callable[[Progress], None] | None
    download: DownloadProgress | None
    _finished: Counts = field(default_factory=Counts)
    _found: Counts = field(default_factory=Counts)
    _running: dict[int, Counts] = field(default_factory=dict)
    _total: int = 1

    def __post_init__(self) -> None:
        self.work = self.out / WORK
        self._fast = self.settings.encoder == "auto" and can_accelerate(self.tokenizer)

    def manifest(self, listing: Listing, restart: bool) -> Manifest:
        """Write the shards and return their manifest; a finished folder of the same job is only checked."""
        if is_finished(self.out):
            manifest = check_finished(self.out, self.tokenizer, self.options(), listing.known())
        else:
            with work_folder(self.out):
                begin(self.work, self.out, self.settings, self.evaluations, restart)
                manifest = self._run(listing)
        listing.discard()
        return manifest

    def _run(self, listing: Listing) -> Manifest:
        self._total = max(1, sum(source.bytes for source in listing.files))
        if self._fast:
            save_model(self.tokenizer, self.work)  # worker processes load it
        elif stale := find_model(self.work):  # from an attempt with `gigatoken`: workers would use it
            stale.unlink()
        splits: Sequence[Split] = ("train",) * len(listing.train) + ("val",) * len(listing.val)
        files = zip(localized(listing.files, self.download), splits)
        plan = partitions(files, target_bytes(self._total), self.settings.key(), self.settings.text)
        try:
            with Assembly(self.out, self.settings, self.shard_tokens, self.evaluations) as assembly:
                self._encode(plan, assembly)
                records = assembly.records
                check_texts(records.sources, skip=self.settings.text.on_error == "skip")
                check_splits(self.settings.rule, self.settings.val_fraction, records.documents, records.lowest)
                shards = assembly.finish()
        except (Unusable, WrongTokens):  # another attempt would fail the same way: nothing to continue
            clear(self.work, self.out)
            raise
        return self._finish(shards, assembly.records, listing.left_out)

    def _encode(self, plan: Iterator[Partition], assembly: Assembly) -> None:
        """Encode the missing partitions; pass each to the assembly as soon as all before it are done."""
        order: deque[Partition] = deque()
        done: set[int] = set()

        def finish(partition: Partition, found: bool = False) -> None:
            done.add(partition.index)
            self._count(partition, found)
            while order and order[0].index in done:
                assembly.add(order.popleft())

        def tasks() -> Iterator[Partition]:
            for partition in plan:
                order.append(partition)
                if is_encoded(self.work, partition):
                    finish(partition, found=True)
                else:
                    yield partition

        if self.pool:
            encode = self.pool.encode
        else:
            encoder = accelerate(self.tokenizer, self.work) if self._fast else self.tokenizer
            encode = functools.partial(encode_here, encoder=encoder, threads=self.threads)
        with closing(encode(self.work, tasks(), self.settings, self._hear)) as finished:
            for partition in finished:
                finish(partition)

    def _hear(self, index: int, counts: Counts) -> None:
        """Report progress within a partition."""
        self._running[index] = counts
        self._show()

    def _count(self, partition: Partition, found: bool) -> None:
        """Count a finished partition; `found` if an earlier attempt encoded it."""
        for counts in load_summary(self.work, partition.name)["splits"].values():
            (self._found if found else self._finished).add(Counts(**{**counts, "source_bytes": 0.0}))
        self._finished.source_bytes += partition.bytes
        self._running.pop(partition.index, None)
        self._show()

    def _show(self) -> None:
        if not self.progress:
            return
        found, now = self._found, total((self._finished, self._found, *self._running.values()))
        done = min(1.0, now.source_bytes / self._total)
        self.progress(Progress(now.documents, now.text_bytes, now.tokens, done, found.text_bytes, found.tokens))

    def options(self) -> dict[str, Any]:
        """Options that determine the bytes, for the manifest."""
        return {
            "val_rule": self.settings.rule,
            "val_fraction": self.settings.val_fraction,
            "text_column": self.settings.text.text_column,
            **self.settings.text.changed(),
            "shard_tokens": self.shard_tokens,
            "min_chars": self.settings.min_chars,
            "dedup": self.settings.dedup,
            "decontaminate": list(self.evaluations.files) if self.evaluations else [],
        }

    def _finish(self, shards: Sequence[Shard], records: Records, left_out: Mapping[str, int]) -> Manifest:
        """Write removed.jsonl and the tokenizer, then the manifest, which marks the folder as complete."""
        if records.lines:
            with records.path.open("rb+") as lines:
                finish_file(lines, self.out / "removed.jsonl")
        encoder = encoder_name(self.tokenizer, self._fast)
        return finish_folder(
            self.out,
            self.tokenizer,
            self.settings.dtype,
            shards,
            text_bytes=records.text_bytes,
            sources=tuple(records.sources),
            options=self.options(),
            removed=records.removed,
            left_out=dict(left_out),
            made_with={"regpt": regpt.__version__, "python": platform.python_version(), "encoder": encoder},
        )
