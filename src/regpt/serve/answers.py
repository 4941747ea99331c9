"""Events → OpenAI's objects: a shape for each path, whole or in chunks."""

import codecs
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Protocol

from regpt.engine.receipt import Origin, Receipt
from regpt.engine.request import Event
from regpt.serve.worker import PromptScores, Scored, TextJob
from regpt.text.retrieved import Passage
from regpt.text.tokenizer import Tokenizer, with_bytes

Json = dict[str, Any]
HERE = "\ue000 a piece of text"
LOWEST = -9999.0  # what OpenAI reports for a probability of zero; JSON has no infinity


@dataclass
class TextSoFar:
    """One text so far."""

    index: int
    text: str = ""
    entries: list[Scored] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None


def event_text(chunk: Json | str) -> str:
    """One server-sent event; those of `/v1/responses` have a name."""
    if isinstance(chunk, str):
        return f"data: {chunk}\n\n"
    name = f"event: {chunk['type']}\n" if "sequence_number" in chunk else ""
    return f"{name}data: {json.dumps(chunk, ensure_ascii=False, allow_nan=False)}\n\n"


class AnswerShape(Protocol):
    """How a path writes its answer.

    Attributes:
        repeats: whether chunks of text alone differ in the text alone.
    """

    repeats: bool
    kind: str
    prefix: str
    ending: tuple[str, ...]

    def opening(self, answer: "Answer") -> Iterator[Json]:
        """Chunks before any token."""
        ...

    def chunk(self, answer: "Answer", piece: TextSoFar) -> Iterator[Json]:
        """Chunks for what a text has gained."""
        ...

    def closing(self, answer: "Answer") -> Iterator[Json]:
        """Chunks after the last token, before `[DONE]`."""
        ...

    def whole(self, answer: "Answer") -> Json: ...


class Answer:
    """The answer to one request while it is written.

    Args:
        logprobs: alternatives reported for each token; None reports nothing.
        echoes: texts of the prompts that the answer repeats; empty where it does not.
        origin: for a receipt, where one is asked for.
        structure: as in `Receipt.of`.
        sources: the passages in the prompt, where the server retrieves.
    """

    def __init__(
        self,
        job: TextJob,
        tokenizer: Tokenizer,
        shape: AnswerShape,
        model: str,
        logprobs: int | None = None,
        echoes: Sequence[str] = (),
        usage: bool = False,
        origin: Origin | None = None,
        structure: Mapping[str, str] | None = None,
        sources: Sequence[Passage] | None = None,
    ):
        self.job, self.tokenizer, self.shape, self.model = job, tokenizer, shape, model
        self.logprobs, self.echoes, self.usage = logprobs, list(echoes), usage
        self.origin, self.structure, self.sources = origin, structure, sources
        self.id, self.created = f"{shape.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.texts = [TextSoFar(i, self.echoes[i // job.n] if echoes else "") for i in range(job.texts)]
        self.seed = job.requests[0].seed
        self.around: dict[int, list[str]] = {}  # text → what stands before and after its pieces in an event

    def add(self, batch: Sequence[tuple[int, Any]]) -> list[TextSoFar]:
        """Take in a batch; what each text has gained, texts in order."""
        gained: dict[int, TextSoFar] = {}
        for index, item in batch:
            if isinstance(item, PromptScores):
                for i in range(index, index + self.job.n):
                    gained.setdefault(i, TextSoFar(i)).entries += item.entries
                continue
            assert isinstance(item, Event)
            piece = gained.setdefault(index, TextSoFar(index))
            piece.text += item.text
            piece.reason = item.finish_reason
            if item.token is not None:
                piece.tokens.append(item.token)
                if self.logprobs is not None and item.logprob is not None:
                    piece.entries.append(Scored(item.token, item.logprob, item.top))
        for i, piece in gained.items():
            text = self.texts[i]
            text.text += piece.text
            text.entries += piece.entries
            text.tokens += piece.tokens
            text.reason = piece.reason or text.reason
        return [gained[i] for i in sorted(gained)]

    def events(self, piece: TextSoFar) -> str:
        """Server-sent events for what a text has gained. One of text alone, which most are, is filled in."""
        if piece.reason or piece.entries or not piece.text or not self.shape.repeats or self.echoes:
            return "".join(map(event_text, self.shape.chunk(self, piece)))
        if piece.index not in self.around:
            (chunk,) = self.shape.chunk(self, TextSoFar(piece.index, HERE))
            self.around[piece.index] = event_text(chunk).split(encode_basestring(HERE))
        before, after = self.around[piece.index]
        return f"{before}{encode_basestring(piece.text)}{after}"

    def counts(self) -> tuple[int, int]:
        """Tokens of the prompts, and new ones."""
        return sum(len(one.prompt) for one in self.job.requests), sum(len(text.tokens) for text in self.texts)

    def usage_object(self) -> Json:
        prompt, new = self.counts()
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def frame(self, kind: str, choices: list[Json], **rest: Any) -> Json:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices, **rest}

    def chunk_frame(self, choices: list[Json]) -> Json:
        """With `usage: null` where the last chunk will have it, as OpenAI does."""
        return self.frame(self.shape.kind, choices, **({"usage": None} if self.usage else {}))

    def last_chunk(self) -> Iterator[Json]:
        """Usage and receipt, where they are asked for."""
        if self.usage or self.origin:
            usage = {"usage": self.usage_object()} if self.usage else {}
            yield self.frame(self.shape.kind, [], **usage, **({"regpt": self.extras()} if self.origin else {}))

    def extras(self) -> Json:
        """What no interface of OpenAI has: the seed, sources, and a receipt where one is asked for."""
        found = {"seed": self.seed} | self.cited()
        if self.origin is None:
            return found
        receipt = Receipt.of(self.origin, self.job.requests, [text.tokens for text in self.texts], self.structure)
        return found | {"receipt": receipt.to_json()}

    def cited(self) -> Json:
        """The passages in the prompt, in their order, where the server retrieves."""
        return {} if self.sources is None else {"sources": [one._asdict() for one in self.sources]}

    # ---- log-probabilities -------------------------------------------------------------------------------------------

    def name(self, token: int) -> str:
        """A token as text; the bytes of a part of a character as `\\xe3`."""
        return with_bytes(self.tokenizer.token_bytes(token))

    def entry(self, token: int, logprob: float | None) -> Json:
        data = list(self.tokenizer.token_bytes(token))
        return {"token": self.name(token), "token_id": token, "logprob": bounded(logprob), "bytes": data}

    def chat_logprobs(self, entries: Sequence[Scored]) -> Json | None:
        if self.logprobs is None:
            return None
        content = [
            self.entry(one.token, one.logprob) | {"top_logprobs": [self.entry(*other) for other in one.top]}
            for one in entries
        ]
        return {"content": content, "refusal": None}

    def completion_logprobs(self, entries: Sequence[Scored], offset: int) -> Json | None:
        """The legacy arrays, and two more: ids and bytes of the tokens."""
        if self.logprobs is None:
            return None
        decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), list[int]()
        for one in entries:
            offsets.append(offset)
            offset += len(decoder.decode(self.tokenizer.token_bytes(one.token)))
        return {
            "tokens": [self.name(one.token) for one in entries],
            "token_logprobs": [bounded(one.logprob) for one in entries],
            "top_logprobs": [self.alternatives(one) for one in entries],
            "text_offset": offsets,
            "token_ids": [one.token for one in entries],
            "bytes": [list(self.tokenizer.token_bytes(one.token)) for one in entries],
        }

    def alternatives(self, entry: Scored) -> dict[str, float | None] | None:
        """Name → log-probability, the token itself included, as OpenAI does; of equal names the likeliest."""
        if entry.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
            found.setdefault(self.name(token), bounded(logprob))
        return found


def bounded(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)


class CompletionShape:
    """`/v1/completions`."""

    repeats, kind, prefix = True, "text_completion", "cmpl"
    ending: tuple[str, ...] = ("[DONE]",)

    def choice(self, answer: Answer, text: TextSoFar, offset: int = 0) -> Json:
        logprobs = answer.completion_logprobs(text.entries, offset)
        return {"text": text.text, "index": text.index, "logprobs": logprobs, "finish_reason": text.reason}

    def opening(self, answer: Answer) -> Iterator[Json]:
        if answer.echoes and answer.job.top is None:
            for text in answer.texts:
                yield answer.chunk_frame([self.choice(answer, TextSoFar(text.index, text.text))])

    def chunk(self, answer: Answer, piece: TextSoFar) -> Iterator[Json]:
        if (
            answer.echoes
            and answer.job.top is not None
            and len(answer.texts[piece.index].entries) == len(piece.entries)
        ):
            piece.text = answer.echoes[piece.index // answer.job.n] + piece.text  # with its log-probabilities
        if piece.text or piece.reason or (answer.logprobs is not None and piece.entries):
            offset = len(answer.texts[piece.index].text) - len(piece.text)
            yield answer.chunk_frame([self.choice(answer, piece, offset)])

    def closing(self, answer: Answer) -> Iterator[Json]:
        return answer.last_chunk()

    def whole(self, answer: Answer) -> Json:
        choices = [self.choice(answer, text) for text in answer.texts]
        return answer.frame(self.kind, choices, usage=answer.usage_object(), regpt=answer.extras())


class ChatShape:
    """`/v1/chat/completions`."""

    repeats, kind, prefix = True, "chat.completion.chunk", "chatcmpl"
    ending: tuple[str, ...] = ("[DONE]",)

    def part(self, answer: Answer, index: int, delta: Json, entries: Sequence[Scored] = (), reason: str | None = None):
        logprobs = answer.chat_logprobs(entries) if entries else None
        return answer.chunk_frame([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def opening(self, answer: Answer) -> Iterator[Json]:
        for text in answer.texts:
            begin = self.part(answer, text.index, {"role": "assistant", "content": ""})
            yield begin | ({"regpt": answer.cited()} if answer.sources is not None else {})

    def chunk(self, answer: Answer, piece: TextSoFar) -> Iterator[Json]:
        if piece.text or (answer.logprobs is not None and piece.entries):
            yield self.part(answer, piece.index, {"content": piece.text}, piece.entries)
        if piece.reason:
            yield self.part(answer, piece.index, {}, reason=piece.reason)

    def closing(self, answer: Answer) -> Iterator[Json]:
        return answer.last_chunk()

    def whole(self, answer: Answer) -> Json:
        choices = [
            {
                "index": text.index,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": answer.chat_logprobs(text.entries),
                "finish_reason": text.reason,
            }
            for text in answer.texts
        ]
        return answer.frame("chat.completion", choices, usage=answer.usage_object(), regpt=answer.extras())
