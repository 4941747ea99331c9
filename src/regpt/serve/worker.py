"""One thread an engine; jobs of asyncio go in, batches of its events come out."""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from regpt.engine.engine import Engine
from regpt.engine.request import Event, Request, Stats, check_request
from regpt.errors import UserError, first_line
from regpt.serve.fields import ApiError

Result = TypeVar("Result")
NOT_FINITE = "the model's logits are not finite: its weights are damaged, or the precision has too small a range"
SEND_SECONDS = 0.001  # twenty times what an event of a stream costs the event loop: a system call, and Python around it
MOST_SECONDS = 0.1  # ten events a second are still read as writing
TURN_SECONDS = 0.01  # that a step waits for the event loop at most; it needs 2 ms for 64 streams
FEW = 8  # jobs, up to which each token is sent as it is drawn
ROWS = 128  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 4 << 20
    texts: int = 64  # of one request: prompts × n
    queue: int = 256  # texts that wait, of all requests
    seconds: float = 600.0  # until a request is ended


class Scored(NamedTuple):
    """Log-probability of a token of a prompt, None for the first, and the likeliest alternatives."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class PromptScores(NamedTuple):
    prompt: int
    entries: list[Scored]


Item = Event | PromptScores | ApiError


class TextJob:
    """The texts of one HTTP request: those of prompt i have the indices i·n to i·n + n - 1.

    Args:
        top: report log-probabilities of the prompts, with so many alternatives.
        generate: else only the prompts are read.
    """

    def __init__(self, requests: Sequence[Request], top: int | None = None, generate: bool = True):
        self.requests, self.top, self.generate = list(requests), top, generate
        self.n = requests[0].n
        self.open = self.texts = len(requests) * self.n
        self.numbers: dict[int, int] = {}  # of the engine → prompt
        self.streams = False  # else nobody reads before the end
        self.unsent, self.due = list[tuple[int, Item]](), 0.0  # of the engine's thread: events, and when they are sent
        self.items = list[tuple[int, Item]]()  # that the event loop has and nobody has taken
        self.more: asyncio.Future[None] | None = None  # somebody waits for them
        self.cancelled = False
        self.began = time.perf_counter()
        self.first_token_s: float | None = None

    def put(self, items: Sequence[tuple[int, Item]]) -> None:
        """From the event loop's thread."""
        self.items += items
        if self.more is not None and not self.more.done():
            self.more.set_result(None)

    async def batches(self, seconds: float) -> AsyncIterator[list[tuple[int, Item]]]:
        """What the engine wrote since the last batch, until every text has ended.

        Raises:
            ApiError: the engine failed, the logits are not finite, or `seconds` have passed.
        """
        loop = asyncio.get_running_loop()
        end = loop.call_later(seconds, lambda: self.put([(0, too_slow(seconds))]))
        try:
            while self.open:
                if not self.items:
                    self.more = loop.create_future()
                    await self.more
                batch, self.items = self.items, []
                for _, item in batch:
                    if isinstance(item, ApiError):
                        raise item
                    if isinstance(item, Event) and item.finish_reason is not None:
                        self.open -= 1
                        if item.finish_reason == "error":
                            raise ApiError(NOT_FINITE, status=500)
                yield batch
        finally:
            end.cancel()


def too_slow(seconds: float) -> ApiError:
    message = f"the request took longer than {seconds:g} s, the most that is allowed; ask for fewer tokens"
    return ApiError(message, status=504, code="timeout", headers={"x-should-retry": "false"})


class Worker:
    """Runs an engine in a thread of its own. Methods are for the thread of the event loop."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self.inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.jobs: dict[int, tuple[TextJob, int]] = {}  # of the thread: number of the engine → job, prompt
        self.taken = threading.Event()  # set when the event loop has written what it was handed
        self.unsent: dict[TextJob, None] = {}  # of the thread: jobs with events that wait
        self.open_texts = self.cancelled_texts = 0
        self.failure: str | None = None
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    # ---- from the event loop -----------------------------------------------------------------------------------------

    def submit(self, job: TextJob) -> None:
        """Queue a job; its first batch may be there at once.

        Raises:
            ApiError: 400 for what this model cannot write, 429 where the queue is full, 503 where the engine failed.
        """
        self.check_runs()
        room = self.engine.pages.n_pages * self.engine.pages.page_size
        for request in job.requests if job.generate else []:
            try:
                check_request(request, self.engine.longest, self.engine.n_vocab, room, texts=True)
            except UserError as error:
                raise ApiError(str(error), code="invalid_value") from None
        self.reserve(job.texts)
        self.inbox.put(lambda: self.start(job))

    def check_runs(self) -> None:
        if self.failure:
            raise ApiError(self.failure, status=503, code="engine_failed")
        if self.closed:  # a checkpoint, between finding and asking it
            message = "the model has just made room for another one; try again"
            raise ApiError(message, status=503, code="model_closed", headers={"Retry-After": "1"})

    def reserve(self, texts: int) -> None:
        most = self.engine.max_rows + self.limits.queue
        if texts > most:
            message = f"the request asks for {texts} texts, this server takes {most} at once; divide it"
            raise ApiError(message, code="invalid_value")
        if self.open_texts + texts > most:
            message = f"{self.open_texts} texts are written or wait, {texts} more would exceed {most}; try again"
            raise ApiError(message, status=429, code="queue_full", headers={"Retry-After": "1"})
        self.open_texts += texts

    async def ask(self, function: Callable[[Engine], Result]) -> Result:
        """What `function` finds, called between two steps; it counts as a text.

        Raises:
            ApiError: as in `submit`, or 504 after the time that a request may take.
        """
        self.check_runs()
        self.reserve(1)

        def guarded() -> Result | ApiError:
            try:
                return function(self.engine)
            except Exception as error:  # of memory: this question alone is lost
                return ApiError(f"{type(error).__name__}: {first_line(error)}", status=500)

        try:
            async with asyncio.timeout(self.limits.seconds):
                found = await self.call(guarded)
            if isinstance(found, ApiError):
                raise found
            return found
        except TimeoutError:
            raise ApiError(f"no answer within {self.limits.seconds:g} s", status=504, code="timeout") from None
        finally:
            self.open_texts -= 1

    def release(self, job: TextJob) -> None:
        """The job's client has its answer or is gone: what is still written is cancelled before the next step."""
        self.open_texts -= job.texts
        if job.open:
            self.cancelled_texts += job.open
            job.cancelled = True
            self.inbox.put(lambda: self.cancel(job))

    async def stats(self) -> Stats:
        return await self.call(self.engine.stats)

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, called in the engine's thread."""
        found: asyncio.Future[Any] = self.loop.create_future()

        def answer() -> None:
            result = function()
            self.tell(lambda: None if found.done() else found.set_result(result))

        self.inbox.put(answer)
        return await found

    def close(self) -> None:
        self.closed = True
        self.inbox.put(lambda: None)

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self.closed:
            try:
                self.act()
                if self.engine.busy:
                    self.deliver(self.engine.step())
            except Exception as error:  # of CUDA, of memory: every client is told, and no request is taken any more
                self.fail(f"the engine failed ({type(error).__name__}: {first_line(error)}); start the server again")

    def act(self) -> None:
        """Do what the event loop asked for; wait for it where there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            self.inbox.get(block=not self.engine.busy)()
            while not self.closed:
                self.inbox.get_nowait()()

    def start(self, job: TextJob) -> None:
        if job.cancelled:
            return
        if job.top is not None:
            scored = [score_prompt(self.engine, request.prompt, job.top) for request in job.requests]
            if any(entry.logprob != entry.logprob for entries in scored for entry in entries):
                self.post(job, [(0, ApiError(NOT_FINITE, status=500))])
                return
            self.post(job, [(i * job.n, PromptScores(i, entries)) for i, entries in enumerate(scored)])
        if not job.generate:
            self.post(job, [(i, Event(0, i, finish_reason="length")) for i in range(job.texts)])
            return
        for i, request in enumerate(job.requests):
            number = self.engine.submit(request)
            self.jobs[number] = job, i
            job.numbers[number] = job.n

    def cancel(self, job: TextJob) -> None:
        for number in job.numbers:
            self.engine.cancel(number)

    def deliver(self, events: list[Event]) -> None:
        """Hand events over: the first of a job and the last of a text at once, the others of a stream after a pause of
        `SEND_SECONDS` a job, so that the event loop needs a twentieth of a core for them however fast the engine is."""
        now = time.perf_counter()
        for event in events:
            job, prompt = self.jobs[event.request]
            job.unsent.append((prompt * job.n + event.choice, event))
            self.unsent[job] = None
            if event.finish_reason is not None:
                job.due = 0.0
                job.numbers[event.request] -= 1
                if not job.numbers[event.request]:
                    del job.numbers[event.request], self.jobs[event.request]
        pause = min(SEND_SECONDS * len(self.jobs), MOST_SECONDS) if len(self.jobs) > FEW else 0.0
        batches = [(job, job.unsent) for job in self.unsent if now >= job.due]
        for job, _ in batches:
            job.unsent, job.due = [], now + pause if job.streams else math.inf
            del self.unsent[job]
        if not batches:
            return
        self.taken.clear()
        self.tell(lambda: self.put_all(batches))
        if len(batches) > FEW:  # both threads at once would wait for Python's lock more often than they work
            self.taken.wait(TURN_SECONDS)

    def put_all(self, batches: list[tuple[TextJob, list[tuple[int, Item]]]]) -> None:
        """From the event loop's thread: wake those who read; after them, the engine's thread."""
        for job, batch in batches:
            job.put(batch)
        self.loop.call_soon(self.loop.call_soon, self.taken.set)

    def post(self, job: TextJob, items: list[tuple[int, Item]]) -> None:
        self.tell(lambda: job.put(items))

    def tell(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(action)

    def fail(self, sentence: str) -> None:
        self.failure = sentence
        for job in dict.fromkeys(job for job, _ in self.jobs.values()):
            self.post(job, [(0, ApiError(sentence, status=500, code="engine_failed"))])
        self.closed = True


def score_prompt(engine: Engine, prompt: Sequence[int], top: int) -> list[Scored]:
    """Log-probabilities of a prompt's tokens after those before them, by an uncached forward of the prompt alone: they
    do not depend on what else is written."""
    ids = torch.tensor([list(prompt)], device=engine.device)
    entries = [Scored(int(prompt[0]), None)]
    with engine.computing():
        hidden = engine.model.hidden(ids)[0, :-1]  # (T - 1, C)
        for rows, targets in zip(hidden.split(ROWS), ids[0, 1:].split(ROWS)):
            logprobs = engine.model.logits(rows).float().log_softmax(dim=-1)  # (rows, V)
            found = logprobs.gather(-1, targets[:, None])[:, 0].tolist()
            values, tokens = (part.tolist() for part in logprobs.topk(min(top, engine.n_vocab), dim=-1))
            entries += map(Scored, targets.tolist(), found, (tuple(zip(*pair)) for pair in zip(tokens, values)))
    return entries
