"""LOGITS → TOKEN, told: what the functions of `engine.processing` and `engine.noise` made of the likeliest tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from regpt.engine.noise import gumbel
from regpt.engine.processing import SamplingOptions, adjust, choose_candidates, draw, rows_of

# In the order in which they are applied, each with the options that switch off those after it.
FILTERS = {"top_k": {"top_p": 1.0, "min_p": 0.0}, "top_p": {"min_p": 0.0}, "min_p": {}}


class TokenPath(NamedTuple):
    """The path of one token through a draw.

    Attributes:
        logit, logprob: of the model, before all processing.
        adjusted: the logit with bias and penalties.
        rank: among the adjusted logits, from 1.
        score: difference of `adjusted` to the largest, over the temperature.
        dropped_by: the first of `FILTERS` that excludes it; None where it may be drawn.
        probability: with which it is drawn; 0 where it is dropped.
        noise: its Gumbel noise; 0 at temperature 0. The largest score + noise of those that may be drawn wins.
    """

    token: int
    logit: float
    logprob: float
    adjusted: float
    rank: int
    score: float
    dropped_by: str | None
    probability: float
    noise: float


class Explanation(NamedTuple):
    """One draw.

    Attributes:
        token: the one that is drawn.
        kept: how many tokens may be drawn.
        paths: of the likeliest tokens, of those with the largest score + noise, and of the drawn one; likeliest first.
    """

    token: int
    kept: int
    paths: list[TokenPath]


@torch.no_grad()
def explain_draw(
    logits: Tensor,
    options: SamplingOptions,
    seed: int,
    position: int,
    text: tuple[Sequence[int], Sequence[int]] = ((), ()),
    most: int = 12,
) -> Explanation | None:
    """How the token at `position` is drawn from `logits` (V,); None where they are not finite.

    Args:
        text: tokens of the prompt and new ones, for penalties.
        most: so many likeliest tokens, and half as many with the largest score + noise.
    """
    logits, V = logits.float()[None], logits.size(-1)
    each = {name: replace(options, **off) for name, off in FILTERS.items()}
    rows, *others = (rows_of([one], [seed], V, [text], logits.device) for one in (options, *each.values()))
    at = torch.tensor([position], device=logits.device)
    drawn = draw(logits, rows, at)
    if not drawn.finite.all():
        return None
    adjusted = adjust(logits, rows)
    ids, scores, kept, _ = choose_candidates(adjusted, rows, -1, None)  # (1, V), in order
    chosen = {name: choose_candidates(adjusted, one, -1, None).kept for name, one in zip(each, others)}
    won = ids == drawn.tokens
    random = options.temperature > 0
    noise = gumbel(rows.seeds, at, ids) if random else torch.zeros_like(scores)
    chances = scores.masked_fill(~kept, -torch.inf).softmax(dim=-1) if random else won.float()
    totals = (scores + noise).masked_fill(~kept, -torch.inf)
    places = {*range(min(most, V)), *totals[0].topk(min(most // 2, V)).indices.tolist(), int(won.int().argmax())}
    order = torch.tensor(sorted(places), device=logits.device)
    parts = (ids, logits.gather(-1, ids), logits.log_softmax(dim=-1).gather(-1, ids), adjusted.gather(-1, ids))
    columns = [part[0, order].tolist() for part in (*parts, scores, chances, noise)]
    dropped = [next((name for name in FILTERS if not chosen[name][0, i]), None) for i in order]
    paths = [
        TokenPath(token, logit, logprob, changed, int(i) + 1, score, why, chance, gumbel_noise)
        for i, why, (token, logit, logprob, changed, score, chance, gumbel_noise) in zip(order, dropped, zip(*columns))
    ]
    return Explanation(int(drawn.tokens[0]), int(kept.sum()) if random else 1, paths)
