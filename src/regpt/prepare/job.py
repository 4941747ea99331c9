"""One preparation: its partitions through an executor into the shards, and the manifest at the end."""

import contextlib
import functools
import itertools
import platform
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import regpt
from regpt.data.manifest import Manifest, Shard
from regpt.files import finish_file, write_text
from regpt.prepare.assemble import NOTHING, Assembly, State, hash_keys, load_state
from regpt.prepare.audit import Audit
from regpt.prepare.corpus import Unusable, check_splits, check_texts
from regpt.prepare.decontaminate import Evaluations
from regpt.prepare.encode import encode_partition
from regpt.prepare.named import Listing
from regpt.prepare.partition import Partition, Split, partitions, target_bytes
from regpt.prepare.parts import Counts, load_summary
from regpt.prepare.placement import Placement
from regpt.prepare.remote import localized
from regpt.prepare.settings import Settings
from regpt.prepare.summary import Summary
from regpt.prepare.workers import Pool, encode_here, encode_on_ray
from regpt.prepare.write import remove_leftovers
from regpt.remote.download import DownloadProgress
from regpt.text.fast import accelerate, can_accelerate, encoder_name, find_model, save_model
from regpt.text.open import NAMED
from regpt.text.tokenizer import Encoder, Tokenizer


@dataclass(frozen=True)
class Progress:
    """What has been encoded so far; `done` is the part of the source files, from 0 to 1.

    `found_bytes` and `found_tokens` are what an earlier attempt had done; they took no time now. `processes` encode on
    this machine beside this one; 0 when it does it alone, or a cluster does.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    done: float = 0.0
    found_bytes: int = 0
    found_tokens: int = 0
    processes: int = 0


@dataclass
class Job:
    """Everything that one preparation knows; `run` does it."""

    out: Path
    work: Path
    tokenizer: Tokenizer
    settings: Settings
    shard_tokens: int
    placement: Placement
    workers: int
    pool: Pool | None
    evaluations: Evaluations | None
    progress: Callable[[Progress], None] | None
    download: DownloadProgress | None
    _finished: Counts = field(default_factory=Counts)
    _found: Counts = field(default_factory=Counts)
    _running: dict[int, Counts] = field(default_factory=dict)
    _total: int = 1

    def __post_init__(self) -> None:
        self._fast = self.placement.encoder == "auto" and can_accelerate(self.tokenizer)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        """Only where this process encodes."""
        return accelerate(self.tokenizer, self.work) if self._fast else self.tokenizer

    def run(self, listing: Listing) -> Manifest:
        everything = listing.files
        self._total = max(1, sum(source.bytes for source in everything))
        if self._fast:
            save_model(self.tokenizer, self.work)  # for other processes
        elif left := find_model(self.work):  # by an attempt that had the package
            left.unlink()
        splits: Sequence[Split] = ("train",) * len(listing.train) + ("val",) * len(listing.val)
        here = zip(localized(everything, self.download), splits)
        plan = partitions(here, target_bytes(self._total), self.settings.key(), self.settings.text)
        state, plan = self._earlier(plan)
        audit = Audit(self.work, self.tokenizer, np.dtype(self.settings.dtype)) if self._fast else None
        places = (self.out, self.work, self.settings, self.shard_tokens, state)
        try:
            with Assembly(*places, audit, self.evaluations) as assembly:
                self._encode(plan, assembly)
                self._check(assembly.summary)
                shards = assembly.finish()
        except Unusable:
            self._give_up()
            raise
        return self._finish(shards, assembly.summary, listing.left_out)

    def _earlier(self, plan: Iterator[Partition]) -> tuple[State, Iterator[Partition]]:
        """What finished shards hold, if the partitions that they were made from are still those of the plan."""
        state = load_state(self.work, self.out, self.shard_tokens, 2 if self.settings.dtype == "uint16" else 4)
        used = list(itertools.islice(plan, state.partitions))
        if hash_keys(used) != state.keys:
            state = NOTHING
        return state, itertools.chain(used, plan)

    def _encode(self, plan: Iterator[Partition], assembly: Assembly) -> None:
        """Encode what is not there yet; give each partition to the assembly when all before it are done."""
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
                if assembly.is_ready(partition):
                    finish(partition, found=True)
                elif elsewhere and not partition.in_files:
                    encode_partition(self.work, partition, self.settings, self._encoder)
                    finish(partition)
                else:
                    yield partition

        elsewhere = self.pool or self.placement.executor == "ray"
        with contextlib.closing(self._executor(tasks())) as finished:
            for partition in finished:
                finish(partition)

    def _executor(self, tasks: Iterator[Partition]) -> Generator[Partition]:
        if self.placement.executor == "ray":
            return encode_on_ray(self.work, tasks, self.settings, self.placement.address)
        if self.pool:
            return self.pool.encode(self.work, tasks, self.settings, self._hear)
        return encode_here(self.work, tasks, self.settings, self._encoder, self.workers, self._hear)

    def _hear(self, index: int, counts: Counts) -> None:
        """News of a partition that is being encoded."""
        self._running[index] = counts
        self._show()

    def _count(self, partition: Partition, found: bool) -> None:
        """A partition is done; `found` when an earlier attempt did it."""
        summary = load_summary(self.work, partition.name)
        for split in summary["splits"].values():
            counts = Counts(split["documents"], split["text_bytes"], split["tokens"], 0.0)
            (self._found if found else self._finished).add(counts)
        self._finished.source_bytes += partition.bytes
        self._running.pop(partition.index, None)
        self._show()

    def _show(self) -> None:
        if not self.progress:
            return
        now = Counts()
        for counts in (self._finished, self._found, *self._running.values()):
            now.add(counts)
        done = min(1.0, now.source_bytes / self._total)
        found = self._found
        counts = (now.documents, now.text_bytes, now.tokens, done, found.text_bytes, found.tokens)
        self.progress(Progress(*counts, self.workers if self.pool else 0))

    def _check(self, summary: Summary) -> None:
        check_texts(summary.sources, skip=self.settings.text.on_error == "skip")
        check_splits(self.settings.rule, self.settings.val_fraction, summary.documents, summary.lowest)

    def _give_up(self) -> None:
        """Leave nothing: a second attempt would find the same."""
        for path in self.work.iterdir():
            if path.name != "lock":
                path.unlink()
        remove_leftovers(self.out)

    def options(self) -> dict[str, Any]:
        """What shapes the bytes, for the manifest."""
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

    def _finish(self, shards: list[Shard], summary: Summary, left_out: Mapping[str, int]) -> Manifest:
        """Write what belongs to the shards; the manifest last."""
        if self.tokenizer.name not in NAMED:
            write_text(self.out / "tokenizer.json", self.tokenizer.to_json())
        if summary.lines:
            with summary.path.open("rb+") as lines:
                finish_file(lines, self.out / "removed.jsonl")
        manifest = Manifest(
            tokenizer=self.tokenizer.name,
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.n_vocab,
            eot=self.tokenizer.eot,
            dtype=self.settings.dtype,
            shards=tuple(shards),
            text_bytes=summary.text_bytes,
            sources=tuple(summary.sources),
            options=self.options(),
            removed=summary.removed,
            left_out=dict(left_out),
            made_with={
                "regpt": regpt.__version__,
                "python": platform.python_version(),
                "encoder": encoder_name(self.tokenizer, self._fast),
            },
        )
        write_text(self.out / "manifest.json", manifest.to_json())  # last, when the shards are on the disk
        return manifest
