"""DRAFT → PROPOSALS → TOKENS: several tokens a step, the same ones as without (after Leviathan et al. 2023).

A draft proposes the next tokens of a text. The model reads them in one forward and draws after each with its own
noise. A proposal that equals the draw is accepted; the first that does not is replaced by the draw, and what was
proposed after it is forgotten: its cache entries are overwritten. The noise of a draw depends on seed, position and
token alone, so each draw is the one that a step of its own would have made. Hence no rejection sampling: it is the same
text, not only one of the same distribution. A draft model draws with the same noise, so at any temperature it proposes
the model's token wherever their distributions are near (Gumbel coupling).
"""

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from regpt.engine.cache import Pages, PrefillView, PromptSpan, ragged, upload
from regpt.engine.decode import TOKEN, Launched, Needs, RowState, Step, fill_state, to_host
from regpt.engine.fast import NO_KERNELS, load_kernels
from regpt.engine.sequence import Sequence
from regpt.errors import UsageError
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer

if TYPE_CHECKING:
    from regpt.engine.engine import Engine

DRAFT_TOKENS = 4
NGRAMS = (4, 3, 2)  # lengths of the matches that are looked for


class Draft(Protocol):
    """Proposes tokens; whatever they are, the texts stay the same."""

    def read(self, given: Tensor, spans: Items[PromptSpan]) -> None:
        """Prompts' tokens and positions (2, N) in a ragged batch, as the model reads them."""
        ...

    def propose(self, texts: Items[Sequence], most: Items[int]) -> list[list[int]]:
        """What may follow each text: up to `most[i]` tokens, perhaps none."""
        ...


class NGrams:
    """Proposes what followed the last few tokens at their last occurrence in the text (prompt lookup, Saxena 2023)."""

    def read(self, given: Tensor, spans: Items[PromptSpan]) -> None:
        """Nothing: the texts have their tokens."""

    def propose(self, texts: Items[Sequence], most: Items[int]) -> list[list[int]]:
        return [look_up(one.tokens, n) for one, n in zip(texts, most)]


def look_up(tokens: Items[int], n: int) -> list[int]:
    """`n` tokens, as if the text went on as after the newest place with its last tokens, and again from there where `n`
    is more than what follows it; the longest match counts."""
    text = "".join(map(chr, tokens)) if n > 0 else ""  # characters stand for tokens: search in C
    for size in NGRAMS:
        at = text.rfind(text[-size:], 0, len(text) - 1) if size < len(text) else -1
        if at >= 0:
            period = len(text) - size - at
            return [tokens[len(text) - period + i % period] for i in range(n)]
    return []


class DraftModel:
    """Proposes what a smaller model, or an earlier checkpoint, draws with the texts' own noise and options.

    Its keys and values are in pages with the numbers of the model's own pages, and it reads every token that the model
    reads: what is found in the prefix cache is found for both.

    Args:
        pages: of the model that it proposes to.
        max_rows: texts at once.
        dtype: of its keys and values.
    """

    def __init__(
        self,
        model: Transformer,
        target: Transformer,
        pages: Pages,
        max_rows: int,
        dtype: torch.dtype,
        *,
        kernels: bool,
        graphs: bool,
    ):
        ours, theirs = target.config, model.config
        check_draft(ours, theirs)
        self.model, self.device = model, model.device
        self.host = torch.device("cpu") if self.device.type == "mps" else self.device
        self.pages = Pages(theirs, pages.n_pages, pages.page_size, self.device, dtype)
        self.rows = RowState(max_rows, pages.needed(ours.max_seq_len), ours.vocab_size, self.host)
        found = load_kernels(model, dtype) if kernels else NO_KERNELS
        self.prefill_kernel = found.prefill
        self.step = Step(model.eval(), self.pages, self.rows, None, found, graphs=graphs)

    def read(self, given: Tensor, spans: Items[PromptSpan]) -> None:
        self.step.read(given, PrefillView(self.pages, spans, self.prefill_kernel))

    def propose(self, texts: Items[Sequence], most: Items[int]) -> list[list[int]]:
        """Each text's last token, and its proposals, go through the model: the last one, too, which only its cache
        needs. A text that has its proposals leaves the batch."""
        order = sorted(range(len(texts)), key=lambda i: -most[i])
        rows, n = [texts[i] for i in order], len(texts)
        needs = Needs.of([one.request.options for one in rows], self.rows.n_vocab)
        self.rows.prepare(needs)
        self.rows.fill(range(n), rows, newest_tokens(rows, self.host))
        drawn, sizes = list[Tensor](), list[int]()
        for ahead in range(most[order[0]] + 1):
            while most[order[n - 1]] < ahead:
                n -= 1
                self.rows.clear(n)
            results = self.step(n, needs, *self.step.attended(rows[:n], ahead))
            drawn.append(results[0][:, 0].clone())  # a graph's are overwritten
            sizes.append(n)
        for row in range(n):
            self.rows.clear(row)
        found: list[list[int]] = [[] for _ in texts]
        for part in torch.cat(drawn).long().split(sizes):
            for i, token in zip(order, part.tolist()):
                found[i].append(token)
        return [proposed[:n] for proposed, n in zip(found, most)]


def check_draft(model: ModelConfig, draft: ModelConfig) -> None:
    """Raise a UsageError for a draft with another number of tokens, or one that reads fewer than the model."""
    if draft.vocab_size != model.vocab_size:
        raise UsageError(
            f"the draft has {draft.vocab_size} tokens, the model {model.vocab_size}; give a draft of the same tokenizer"
        )
    if draft.max_seq_len < model.max_seq_len:
        raise UsageError(
            f"the draft reads {draft.max_seq_len} tokens, the model {model.max_seq_len}; give one that reads as many"
        )


def newest_tokens(texts: Items[Sequence], device: torch.device) -> Tensor:
    return upload([one.tokens[-1] for one in texts], device)


def speculate(engine: "Engine", draft: Draft) -> None:
    """Draw the next tokens of every active text, whose tokens the host knows; one each where nothing is proposed."""
    texts, most = list(engine.active), engine.draft_tokens
    rooms = [0 if one.structure else min(most, one.steps_left(engine.longest) - 1) for one in texts]
    proposals = draft.propose(texts, rooms)
    if not any(proposals):
        engine.rows.fill(range(len(texts)), texts, newest_tokens(texts, engine.host))
        engine.decode()
        return
    results = check_by_graph(engine, texts, proposals)
    drawn = zip(*Launched(texts, *to_host(results or check_eagerly(engine, texts, proposals))).read())
    for one, more in zip(texts, proposals):
        accept_proposals(engine, one, more, [next(drawn) for _ in range(len(more) + 1)])
    engine.deactivate({one for one in texts if one.finished or not engine.goes_on(one)})
    engine.count_steps()


def check_eagerly(engine: "Engine", texts: Items[Sequence], proposals: Items[Items[int]]) -> tuple[Tensor, ...]:
    """Results of the tokens after each text and each of its proposals, as `Step.draw` gives them."""
    parts = [([one.tokens[-1], *more], one.cached, one.pages, one.base) for one, more in zip(texts, proposals)]
    given, spans = ragged(parts, engine.device)
    places = [(one, more[:i]) for one, more in zip(texts, proposals) for i in range(len(more) + 1)]
    step = engine.decode_step
    with step.few(len(places)):
        hidden = step.read(given, PrefillView(engine.pages, spans, engine.prefill_kernel))
        return step.draw([one for one, _ in places], hidden, [before for _, before in places])


def check_by_graph(engine: "Engine", texts: Items[Sequence], proposals: Items[Items[int]]) -> tuple[Tensor, ...] | None:
    """The same by a decode step of as many rows, which is a CUDA graph; None where there are none, or where a draw
    depends on the tokens that were proposed before it."""
    step = engine.decode_step
    needs = Needs.of([one.request.options for one in texts], engine.n_vocab, max(t.request.top_logprobs for t in texts))
    if not step.graphs or needs.penalties or needs.bias or any(one.structure for one in texts):
        return None
    step = step.of_several(engine.max_rows * (engine.draft_tokens + 1))
    n = sum(len(more) + 1 for more in proposals)
    states = np.zeros((step.bucket(n), step.rows.state.size(1)), dtype=np.int64)  # those that pad it use page 0
    rows = iter(states)
    for one, more in zip(texts, proposals):
        for ahead, token in enumerate((one.tokens[-1], *more)):
            state = next(rows)
            fill_state(state, one.cached + ahead, one.seed, one.request.options, one.pages)
            state[TOKEN] = token
    step.rows.state[: len(states)] = upload(states, engine.host)
    return step(n, needs)


def accept_proposals(
    engine: "Engine", text: Sequence, proposed: list[int], drawn: Items[tuple[list[float], list[list[float]]]]
) -> None:
    """Take what was drawn (of each place what `Engine.take` takes), up to the first token that was not proposed; that
    one, too."""
    engine.proposed += len(proposed)
    for place, (numbers, others) in enumerate(drawn):
        text.launched += 1
        text.cached += 1
        engine.take(text, numbers, others)
        right = place < len(proposed) and text.tokens[-1] == proposed[place]
        engine.accepted += right
        if text.finished or not right:
            return
