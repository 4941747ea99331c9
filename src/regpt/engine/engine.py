"""REQUESTS → EVENTS: continuous batching over paged keys and values.

`submit` requests, then call `step` until the engine is no longer `busy`: each step reads a chunk of prompts and draws
one token for every text that is being written. Not for several threads at once.

In float32 and float64 a text is the one that the uncached loop writes (`engine.reference`), whatever else is in the
batch. Products of other shapes round differently, so bits of the logits depend on the batch; which token is drawn does
only where two scores are nearer to each other than such rounding. `processing.draw` reports these tokens, and they are
drawn again from an uncached forward of the text alone.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from regpt.engine.cache import Pages, PrefillView, ragged, upload
from regpt.engine.decode import Launched, Needs, RowState, Step, allowed_tokens, to_host
from regpt.engine.fast import NO_KERNELS, load_kernels
from regpt.engine.noise import choice_seed
from regpt.engine.processing import TOLERANCES, is_exact
from regpt.engine.request import Event, FinishReason, Request, Stats, bad_logits, check_request
from regpt.engine.sequence import FairQueue, Sequence
from regpt.engine.speculate import DRAFT_TOKENS, Draft, DraftModel, speculate
from regpt.engine.text import TextStream
from regpt.errors import UsageError
from regpt.model.transformer import Transformer
from regpt.text.tokenizer import Tokenizer

PAGE_SIZE = 16
CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}


class Engine:
    """Writes texts of many requests with one model.

    Args:
        model: in eval mode or not; it stays so.
        tokenizer: for `Event.text` and stop strings.
        max_rows: texts that are written at once.
        cache_tokens: positions that the cache holds; what does not fit waits.
        page_size: positions a page.
        chunk_tokens: tokens of prompts that a step reads, so that long prompts do not hold up the others.
        prefix_cache: keep pages of finished texts for prompts that begin alike.
        exact: tokens that rounding could change are drawn again from an uncached forward. Default: in float32 and
            float64, except where TensorFloat-32 is allowed.
        graphs: capture the decode step as CUDA graphs. Default: on CUDA; never under autocast.
        kernels: what there is for the device and the model (`engine.fast`).
        draft: what proposes up to `draft_tokens` tokens a step of each text (`engine.speculate`).
        narrow_cache: keep keys and values in fp8 (`Pages`); texts are not `exact` then.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 64,
        cache_tokens: int = 0,
        page_size: int = PAGE_SIZE,
        chunk_tokens: int = 0,
        prefix_cache: bool = True,
        exact: bool | None = None,
        graphs: bool | None = None,
        kernels: bool = True,
        draft: Transformer | Draft | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        narrow_cache: bool = False,
    ):
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.device, self.longest, self.n_vocab = model.device, model.config.max_seq_len, model.config.vocab_size
        kind = self.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtype = self.autocast or model.dtype  # of keys and values
        self.exact = is_exact(model.device, dtype) and not narrow_cache if exact is None else exact
        if self.exact and dtype not in TOLERANCES:
            raise UsageError(f"exact texts need float32 or float64, the model computes in {dtype}")
        self.tolerance = TOLERANCES[dtype] if self.exact else None
        self.chunk_tokens = chunk_tokens or CHUNK_TOKENS.get(kind, 512)
        n_pages = -(-(cache_tokens or max_rows * self.longest) // page_size)
        self.pages = Pages(model.config, n_pages, page_size, self.device, dtype, narrow=narrow_cache)
        self.host = torch.device("cpu") if kind == "mps" else self.device  # draws need float64
        self.rows = RowState(max_rows, self.pages.needed(self.longest), self.n_vocab, self.host)
        graphs = (kind == "cuda" if graphs is None else graphs) and self.autocast is None  # which frees its casts
        found = load_kernels(model, dtype) if kernels else NO_KERNELS
        self.prefill_kernel, self.draft_tokens = found.prefill, draft_tokens
        self.prefix_cache, self.keep_texts = prefix_cache, prefix_cache and not found.fixed_order  # decoded bits differ
        self.decode_step = Step(model, self.pages, self.rows, self.tolerance, found, graphs=graphs)
        if isinstance(draft, Transformer):
            held = self.autocast or draft.dtype
            draft = DraftModel(draft, model, self.pages, max_rows, held, kernels=kernels, graphs=graphs)
        self.draft: Draft | None = draft
        self.queue, self.followers = FairQueue(), dict[int, list[Sequence]]()  # other texts of a request
        self.prefilling, self.active, self.sliding = list[Sequence](), list[Sequence](), list[Sequence]()
        self.pending, self.outbox = deque[Launched](), list[Event]()
        self.needs: Needs | None = None  # of the active rows; None: to be found out
        self.steps_left = 0  # see `count_steps`
        self.next_id = self.prompt_tokens = self.cached_tokens = self.new_tokens = self.recomputed = self.steps = 0
        self.proposed = self.accepted = 0  # tokens of a draft

    def submit(self, request: Request) -> int:
        """Queue a request; its number is in its events.

        Raises:
            UserError: prompt and new tokens are longer than the model or the cache.
            UsageError: a token that the model does not have, or stop strings without a tokenizer.
        """
        room = self.pages.n_pages * self.pages.page_size
        check_request(request, self.longest, self.n_vocab, room, texts=self.tokenizer is not None)
        self.next_id += 1
        first, *others = (self.sequence(request, choice) for choice in range(request.n))
        self.queue.append(first)
        if others:
            self.followers[self.next_id] = others
        return self.next_id

    def sequence(self, request: Request, choice: int) -> Sequence:
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, request.prompt, request.stop)
        structure = request.structure() if request.structure else None
        tokens, seed = list(map(int, request.prompt)), choice_seed(request.seed, choice)
        return Sequence(self.next_id, choice, request, seed, tokens, stream, structure)

    def cancel(self, request_id: int) -> None:
        """End a request's texts now: their pages are free when this returns. The next step has their last events."""
        waiting = [one for one in self.queue if one.request_id == request_id]
        for sequence in waiting:
            self.queue.remove(sequence)
        waiting += self.followers.pop(request_id, [])
        for sequence in [*waiting, *(one for one in self.running() if one.request_id == request_id)]:
            self.end(sequence, "cancelled")
        self.deactivate({one for one in self.active if one.finished})

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.queue or self.prefilling or self.active or self.sliding or self.pending or self.outbox)

    def running(self) -> list[Sequence]:
        """Texts that are read or written."""
        held = [*self.prefilling, *self.active, *self.sliding, *(s for one in self.pending for s in one.sequences)]
        return [one for one in dict.fromkeys(held) if not one.finished]

    def stats(self) -> Stats:
        waiting = len(self.queue) + sum(map(len, self.followers.values()))
        counted = self.prompt_tokens, self.cached_tokens, self.new_tokens, self.recomputed, self.steps
        pages, drafted = (self.pages.n_free, self.pages.n_pages), (self.proposed, self.accepted)
        return Stats(waiting, len(self.running()), *pages, *counted, *drafted)

    def run(self, requests: Iterable[Request]) -> list[list[list[int]]]:
        """The new tokens of each text of each request.

        Raises:
            UserError: logits that are not finite.
        """
        given = list(requests)
        numbers = {self.submit(request): i for i, request in enumerate(given)}
        found: list[list[list[int]]] = [[[] for _ in range(request.n)] for request in given]
        while self.busy:
            for event in self.step():
                if event.finish_reason == "error":
                    raise bad_logits()
                if event.token is not None:
                    found[numbers[event.request]][event.choice].append(event.token)
        return found

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Read a chunk of prompts, draw a token for each active text, and return what the host has read: on CUDA of
        the step before, so that the device never waits for the host."""
        if was_training := self.model.training:  # which walks all modules: 0.24 ms for GPT-2
            self.model.eval()
        try:
            with self.computing():
                self.admit()
                before = len(self.pending)
                if self.prefilling:
                    self.prefill()
                # The last tokens must be known, where they may be drawn again or decide what is allowed.
                known = self.exact or self.draft is not None or any(one.structure for one in self.active)
                while self.pending and known:
                    self.collect(self.pending.popleft())
                if self.active:
                    self.decode() if self.draft is None else speculate(self, self.draft)
                for sequence in list(self.sliding):
                    if not sequence.unread:
                        self.slide(sequence)
                lag = len(self.pending) - before if self.may_lag() and (self.active or self.prefilling) else 0
                while len(self.pending) > lag:
                    self.collect(self.pending.popleft())
        finally:
            if was_training:
                self.model.train()
        self.steps += 1
        events, self.outbox = self.outbox, []
        return events

    def computing(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()

    def may_lag(self) -> bool:
        """Whether a step may begin before the host knows the last one's tokens."""
        known = self.exact or self.draft is not None or (self.needs and self.needs.allowed)
        return self.device.type == "cuda" and not known

    def admit(self) -> None:
        """Give waiting texts pages and rows, in turn, as long as there are some."""
        while (sequence := self.queue.first()) and len(self.prefilling) + len(self.active) < self.max_rows:
            prompt, most = sequence.tokens, self.longest
            if len(prompt) > most:
                self.sliding.append(self.queue.pop())
                self.release_followers(sequence)
                continue
            total = min(len(prompt) + sequence.request.max_new_tokens - 1, most)
            found = self.pages.reserve(prompt[:-1] if self.prefix_cache else [], total)  # the last has to be read
            if found is None:
                return
            sequence.pages, sequence.cached = found
            sequence.base = self.pages.base(sequence.pages)
            self.prompt_tokens += len(prompt)
            self.cached_tokens += sequence.cached
            self.prefilling.append(self.queue.pop())

    def prefill(self) -> None:
        """Read up to `chunk_tokens` of the prompts, and draw the first token after those that are read."""
        parts, read, room = [], list[Sequence](), self.chunk_tokens
        for sequence in self.prefilling:
            n, start = min(room, sequence.prompt_tokens - sequence.cached), sequence.cached
            if n:
                parts.append((sequence.tokens[start : start + n], start, sequence.pages, sequence.base))
                sequence.cached, room = start + n, room - n
                read.append(sequence)
        given, spans = ragged(parts, self.device)
        hidden = self.decode_step.read(given, PrefillView(self.pages, spans, self.prefill_kernel))  # (N, C)
        if self.draft is not None:
            self.draft.read(given, spans)
        ends = [span.first + span.n - 1 for span, one in zip(spans, read) if one.cached == one.prompt_tokens]
        done = [one for one in read if one.cached == one.prompt_tokens]
        if not done:
            return
        self.prefilling = [one for one in self.prefilling if one not in done]
        for sequence in done:
            if self.prefix_cache:
                self.pages.keep(sequence.tokens, sequence.pages)
            self.release_followers(sequence)
        results = self.decode_step.draw(done, hidden[upload(ends, self.device)])
        self.launch(done, results)
        if which := [i for i, one in enumerate(done) if self.goes_on(one)]:
            self.activate(which, done, results[0][:, 0].long())

    def release_followers(self, sequence: Sequence) -> None:
        """The other texts of a request start when their prompt is in the cache."""
        for follower in reversed(self.followers.pop(sequence.request_id, [])):
            self.queue.prepend(follower)

    def activate(self, which: Items[int], done: Items[Sequence], tokens: Tensor) -> None:
        """Give the texts `done[i]` a row each, with the first tokens (len(done),)."""
        at = range(len(self.active), len(self.active) + len(which))
        given = [done[i] for i in which]
        self.active += given
        self.needs = None
        self.rows.prepare(self.current_needs())
        self.rows.fill(at, given, tokens[upload(which, self.host)])
        self.count_steps()

    def current_needs(self) -> Needs:
        if self.needs is None:
            options = [one.request.options for one in self.active]
            top = max(one.request.top_logprobs for one in self.active)
            self.needs = Needs.of(options, self.n_vocab, top, any(one.structure for one in self.active))
        return self.needs

    def decode(self) -> None:
        """Draw the next token of every active text."""
        needs, sequences = self.current_needs(), list(self.active)
        self.rows.prepare(needs)
        if needs.allowed and self.rows.allowed is not None:
            for row, one in enumerate(sequences):
                self.rows.allowed[row] = allowed_tokens(one, self.n_vocab).to(self.host)
        results = self.decode_step(len(sequences), needs, *self.decode_step.attended(sequences))
        for one in sequences:
            one.cached += 1
        self.launch(sequences, results)
        self.steps_left -= 1
        if self.steps_left <= 0:
            self.deactivate({one for one in sequences if not self.goes_on(one)})
            self.count_steps()

    def count_steps(self) -> None:
        """How many steps no active text ends by its length or the model's."""
        self.steps_left = min((one.steps_left(self.longest) for one in self.active), default=0)

    def goes_on(self, sequence: Sequence) -> bool:
        """Whether another token can be drawn from the cache; past the model's length the text slides."""
        if sequence.launched >= sequence.request.max_new_tokens:
            return False
        if sequence.cached < self.longest:
            return True
        self.sliding.append(sequence)
        return False

    def deactivate(self, gone: set[Sequence]) -> None:
        """Take rows away, all at once; those of the other texts become the first ones, in their order."""
        kept = [row for row, one in enumerate(self.active) if one not in gone]
        if len(kept) < len(self.active):
            self.rows.keep(kept, len(self.active))
            self.active, self.needs = [self.active[row] for row in kept], None

    def launch(self, sequences: list[Sequence], results: tuple[Tensor, ...]) -> None:
        """Note that results are on their way to the host."""
        for one in sequences:
            one.launched += 1
        self.pending.append(Launched(sequences, *to_host(results)))

    def collect(self, launched: Launched) -> None:
        """Read results; what was drawn after a text's end is dropped."""
        for sequence, numbers, others in zip(launched.sequences, *launched.read()):
            if not sequence.finished:
                self.take(sequence, numbers, others)
        self.deactivate({one for one in launched.sequences if one.finished})

    def take(self, sequence: Sequence, numbers: Items[float], others: Items[Items[float]]) -> None:
        """The results of a text's next token, and the likeliest tokens."""
        token, logprob, finite, certain = numbers
        drawn = int(token), logprob, bool(finite)
        if not certain and finite:
            self.recomputed += 1
            drawn = self.draw_again(sequence, int(token))
        top = [(int(i), p) for i, p in others[: sequence.request.top_logprobs]] if others else []
        self.accept(sequence, *drawn, top)

    def draw_again(self, sequence: Sequence, token: int) -> tuple[int, float, bool]:
        """Token, log-probability and whether logits are finite, from an uncached forward of the text alone."""
        found, logprob, finite, _ = self.uncached(sequence)[0][0].tolist()
        if found != token and sequence in self.active:
            row = self.active.index(sequence)
            self.rows.replace_token(row, sequence, int(found))
        return int(found), logprob, bool(finite)

    def uncached(self, sequence: Sequence) -> tuple[Tensor, ...]:
        """Results of the next token from an uncached forward of the text's last tokens."""
        idx = torch.tensor([sequence.tokens[-self.longest :]], device=self.device)
        return self.decode_step.draw([sequence], self.model.hidden(idx)[:, -1])

    def slide(self, sequence: Sequence) -> None:
        sequence.launched += 1
        numbers, others = Launched([sequence], *to_host(self.uncached(sequence))).read()
        self.take(sequence, [*numbers[0][:-1], True], others[0])  # certain: nothing else was in the batch

    def accept(
        self, sequence: Sequence, token: int, logprob: float, finite: bool, top: list[tuple[int, float]]
    ) -> None:
        """A token is known: its event, and the text's end where it is one."""
        if not finite:
            self.end(sequence, "error")
            return
        sequence.tokens.append(token)
        self.new_tokens += 1
        if sequence.structure is not None:
            sequence.structure.accept(token)
        request, stream, text = sequence.request, sequence.stream, ""
        reason: FinishReason | None = None
        if token in sequence.ends:
            reason = "stop"
        elif stream is not None:
            text = stream.push(token)
            reason = "stop" if stream.stopped else None
        if reason is None and len(sequence.tokens) - sequence.prompt_tokens >= request.max_new_tokens:
            reason = "length"
        if reason is not None and stream is not None:
            text += stream.finish()
        event = Event(sequence.request_id, sequence.choice, token, logprob, tuple(top), text, reason)
        self.outbox.append(event)
        if reason is not None:
            self.retire(sequence, keep=True)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a text without a token."""
        text = "" if sequence.stream is None else sequence.stream.finish()
        self.outbox.append(Event(sequence.request_id, sequence.choice, text=text, finish_reason=reason))
        self.retire(sequence, keep=False)

    def retire(self, sequence: Sequence, *, keep: bool) -> None:
        """Free a text's pages; `deactivate` takes its row before the next step. What a running step still writes to
        them it writes before anything that is launched later."""
        sequence.finished = True
        for held in (self.prefilling, self.sliding):
            if sequence in held:
                held.remove(sequence)
        self.release_followers(sequence)
        if keep and self.keep_texts:
            self.pages.keep(sequence.tokens[: min(sequence.cached, len(sequence.tokens))], sequence.pages)
        self.pages.release(sequence.pages)
        sequence.pages = []
