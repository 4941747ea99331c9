"""A server in a thread of this process, with a tiny model of bytes: every character beyond ASCII is several tokens."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import torch

import tiny
from regpt.checkpoint.open import OpenModel
from regpt.engine.engine import Engine
from regpt.engine.generate import encode_prompt
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request
from regpt.serve.server import Loaded, Retrieve, make_server, open_socket, url_of
from regpt.serve.worker import Limits
from regpt.text.bpe import byte_tokenizer
from regpt.text.chat import ChatTemplate
from regpt.text.folder import CHAT

TOKENIZER = byte_tokenizer()
CONFIG = replace(tiny.CONFIG, vocab_size=TOKENIZER.n_vocab, max_seq_len=96)
MODEL = tiny.build_model(config=CONFIG, dtype=torch.float32).eval()
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.index > 1 %}{{ raise_exception('system must be first') }}"
    "{% endif %}<|endoftext|>{{ m.role }}:{{ m.content }}\n{% endfor %}<|endoftext|>assistant:"
)
ALL = SamplingOptions(top_k=0)  # the server's defaults


class Serving:
    """A running server.

    Attributes:
        url: without `/v1`.
        engine: of the model `tiny`.
    """

    def __init__(self, models: list[Loaded], limits: Limits, token: str, checkpoints: int, retrieve: Retrieve | None):
        self.bound: socket.socket = open_socket("127.0.0.1", 0)
        self.bound.listen(512)
        self.url, self.engine = url_of(self.bound), models[0].engine
        self.http = httpx.Client(base_url=self.url, timeout=60)
        started = threading.Event()
        self.server = make_server(models, limits, token, started.set, checkpoints, retrieve)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.bound]}, daemon=True)
        self.thread.start()
        assert started.wait(30)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json={"model": "tiny", **body})

    def complete(self, **body: object) -> dict:
        answer = self.post("completions", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, **body: object) -> dict:
        """The error of a request that is answered with 400."""
        answer = self.post(path, **body)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"regpt_{name}"))

    def wait_until_free(self) -> None:
        """Until nothing is written and every page is free; asked for again and again, for ten seconds at most."""
        end = time.monotonic() + 10
        while self.metric("texts_running") + self.metric("texts_waiting") and time.monotonic() < end:
            pass
        assert self.metric("texts_running") + self.metric("texts_waiting") == 0
        assert self.metric("pages_free") == self.metric("pages{")


def loaded(name: str = "tiny", template: str = TEMPLATE, rows: int = 16, opened: OpenModel | None = None) -> Loaded:
    opened = opened or OpenModel(MODEL, TOKENIZER, None, name, companions={CHAT: template} if template else {})
    engine = Engine(opened.model, opened.tokenizer, max_rows=rows)
    return Loaded(name, opened, engine, ChatTemplate(template, opened.tokenizer) if template else None)


@contextlib.contextmanager
def serving(
    models: list[Loaded],
    limits: Limits | None = None,
    token: str = "",
    checkpoints: int = 4,
    retrieve: Retrieve | None = None,
) -> Iterator[Serving]:
    running = Serving(models, limits or Limits(), token, checkpoints, retrieve)
    try:
        yield running
    finally:
        running.http.close()
        running.server.should_exit = True
        running.thread.join(30)
        assert not running.thread.is_alive()
        running.bound.close()


def written(prompt: str | list[int], n: int = 1, **options: object) -> list[list[int]]:
    """The new tokens that generation in this process gives, by an engine for this request alone."""
    ids = encode_prompt(TOKENIZER, prompt) if isinstance(prompt, str) else prompt
    options = {"options": ALL, "stop_ids": TOKENIZER.stop_ids, **options}
    (texts,) = Engine(MODEL, TOKENIZER, max_rows=n, cache_tokens=n * 96).run([Request(ids, n=n, **options)])
    return texts


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode([token for token in tokens if token not in TOKENIZER.stop_ids])
