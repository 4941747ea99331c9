"""Micro-batches of one rank, from rows of tokens."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.order import splitmix64
from regpt.data.packed import ConversationRows
from regpt.data.ramp import Stage, rows_in_stage, stage_at, tokens_before
from regpt.data.rows import Rows
from regpt.errors import UsageError, UserError
from regpt.text.chat import ANSWER

DROPOUT = int.from_bytes(b"dropout", "big")  # XORed into the seed: the data order may use the same one


class StepBatches(Protocol):
    """The micro-batches of one process for every step of a run."""

    seq_len: int

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        """The micro-batches of `step`, counted from 0, on the CPU: a pure function.

        `micro_batch_rows` cuts the same global batch into micro-batches of another size than the loader's own.
        """
        ...


class Loader:
    """The batches of a run. Its whole state is the number of the step: `step(s)` is a pure function.

    Step s takes rows [s·R, (s + 1)·R), R = batch_tokens / T, however many processes share them. Micro-step m of rank r
    takes the B rows from s·R + (m·W + r)·B on, which is build-nanogpt's order. A run that changed its batch or
    its data when it was resumed adds `first_row` to all of these.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_tokens: int,
        micro_batch_rows: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        eot: int | None = None,
        pin_memory: bool = False,
        first_row: int = 0,
        dropout_seed: int | None = None,
        rows_before: int = 0,
    ) -> None:
        """`batch_tokens` counts the tokens of a step over all `dp_size` processes; `eot` is the token that starts a
        document, given where attention is to be masked by document; `dropout_seed` is given where rows are to have
        keys of dropout; `rows_before` are those of the run that were read before row 0 of `rows`.

        Raises:
            UsageError: a batch that cannot be divided into whole micro-batches for every process.
            UserError: a corpus smaller than one batch.
        """
        assert 0 <= dp_rank < dp_size
        check_batch(rows.seq_len, batch_tokens, micro_batch_rows, dp_size)
        check_corpus(rows, batch_tokens, micro_batch_rows * dp_size)
        self.rows = rows
        self.seq_len = rows.seq_len
        self.batch_rows = batch_tokens // rows.seq_len
        self.micro_batch_rows = micro_batch_rows
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.eot = eot
        self.pin_memory = pin_memory
        self.first_row = first_row
        self.dropout_seed = dropout_seed
        self.rows_before = rows_before

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        """This rank's micro-batches of `step`, counted from 0, on the CPU: B rows each, or `micro_batch_rows`."""
        B, R = micro_batch_rows or self.micro_batch_rows, self.batch_rows
        assert R % (B * self.dp_size) == 0
        first, end = self.first_row + step * R, self.first_row + (step + 1) * R
        firsts = range(first + self.dp_rank * B, end, self.dp_size * B)
        batches = [row_batch(self.rows, first, B, self.eot, self.pin_memory) for first in firsts]
        if self.dropout_seed is None:
            return batches
        numbers = [self.rows_before + first for first in firsts]
        keys = [as_tensor(dropout_keys(self.dropout_seed, first, B), self.pin_memory) for first in numbers]
        return [batch._replace(dropout_keys=own) for batch, own in zip(batches, keys)]

    def at(self, step: int) -> "Loader":
        """The loader of `step`: this one."""
        return self

    def step_rows(self, step: int) -> range:
        """The rows of `step` that this rank takes when it takes them one at a time."""
        first = self.first_row + step * self.batch_rows
        return range(first + self.dp_rank, first + self.batch_rows, self.dp_size)

    def epochs(self, steps: int) -> list[float]:
        """Number of epochs read of each data folder after `steps` steps."""
        return self.rows.epochs(self.first_row + steps * self.batch_rows)


class RampLoader:
    """The batches of a run whose batch or row length changes: one `Loader` for each of its `stages`.

    Rows are numbered from 0 where a row length begins. All steps are read `ahead` steps later, in a run that left out
    batches.
    """

    def __init__(
        self,
        rows: Rows,
        stages: Sequence[Stage],
        *,
        micro_batch_rows: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        ahead: int = 0,
        eot: int | None = None,
        pin_memory: bool = False,
        dropout_seed: int | None = None,
    ) -> None:
        """`rows` are those of the first stage; the rest as in `Loader`.

        Raises:
            UsageError: a batch that cannot be divided among the processes, or an order whose row length is fixed.
            UserError: a corpus smaller than one batch.
        """
        self.seq_len, self.rows, self.micro_batch_rows = rows.seq_len, rows, micro_batch_rows
        self.stages, self.ahead, self.dp_size = tuple(stages), ahead, dp_size
        self.loaders: list[Loader] = []
        given: dict[str, Any] = {"dp_rank": dp_rank, "dp_size": dp_size, "eot": eot, "pin_memory": pin_memory}
        check_batch(rows.seq_len, stages[0].batch_tokens, micro_batch_rows, dp_size)
        for first_row, rows_before, stage_rows, stage in rows_of_stages(rows, stages):
            check_shares(stage, dp_size)
            loader = Loader(
                stage_rows,
                batch_tokens=stage.batch_tokens,
                micro_batch_rows=rows_in_stage(micro_batch_rows, self.seq_len, stage, dp_size),
                first_row=first_row + (ahead - stage.first_step) * (stage.batch_tokens // stage.seq_len),
                dropout_seed=dropout_seed,
                rows_before=rows_before,
                **given,
            )
            self.loaders.append(loader)

    def at(self, step: int) -> Loader:
        """The loader of the stage of `step`."""
        return self.loaders[self.stages.index(stage_at(self.stages, step + self.ahead))]

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        """As `Loader.step`; `micro_batch_rows` are of the first stage's length, in others as many tokens."""
        rows = micro_batch_rows or self.micro_batch_rows
        stage = stage_at(self.stages, step + self.ahead)
        return self.at(step).step(step, rows_in_stage(rows, self.seq_len, stage, self.dp_size))

    def tokens_before(self, step: int) -> int:
        """Tokens read before `step`."""
        return tokens_before(self.stages, step + self.ahead)

    def epochs(self, steps: int) -> list[float]:
        """As `Loader.epochs`."""
        return self.at(steps - 1).epochs(steps)


def rows_of_stages(rows: Rows, stages: Sequence[Stage]) -> Iterator[tuple[int, int, Rows, Stage]]:
    """For each stage: its first row among the rows of its length, those before all of these, its rows, itself."""
    rows_before = 0
    lengths = [list(group) for _, group in groupby(stages, key=lambda stage: stage.seq_len)]
    for group, following in zip(lengths, [*lengths[1:], None]):
        first, ended, after = group[0], rows, rows
        n_rows = 0
        if following is not None:
            n_rows = (following[0].first_token - first.first_token) // first.seq_len
            ended, after = rows.cut(n_rows, following[0].seq_len)
        for stage in group:
            yield (stage.first_token - first.first_token) // stage.seq_len, rows_before, ended, stage
        rows, rows_before = after, rows_before + n_rows


def check_shares(stage: Stage, dp_size: int) -> None:
    """Raise a UsageError for a batch of `train.batch_ramp` that `dp_size` processes cannot share in whole rows."""
    unit = stage.seq_len * dp_size
    if stage.batch_tokens % unit:
        near = max(1, stage.batch_tokens // unit) * unit
        raise UsageError(
            f"train.batch_ramp has a batch of {stage.batch_tokens} tokens in rows of {stage.seq_len}, which {dp_size} "
            f"processes cannot share in whole rows; set it to {near}, say"
        )


def row_batch(rows: Rows, first: int, count: int, eot: int | None = None, pin_memory: bool = False) -> Batch:
    """Rows [first, first + count) as idx and targets (count, T), masked by document where `eot` is given.

    `pin_memory` allocates page-locked memory, from which copies to a GPU are asynchronous.
    """
    if isinstance(rows, ConversationRows):
        return conversation_batch(rows, first, count, pin_memory)
    tokens = rows.read(first, count)  # (count, T + 1)
    batch = Batch(as_tensor(tokens[:, :-1], pin_memory), as_tensor(tokens[:, 1:], pin_memory))
    if eot is None:
        return batch
    positions, cu_seqlens = document_bounds(tokens[:, :-1] == eot)
    return batch._replace(positions=as_tensor(positions, pin_memory), cu_seqlens=as_tensor(cu_seqlens, pin_memory))


def conversation_batch(rows: ConversationRows, first: int, count: int, pin_memory: bool = False) -> Batch:
    """Rows of conversations, each masked from the others in its row, with the answers as targets."""
    idx, targets, parts, starts = rows.read_batch(first, count)
    positions, cu_seqlens = document_bounds(starts)
    batch = Batch(*(as_tensor(array, pin_memory) for array in (idx, targets, positions, cu_seqlens)))
    if not rows.paired:
        return batch
    pairs, reference = rows.read_pairs(first, starts)
    answers = np.pad(parts, ((0, 0), (0, 1)))[:, 1:] == ANSWER  # of the targets, one place on
    scored = np.where(answers, targets, IGNORE_INDEX)
    pinned = torch.from_numpy(reference).pin_memory() if pin_memory else torch.from_numpy(reference)
    return batch._replace(pairs=as_tensor(pairs, pin_memory), scored=as_tensor(scored, pin_memory), reference=pinned)


def dropout_keys(seed: int, first: int, count: int) -> np.ndarray:
    """Dropout keys of rows [first, first + count), (count,) uint64 below 2³².

    The key of a row is the upper half of output `row` of SplitMix64 seeded with `seed ^ DROPOUT`.
    """
    return splitmix64(seed ^ DROPOUT, first, count) >> np.uint64(32)


def as_tensor(array: np.ndarray, pin_memory: bool) -> Tensor:
    """Copy `array` into an int64 tensor."""
    tensor = torch.empty(array.shape, dtype=torch.int64, pin_memory=pin_memory)
    np.copyto(tensor.numpy(), array)
    return tensor


def document_bounds(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute `positions` (B, T) and `cu_seqlens` of `Batch`; `starts` (B, T) bool is True where documents begin.

    Every row starts a document, even when it continues one of the row before: `starts` is changed in place.
    `cu_seqlens` is padded with B·T to a power of two, so that a compiled step sees few shapes.
    """
    starts[:, 0] = True
    n_tokens = starts.size
    firsts = np.flatnonzero(starts)  # (documents,)
    positions = np.arange(n_tokens) - np.repeat(firsts, np.diff(firsts, append=n_tokens))
    cu_seqlens = np.full(1 << len(firsts).bit_length(), n_tokens)
    cu_seqlens[: len(firsts)] = firsts
    return positions.reshape(starts.shape), cu_seqlens


def check_batch(seq_len: int, batch_tokens: int, micro_batch_rows: int, dp_size: int) -> None:
    """Raise a UsageError with the nearest valid sizes unless every process gets whole micro-batches."""
    unit = seq_len * micro_batch_rows * dp_size
    if batch_tokens % unit == 0 and batch_tokens > 0:
        return
    rows = batch_tokens // seq_len
    below, above = batch_tokens // unit * unit, (batch_tokens // unit + 1) * unit
    way_out = f"set train.batch_tokens to {below} or {above}" if below else f"set train.batch_tokens to {above}"
    if rows < 1:
        raise UsageError(f"train.batch_tokens {batch_tokens} holds no row of data.seq_len {seq_len}; {way_out}")
    if rows < dp_size:
        raise UsageError(
            f"{dp_size} processes are more than the {rows} rows of train.batch_tokens {batch_tokens} at data.seq_len "
            f"{seq_len}; start at most {rows}, or {way_out}"
        )
    if batch_tokens % (seq_len * dp_size) == 0:
        way_out += f", or train.micro_batch_rows to {nearest_divisors(rows // dp_size, micro_batch_rows)}"
    raise UsageError(
        f"train.batch_tokens {batch_tokens} is not a multiple of {unit} = data.seq_len {seq_len} × "
        f"train.micro_batch_rows {micro_batch_rows} × {dp_size} {'process' if dp_size == 1 else 'processes'}; {way_out}"
    )


def nearest_divisors(number: int, near: int) -> str:
    """List the divisors of `number` next below and above `near`, itself not a divisor."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " or ".join(str(d) for d in [*below[-1:], *above[:1]])


def check_corpus(rows: Rows, batch_tokens: int, micro_rows: int) -> None:
    """Raise a UserError unless an epoch holds a batch; `micro_rows` are the rows of a micro-step over all ranks."""
    seq_len = rows.seq_len
    wanted = batch_tokens // seq_len
    found = rows.epoch_rows(wanted)
    if found >= wanted:
        return
    if fits := found // micro_rows * micro_rows:
        way_out = f"set train.batch_tokens to {fits * seq_len}, or prepare more text"
    elif shorter := rows.epoch_tokens // micro_rows:
        way_out = (
            f"set data.seq_len to {shorter} and train.batch_tokens to {shorter * micro_rows}, or prepare more text"
        )
    else:
        way_out = "prepare more text"
    raise UserError(
        f"{rows.source} has {rows.epoch_tokens:,} tokens, {found} rows of data.seq_len {seq_len}, fewer than one batch "
        f"of {batch_tokens:,} tokens; {way_out}"
    )
