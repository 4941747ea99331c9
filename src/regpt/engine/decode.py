"""One decode step of a batch as one function: model, logits processing, draw, cache write, without a host in between.

The rows' state (token, position, seed, options, page table) is one tensor that stays where it is: the step reads it,
and writes the new token and position into it. So on a CUDA device the whole step is captured into a graph, one for each
bucket of rows; on a CPU the same function runs as it is.
"""

from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regpt.engine.cache import DecodeView, Pages, PrefillView, upload
from regpt.engine.fast import NO_KERNELS, FastPaths, Prefill, capture, warn_without_graphs
from regpt.engine.noise import MASK
from regpt.engine.processing import (
    NUMBERS,
    Drawn,
    RowOptions,
    SamplingOptions,
    count_text,
    draw,
    largest,
    row_numbers,
    rows_of,
)
from regpt.engine.sequence import Sequence
from regpt.kernels.few_rows import MOST, one_thread, with_few_rows
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer

TOKEN, POSITION, SEEDS, OPTIONS = 0, 1, 2, 4
TABLE = OPTIONS + len(NUMBERS)  # columns of the state
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MOST_BY_KERNEL = 64  # `kernels.sampler.MOST`, whose file imports Triton
RESULTS = 4  # token, log-probability, finite, certain


class Needs(NamedTuple):
    """What a step computes beyond the usual: a graph is captured for each that occurs.

    Attributes:
        candidates: as in `processing.draw`.
        top: the number of likeliest tokens that are reported.
        extras: whether rows have penalties, biases and masks.
    """

    candidates: int
    top: int = 0
    penalties: bool = False
    bias: bool = False
    allowed: bool = False

    @property
    def drawn_by_kernels(self) -> bool:
        """Whether `kernels.sampler` computes it."""
        return 0 < self.candidates <= MOST_BY_KERNEL and not (self.top or self.penalties or self.bias or self.allowed)

    @classmethod
    def of(cls, options: Items[SamplingOptions], n_vocab: int, top: int = 0, allowed: bool = False) -> "Needs":
        each = [one.candidates(n_vocab) for one in options]
        # Beside a row that needs an order, one that draws from all tokens needs the order of all.
        ordered = max(each) if min(each) > 0 else n_vocab if max(each) > 0 else 0
        if any(one.top_p == 1 and not one.greedy and not 0 < one.top_k < n_vocab for one in options) and ordered:
            ordered = n_vocab
        penalties, bias = any(one.penalized for one in options), any(one.logit_bias for one in options)
        return cls(ordered, top, penalties, bias, allowed)


class RowState:
    """State of up to `n` rows on a device.

    Attributes:
        state: (n, TABLE + pages) int64; the options' columns hold float64 bits.
        counts, seen, bias, allowed: as in `RowOptions`, made when first needed.
    """

    def __init__(self, n: int, table_pages: int, n_vocab: int, device: torch.device):
        self.n, self.table_pages, self.n_vocab = n, table_pages, n_vocab
        self.state = torch.zeros(n, TABLE + table_pages, dtype=torch.int64, device=device)
        self.counts = self.seen = self.bias = self.allowed = None

    def prepare(self, needs: Needs) -> None:
        """Make the large tensors that `needs` asks for."""
        shape, device = (self.n, self.n_vocab), self.state.device
        if needs.penalties and self.counts is None:
            self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
        if needs.bias and self.bias is None:
            self.bias = torch.zeros(shape, device=device)
        if needs.allowed and self.allowed is None:
            self.allowed = torch.ones(shape, dtype=torch.bool, device=device)

    def options(self, n: int, needs: Needs) -> RowOptions:
        numbers = self.state[:n, OPTIONS:TABLE].view(torch.float64)
        penalized, biased = needs.penalties and self.counts is not None, needs.bias and self.bias is not None
        return RowOptions(
            numbers,
            self.state[:n, SEEDS:OPTIONS],
            self.counts[:n] if penalized and self.counts is not None else None,
            self.seen[:n] if penalized and self.seen is not None else None,
            self.bias[:n] if biased and self.bias is not None else None,
            self.allowed[:n] if needs.allowed and self.allowed is not None else None,
        )

    def fill(self, at: range, sequences: Items[Sequence], tokens: Tensor) -> None:
        """Set the rows `at` to texts whose newest tokens (len(at),) the host may not know yet."""
        part = slice(at.start, at.stop)
        states = np.zeros((len(sequences), self.state.size(1)), dtype=np.int64)
        for state, one in zip(states, sequences):
            fill_state(state, one.cached, one.seed, one.request.options, one.pages)
        self.state[part] = upload(states, self.state.device)
        self.state[part, TOKEN] = tokens
        for row, one in zip(at, sequences):
            if self.bias is not None:
                self.bias[row] = 0
                for token, bias in one.request.options.logit_bias:
                    self.bias[row, token] = bias
            if self.allowed is not None:
                self.allowed[row] = True
            self.count(row, one)
        if self.counts is not None and self.seen is not None:
            note_tokens(self.counts[part], self.seen[part], tokens)

    def count(self, row: int, sequence: Sequence) -> None:
        """Tell the penalties the tokens of a row before its newest one, which is not in the cache."""
        if self.counts is not None and self.seen is not None:
            new = sequence.tokens[sequence.prompt_tokens : sequence.cached]
            counts, seen = count_text([(sequence.request.prompt, new)], self.n_vocab)
            self.counts[row], self.seen[row] = counts[0].to(self.counts.device), seen[0].to(self.seen.device)

    def replace_token(self, row: int, sequence: Sequence, token: int) -> None:
        """Another token follows those that the host knows."""
        self.state[row, TOKEN] = token
        self.count(row, sequence)
        if self.counts is not None and self.seen is not None:
            part = slice(row, row + 1)
            note_tokens(self.counts[part], self.seen[part], self.state[part, TOKEN])

    def keep(self, kept: list[int], n: int) -> None:
        """Of the first `n` rows these become the first ones; the others are rows that pad a bucket (`clear`)."""
        if kept != list(range(len(kept))):
            at = upload(kept, self.state.device)
            for held in (self.state, self.counts, self.seen, self.bias, self.allowed):
                if held is not None:
                    held[: len(kept)] = held[at]  # read before it is written
        self.state[len(kept) : n] = 0

    def clear(self, row: int) -> None:
        """A row that pads a bucket: it writes to page 0, at position 0."""
        self.state[row] = 0


def fill_state(state: np.ndarray, position: int, seed: int, options: SamplingOptions, pages: Items[int]) -> None:
    """Write a row of `RowState.state`, but for its token."""
    state[POSITION], state[SEEDS], state[SEEDS + 1] = position, seed & MASK, seed >> 32
    state[OPTIONS:TABLE].view(np.float64)[:] = row_numbers(options)
    state[TABLE : TABLE + len(pages)] = pages


def row_state(position: int, seed: int, options: SamplingOptions, pages: Items[int], width: int) -> Tensor:
    state = np.zeros(width, dtype=np.int64)
    fill_state(state, position, seed, options, pages)
    return torch.from_numpy(state)


class Step:
    """The decode step of `model`.

    Args:
        tolerance: as in `processing.draw`.
        kernels: what is computed by them.
        graphs: capture the step on a CUDA device.

    Attributes:
        processed: as in `processing.draw`; to be set before the first step.
    """

    processed = False

    def __init__(
        self,
        model: Transformer,
        pages: Pages,
        rows: RowState,
        tolerance: float | None,
        kernels: FastPaths = NO_KERNELS,
        *,
        graphs: bool,
    ):
        self.model = model if kernels.few_rows is None else with_few_rows(model, kernels.few_rows)
        self.pages, self.rows = pages, rows
        self.tolerance, self.kernels, self.graphs = tolerance, kernels, graphs
        self.captured: dict[tuple[int, Needs], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.pool = None
        self.prefill = Prefill(model, kernels.model, pages, graphs=graphs)
        self.several: Step | None = None

    def __call__(self, n: int, needs: Needs, alone: slice | None = None, longest: int = 0) -> tuple[Tensor, ...]:
        """Results of the first `n` rows: (n, RESULTS) float64, and with `needs.top` (n, top, 2) float64 of the
        likeliest tokens and their log-probabilities. RowState are the next power of two where graphs are used."""
        if not self.graphs:
            with self.few(n):
                return self.compute(n, needs, alone, longest)
        bucket = self.bucket(n)
        if (bucket, needs) not in self.captured:
            try:
                self.captured[bucket, needs] = self.capture(bucket, needs)
            except RuntimeError as error:
                self.graphs = False
                warn_without_graphs("decode steps run", error)
                return self.compute(n, needs, alone, longest)
        graph, results = self.captured[bucket, needs]
        graph.replay()
        return tuple(result[:n] for result in results)

    def bucket(self, n: int) -> int:
        """Rows of the graph for `n` rows."""
        return min(next(size for size in (*BUCKETS, self.rows.n) if size >= n), self.rows.n)

    def of_several(self, n: int) -> "Step":
        """The same step for up to `n` rows, several of one text at positions in a row among them: each sees the keys
        that those before it write, for which a fused step, that writes and reads in one kernel, is not."""
        if self.several is None or self.several.rows.n < n:
            rows = RowState(n, self.rows.table_pages, self.rows.n_vocab, self.rows.state.device)
            kernels = self.kernels._replace(model=None, few_rows=None)  # which self.model has
            self.several = Step(self.model, self.pages, rows, self.tolerance, kernels, graphs=True)
        return self.several

    def few(self, n: int) -> AbstractContextManager[None]:
        """The context in which `n` rows are computed."""
        few = self.model.device.type == "cpu" and n <= MOST
        return one_thread(self.kernels.few_rows) if few else nullcontext()

    def attended(self, texts: Items[Sequence], ahead: int = 0) -> tuple[slice | None, int]:
        """`alone` and `longest` of a step of these texts, `ahead` tokens after those in the cache."""
        if self.model.device.type == "cuda":
            return None, 0
        longest, (first, *others) = max(one.cached for one in texts) + ahead + 1, texts
        if others or first.base is None or self.graphs:
            return None, longest
        return slice(first.base, first.base + longest), longest

    def capture(self, bucket: int, needs: Needs) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        """A graph of the step for `bucket` rows, and where its results lie. State and cache stay as they are, but for
        what a first run for warmth writes: the state is put back, and the cache entries are those of the step."""
        rows = self.rows
        written = [held for held in (rows.state, rows.counts, rows.seen) if held is not None]
        before = [held.clone() for held in written]

        def put_back() -> None:
            for held, kept in zip(written, before):
                held.copy_(kept)

        graph, results = capture(lambda: self.compute(bucket, needs), put_back, self.pool)
        self.pool = self.pool or graph.pool()
        return graph, results

    @torch.no_grad()
    def compute(self, n: int, needs: Needs, alone: slice | None = None, longest: int = 0) -> tuple[Tensor, ...]:
        state = self.rows.state[:n]
        given = state.to(self.model.device)  # itself, but for MPS
        positions = given[:, POSITION]
        by: dict[str, Any] = {"attention": self.kernels.attention, "few_rows": self.kernels.few_rows}
        view = DecodeView(self.pages, given[:, TABLE:], positions, alone=alone, longest=longest, **by)
        if self.kernels.model is not None and n <= self.kernels.model.most_rows:
            tables, pages = state[:, TABLE:], self.pages
            hidden = self.kernels.model.hidden(state, tables, pages.k, pages.v, pages.page_size)
        else:
            hidden = self.model.hidden(given[None, :, TOKEN], positions=positions[None], cache=view)[0]  # (B, C)
        logits = self.logits(hidden)
        if self.draws_by_kernels(needs) and self.kernels.draw is not None:
            return (self.kernels.draw(logits, state, self.model.config.vocab_size),)
        positions = state[:, POSITION] + 1
        found, top = draw_from(logits, self.rows.options(n, needs), positions, needs, self.tolerance, self.processed)
        return self.advance(state, found, top, needs)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, V) of hidden states (B, C), where the rows are."""
        if self.kernels.draw is None:
            return self.model.logits(hidden).to(self.rows.state.device)
        if self.model.ops.head is not PLAIN.head:
            return self.model.logits(hidden).float()
        logits = torch.mm(hidden, self.model.head_weight.t(), out_dtype=torch.float32)  # not rounded to half
        return logits[:, : self.model.config.vocab_size]

    def draws_by_kernels(self, needs: Needs) -> bool:
        return self.kernels.draw is not None and self.tolerance is None and needs.drawn_by_kernels

    def read(self, given: Tensor, view: PrefillView) -> Tensor:
        """Hidden states (N, C) of the tokens and positions `given` (2, N), which `view` puts into the cache."""
        if view.kernel is not None:
            return self.prefill(given, view)
        return self.model.hidden(given[:1], positions=given[1:], cache=view)[0]

    def draw(
        self,
        texts: Items[Sequence],
        hidden: Tensor,
        proposed: Items[Items[int]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Results of the next tokens of texts whose last tokens have the hidden states (B, C); `proposed`: tokens of
        each after those that it has."""
        after = proposed or [()] * len(texts)
        options, device = [one.request.options for one in texts], self.rows.state.device
        V, logits = self.model.config.vocab_size, self.logits(hidden)
        structured = any(one.structure for one in texts)
        needs = Needs.of(options, V, max(one.request.top_logprobs for one in texts), structured)
        if self.draws_by_kernels(needs) and self.kernels.draw is not None:
            states = np.zeros((len(texts), TABLE), dtype=np.int64)
            for state, one, more in zip(states, texts, after):
                fill_state(state, len(one.tokens) + len(more) - 1, one.seed, one.request.options, ())
            return (self.kernels.draw(logits, upload(states, device), V),)
        told = [(one.tokens, [*one.new, *more]) for one, more in zip(texts, after)] if needs.penalties else ()
        rows = rows_of(options, [one.seed for one in texts], V, told, device)
        if structured:
            rows = rows._replace(allowed=torch.stack([allowed_tokens(one, V) for one in texts]).to(device))
        positions = upload([len(one.tokens) + len(more) for one, more in zip(texts, after)], device)
        return results_of(*draw_from(logits, rows, positions, needs, self.tolerance, self.processed))

    def advance(self, state: Tensor, found: Drawn, top: Tensor | None, needs: Needs) -> tuple[Tensor, ...]:
        """Write the drawn tokens into the rows' state."""
        state[:, TOKEN] = found.tokens
        state[:, POSITION] += 1
        if needs.penalties and self.rows.counts is not None and self.rows.seen is not None:
            note_tokens(self.rows.counts[: len(state)], self.rows.seen[: len(state)], found.tokens)
        return results_of(found, top)


def allowed_tokens(text: Sequence, n_vocab: int) -> Tensor:
    """(V,) bool: the tokens that may be next, all of them without a structure."""
    return text.structure.allowed() if text.structure else torch.ones(n_vocab, dtype=torch.bool)


def note_tokens(counts: Tensor, seen: Tensor, tokens: Tensor) -> None:
    counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens, dtype=counts.dtype)[:, None])
    seen.scatter_(1, tokens[:, None], True)


def draw_from(
    logits: Tensor,
    options: RowOptions,
    positions: Tensor,
    needs: Needs,
    tolerance: float | None,
    processed: bool = False,
) -> tuple[Drawn, Tensor | None]:
    """Draw the tokens at `positions` (B,) from logits (B, V); and the likeliest ones."""
    found = draw(logits, options, positions, needs.candidates, tolerance, processed=processed)
    if not needs.top:
        return found, None
    logits = logits if logits.dtype == torch.float64 else logits.float()
    values, ids = largest(logits, min(needs.top, logits.size(-1)))
    return found, torch.stack((ids.double(), (values - logits.logsumexp(-1, keepdim=True)).double()), dim=-1)


def results_of(found: Drawn, top: Tensor | None) -> tuple[Tensor, ...]:
    """One tensor, so that one copy brings it to the host; float64 holds every token id."""
    packed = torch.stack([part.double() for part in found], dim=-1)  # (B, RESULTS)
    return (packed,) if top is None else (packed, top)


class Launched(NamedTuple):
    """A step whose results the host has not read."""

    sequences: list[Sequence]
    results: tuple[Tensor, ...]
    ready: torch.cuda.Event | None

    def read(self) -> tuple[list[list[float]], list[list[list[float]]]]:
        """Results of each row, and its likeliest tokens; waits for the device."""
        if self.ready is not None:
            self.ready.synchronize()
        numbers = self.results[0].tolist()
        return numbers, self.results[1].tolist() if len(self.results) > 1 else [[]] * len(numbers)


def to_host(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
    """Results on their way to the host, and when they are there."""
    if results[0].device.type != "cuda":
        return results, None
    places = [torch.empty(result.shape, dtype=result.dtype, pin_memory=True) for result in results]
    copies = tuple(place.copy_(result, non_blocking=True) for place, result in zip(places, results))
    ready = torch.cuda.Event()
    ready.record()
    return copies, ready
