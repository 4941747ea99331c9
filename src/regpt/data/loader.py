"""Rows of a token stream as the micro-batches of one process."""

import numpy as np
import torch

from regpt.data.batch import Batch
from regpt.data.stream import TokenStream
from regpt.errors import UsageError, UserError


class Loader:
    """The batches of a run. Its whole state is the number of the step: `step(s)` is a pure function.

    Row i of a stream is its tokens [i·T, i·T + T + 1) and step s takes rows [s·R, (s + 1)·R), R = batch_tokens / T,
    however many processes share them. Micro-step m of rank r takes the B rows from s·R + (m·W + r)·B on, which is
    build-nanogpt's order.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        batch_tokens: int,
        micro_batch_rows: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """`batch_tokens` counts the tokens of a step over all `dp_size` processes.

        Raises:
            UsageError: a batch that cannot be divided into whole micro-batches for every process.
            UserError: a corpus smaller than one batch.
        """
        assert 0 <= dp_rank < dp_size
        check_batch(seq_len, batch_tokens, micro_batch_rows, dp_size)
        check_corpus(stream, seq_len, batch_tokens, micro_batch_rows * dp_size)
        self.stream = stream
        self.seq_len = seq_len
        self.batch_rows = batch_tokens // seq_len
        self.micro_batch_rows = micro_batch_rows
        self.micro_steps = self.batch_rows // (micro_batch_rows * dp_size)
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.pin_memory = pin_memory

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`, counted from 0: B rows each, on the CPU."""
        batches = []
        for micro_step in range(self.micro_steps):
            micro_batch = micro_step * self.dp_size + self.dp_rank
            first_row = step * self.batch_rows + micro_batch * self.micro_batch_rows
            batch = row_batch(self.stream, first_row, self.micro_batch_rows, self.seq_len)
            batches.append(pinned(batch) if self.pin_memory else batch)
        return batches


def row_batch(stream: TokenStream, first_row: int, n_rows: int, seq_len: int) -> Batch:
    """Rows [first_row, first_row + n_rows) of `stream`: idx and targets (n_rows, seq_len)."""
    tokens = stream.tokens(first_row * seq_len, n_rows * seq_len + 1).astype(np.int64)  # (n_rows·T + 1,)
    idx = torch.from_numpy(tokens[:-1]).view(n_rows, seq_len)
    targets = torch.from_numpy(tokens[1:].copy()).view(n_rows, seq_len)  # a copy: masking a target leaves idx alone
    return Batch(idx, targets)


def pinned(batch: Batch) -> Batch:
    """`batch` in page-locked memory, from which a GPU copies without waiting."""
    return Batch(batch.idx.pin_memory(), batch.targets.pin_memory())


def check_batch(seq_len: int, batch_tokens: int, micro_batch_rows: int, dp_size: int) -> None:
    """Raise a UsageError that says which numbers would do, unless every process gets whole micro-batches."""
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
        way_out += f", or train.micro_batch_rows to {divisors_beside(rows // dp_size, micro_batch_rows)}"
    raise UsageError(
        f"train.batch_tokens {batch_tokens} is not a multiple of {unit} = data.seq_len {seq_len} × "
        f"train.micro_batch_rows {micro_batch_rows} × {dp_size} {'process' if dp_size == 1 else 'processes'}; {way_out}"
    )


def divisors_beside(number: int, near: int) -> str:
    """The divisors of `number` next below and above `near`, which is none."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " or ".join(str(d) for d in [*below[-1:], *above[:1]])


def check_corpus(stream: TokenStream, seq_len: int, batch_tokens: int, micro_rows: int) -> None:
    """Raise a UserError unless one epoch holds one batch; `micro_rows` are the rows of a micro-step of all ranks."""
    if stream.epoch_tokens >= batch_tokens:
        return
    unit = seq_len * micro_rows
    if fits := stream.epoch_tokens // unit * unit:
        way_out = f"set train.batch_tokens to {fits}, or prepare more text"
    elif shorter := stream.epoch_tokens // micro_rows:
        way_out = (
            f"set data.seq_len to {shorter} and train.batch_tokens to {shorter * micro_rows}, or prepare more text"
        )
    else:
        way_out = "prepare more text"
    raise UserError(
        f"{stream.source} has {stream.epoch_tokens} tokens, fewer than one batch of {batch_tokens}; {way_out}"
    )
