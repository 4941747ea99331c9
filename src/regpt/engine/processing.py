"""LOGITS → TOKEN: one pure function for the command line, training's samples, servers and reinforcement learning.

Every row has options of its own; the order is: structured-output mask, logit bias, penalties, temperature, top-k,
top-p, min-p, then a draw by Gumbel noise (`engine.noise`). Shapes: B rows, V vocabulary, K candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regpt.engine.noise import MASK, gumbel, random_bits, split_seeds
from regpt.errors import UsageError

# By how much another shape of the products changes a logit, relative to the largest of its row: see docs/engine.md.
TOLERANCES = {torch.float32: 3e-5, torch.float64: 1e-12}
LONG = 64  # candidates that are left where all tokens are drawn from
SPARE = 4  # candidates beyond top-k: to know how near its edge the next ones are


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn; the defaults are the lecture's (and Hugging Face's pipeline's)."""

    __pydantic_config__ = {"extra": "forbid"}

    temperature: float = 1.0
    """Logits are divided by it: below 1 sharper, above 1 flatter; 0 takes the likeliest token."""
    top_k: int = 50
    """Draw from the k likeliest tokens (Fan et al. 2018, section 5.4); 0 from all, 1 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability (Holtzman et al. 2020, eq. 3); 1 from all."""
    min_p: float = 0.0
    """Draw from tokens of at least this share of the likeliest one's probability (Nguyen et al. 2024); 0 from all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or text are divided by it, negative ones multiplied (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Is subtracted from the logits of tokens that the new text has (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Is subtracted from them once for every time."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit; -inf excludes it."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # NaN fails too
            raise UsageError(f"temperature is {self.temperature}, must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}, must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p is {self.min_p}, must be between 0 (all tokens) and 1")
        if not 0.001 <= self.repetition_penalty <= 1000:  # further off, logits would leave float32's range
            raise UsageError(f"repetition-penalty is {self.repetition_penalty}, must be from 0.001 to 1000 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}, must be finite (0: none)")
        for token, bias in self.logit_bias:
            if token < 0 or not bias < math.inf:
                raise UsageError(f"logit-bias gives token {token} {bias}; tokens are 0 or more, biases below infinity")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalized(self) -> bool:
        """Whether logits depend on the tokens of the text."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def candidates(self, n_vocab: int) -> int:
        """How many of the likeliest tokens must be put in order to know what is drawn from: 0 is none."""
        if self.greedy:
            return min(n_vocab, 1 + SPARE)
        if 0 < self.top_k < n_vocab:
            return min(n_vocab, self.top_k + SPARE)
        return n_vocab if self.top_p < 1 else 0


NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip


class RowOptions(NamedTuple):
    """Options of B rows as tensors.

    Attributes:
        numbers: (B, 7) float64, the `NUMBERS`; an exact integer of top-k included.
        seeds: (B, 2) int64, as `noise.split_seeds` gives them.
        counts, seen: (B, V) int32, of each token in the new text, and bool, whether in prompt or text; None where
            no row has penalties.
        bias: (B, V) float32, or None.
        allowed: (B, V) bool, tokens that structured output permits, or None.
    """

    numbers: Tensor
    seeds: Tensor
    counts: Tensor | None = None
    seen: Tensor | None = None
    bias: Tensor | None = None
    allowed: Tensor | None = None


class Drawn(NamedTuple):
    """Results of `draw`.

    Attributes:
        tokens: (B,) int64.
        logprobs: (B,) of the model for them: of its logits' softmax, before all processing.
        finite: (B,) bool, whether the logits were numbers and a token was allowed; else the token means nothing.
        certain: (B,) bool, whether the same tokens are drawn from all logits within the tolerance of these.
    """

    tokens: Tensor
    logprobs: Tensor
    finite: Tensor
    certain: Tensor


class Candidates(NamedTuple):
    """Tokens that may be drawn.

    Attributes:
        ids: (B, K) int64, or (V,) where all are in the vocabulary's order.
        scores: (B, K), processed logits less the row's largest, over the temperature; -inf where excluded.
        kept: (B, K) bool, those that are drawn from.
        near: (B, K) bool, those that logits within the tolerance could keep or drop.
    """

    ids: Tensor
    scores: Tensor
    kept: Tensor
    near: Tensor


def row_numbers(options: SamplingOptions) -> list[float]:
    return [float(getattr(options, name)) for name in NUMBERS]


def rows_of(
    options: Sequence[SamplingOptions],
    seeds: Sequence[int],
    n_vocab: int,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    device: torch.device | str = "cpu",
) -> RowOptions:
    """`RowOptions` of rows with these options and seeds, and for penalties `texts`: the prompt's and the new tokens."""
    numbers = torch.tensor([row_numbers(one) for one in options], dtype=torch.float64).to(device)
    counts = seen = bias = None
    if any(one.penalized for one in options):
        counts, seen = count_text(texts, n_vocab)
        counts, seen = counts.to(device), seen.to(device)
    if any(one.logit_bias for one in options):
        bias = torch.zeros(len(options), n_vocab)
        for row, one in zip(bias, options):
            for token, value in one.logit_bias:
                row[token] = value
        bias = bias.to(device)
    return RowOptions(numbers, split_seeds(seeds, device), counts, seen, bias)


def count_text(texts: Sequence[tuple[Sequence[int], Sequence[int]]], n_vocab: int) -> tuple[Tensor, Tensor]:
    """`counts` and `seen` of `RowOptions` for pairs of prompt and new tokens."""
    counts = torch.stack([torch.bincount(torch.tensor(new, dtype=torch.int64), minlength=n_vocab) for _, new in texts])
    seen = counts > 0
    for row, (prompt, _) in zip(seen, texts):
        row[torch.tensor(prompt, dtype=torch.int64)] = True
    return counts.int(), seen


def draw(
    logits: Tensor,
    rows: RowOptions,
    positions: Tensor,
    candidates: int = -1,
    tolerance: float | None = None,
    *,
    processed: bool = False,
) -> Drawn:
    """One token a row from `logits` (B, V), the text's tokens at `positions` (B,) int64.

    Args:
        candidates: the largest `SamplingOptions.candidates` of the rows, or V where any needs an order of all; -1 puts
            all in order. It changes the cost, not the tokens.
        tolerance: relative to the row's largest absolute logit, by how much another way of computing may change a
            logit; `certain` then holds where no such change changes the token.
        processed: `logprobs` are those that tokens are drawn with, after all processing.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    low, high = logits.aminmax(dim=-1)  # (B,); NaN where one is
    finite = low.isfinite() & high.isfinite()
    if logits.device.type != "cpu" or not finite.all():  # a pass less; only the CPU may look
        logits = logits.nan_to_num()
    largest_logit = torch.maximum(low.abs(), high.abs())
    slack = None if tolerance is None else error_bound(largest_logit, rows.numbers, tolerance)
    kept = choose_candidates(adjust(logits, rows), rows, candidates, slack)
    total = kept.scores.masked_fill(~kept.kept, -math.inf).logsumexp(dim=-1) if processed else None
    random = (rows.numbers[:, 0] > 0)[:, None]
    if candidates == 0 and logits.size(-1) > LONG:
        kept = shortlist(kept, rows.seeds, positions, random)
    ids = kept.ids.expand_as(kept.scores)
    noise = gumbel(rows.seeds, positions, kept.ids).to(kept.scores.dtype)
    scores = torch.where(random, kept.scores + noise, kept.scores)
    open_scores = scores.masked_fill(~kept.kept, -math.inf)
    best = open_scores.amax(dim=-1, keepdim=True)
    at = torch.where(open_scores == best, ids, logits.size(-1)).argmin(dim=-1, keepdim=True)  # of equals the lowest id
    tokens = ids.gather(-1, at).squeeze(-1)
    if total is None:
        logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
    else:
        logprobs = kept.scores.gather(-1, at).squeeze(-1) - total
    certain = torch.ones_like(finite)
    if slack is not None:
        others = scores.masked_fill(~(kept.kept | kept.near), -math.inf).scatter(-1, at, -math.inf)
        certain = (others.amax(dim=-1) < best.squeeze(-1) - slack) & ~kept.near.gather(-1, at).squeeze(-1)
        if candidates and kept.scores.size(-1) < logits.size(-1):  # tokens after the candidates may be as near
            certain &= kept.kept[:, -1] | ~kept.near[:, -1]
    return Drawn(tokens, logprobs, finite & best.squeeze(-1).isfinite(), certain)


def shortlist(kept: Candidates, seeds: Tensor, positions: Tensor, random: Tensor) -> Candidates:
    """The candidates that can win the draw, by noise in float32: exact noise of a whole vocabulary takes longer than
    the rest. Those left out are far behind, unless more than `LONG` are equal within rounding."""
    bits = random_bits(seeds, positions, kept.ids)
    rest = ((MASK - bits).float() + 0.5) * 2.0**-32  # 1 - u, exact near 0, where noise is largest
    noise = rest.neg_().log1p_().neg_().log_().neg_().to(kept.scores.dtype)
    about = torch.where(random, kept.scores + noise, kept.scores).masked_fill(~(kept.kept | kept.near), -math.inf)
    at = about.topk(LONG, dim=-1).indices
    ids = kept.ids.expand_as(kept.scores).gather(-1, at)
    return Candidates(ids, *(part.gather(-1, at) for part in (kept.scores, kept.kept, kept.near)))


def error_bound(largest_logit: Tensor, numbers: Tensor, tolerance: float) -> Tensor:
    """(B,): by how much the difference of two scores may change where logits change by `tolerance` of the largest."""
    temperature, repetition = numbers[:, 0], numbers[:, 4]
    scale = torch.maximum(repetition, 1 / repetition) / torch.where(temperature > 0, temperature, 1.0)
    return (2 * tolerance * scale * largest_logit).to(largest_logit.dtype)


def adjust(logits: Tensor, rows: RowOptions) -> Tensor:
    """`logits` (B, V) with mask, bias and penalties."""
    if rows.bias is not None:
        logits = logits + rows.bias
    if rows.seen is not None and rows.counts is not None:
        repetition, presence, frequency = rows.numbers[:, 4:].to(logits.dtype).unbind(dim=-1)
        by = torch.where(rows.seen, repetition[:, None], 1.0)
        logits = torch.where(logits > 0, logits / by, logits * by)
        logits = logits - presence[:, None] * (rows.counts > 0) - frequency[:, None] * rows.counts
    if rows.allowed is not None:
        logits = logits.masked_fill(~rows.allowed, -math.inf)
    return logits


def choose_candidates(logits: Tensor, rows: RowOptions, candidates: int, slack: Tensor | None) -> Candidates:
    """What is drawn from: temperature, top-k, top-p over what top-k has left, and min-p."""
    temperature, top_k, top_p, min_p = rows.numbers[:, :4].unbind(dim=-1)
    dtype, V = logits.dtype, logits.size(-1)
    limits = torch.finfo(dtype)
    if candidates == 0:
        values, ids = logits, torch.arange(V, device=logits.device)
    else:
        values, ids = largest(logits, V if candidates < 0 else min(candidates, V))
    # The maximum is subtracted before the division: a tiny temperature then gives -inf, never inf - inf. One that
    # rounds to zero or to infinity in the logits' type would give 0 / 0 or inf / inf.
    by = torch.where(temperature > 0, temperature, 1.0).clamp(limits.tiny, limits.max).to(dtype)
    highest = values.amax(dim=-1, keepdim=True)
    scores = (values - highest.clamp(min=limits.min)) / by[:, None]
    floor = min_p.log()[:, None].to(dtype)  # -inf for 0
    kept = (scores > -math.inf) & (scores >= floor)
    near = torch.zeros_like(kept)
    if slack is not None:
        near = (scores - floor).abs() <= slack[:, None]
    if candidates == 0:
        return Candidates(ids, scores, kept, near)
    rank = torch.arange(values.size(-1), device=logits.device)
    ranked = (rank < torch.where(top_k > 0, top_k, V)[:, None]) & (scores > -math.inf)
    probs = scores.masked_fill(~ranked, -math.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # (B, K), probability of the likelier tokens
    p = torch.where(top_p < 1, top_p, 2.0)[:, None].to(dtype)
    nucleus = (before < p) | (rank == 0)  # the likeliest stays, also where p rounds to 0 in float32
    kept = kept & ranked & nucleus
    if slack is not None:
        near = near | near_edge(scores, kept, slack) | ((before - p).abs() <= slack[:, None]) & ranked
    return Candidates(ids, scores, kept, near)


def near_edge(scores: Tensor, kept: Tensor, slack: Tensor) -> Tensor:
    """(B, K) bool: scores so near the edge between kept and others that an error of `slack` may change the side."""
    inside = scores.masked_fill(~kept, math.inf).amin(dim=-1, keepdim=True)
    outside = scores.masked_fill(kept, -math.inf).amax(dim=-1, keepdim=True)
    slack = slack[:, None]
    return torch.where(kept, scores <= outside + slack, scores >= inside - slack)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of `logits` (B, V), in order, and their ids; of equal ones the lowest ids first."""
    V = logits.size(-1)
    if k == V or logits.dtype == torch.float64:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    if logits.device.type == "cpu" and k < V - 1:
        values, ids = logits.topk(k + 1, dim=-1)
        if bool((values[:, k - 1] > values[:, k]).all()):  # no equals at the edge
            ids = ids[:, :k].sort(dim=-1).values
            values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
            return values, ids.gather(-1, order)
    bits = (logits + 0.0).view(torch.int32)  # no -0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # integers in the order of the floats
    keys = ordered | torch.arange(V - 1, -1, -1, device=logits.device)
    ids = V - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return logits.gather(-1, ids), ids


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return dtype in TOLERANCES and device.type != "mps" and not (tf32 and dtype == torch.float32)
