"""From names of models to a server that listens."""

import contextlib
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn

from regpt.checkpoint.load import CHECKPOINTS
from regpt.checkpoint.open import OpenModel, open_model
from regpt.engine.engine import Engine
from regpt.errors import UsageError, UserError
from regpt.files import exists, is_file, is_folder
from regpt.serve.app import make_app
from regpt.serve.chat import BARE
from regpt.serve.checkpoints import Checkpoints
from regpt.serve.gate import is_local
from regpt.serve.paths import ServedModel
from regpt.serve.worker import Limits, Worker
from regpt.text.certificate import refuse_other_template
from regpt.text.chat import PLAIN, ChatTemplate
from regpt.text.folder import CHAT
from regpt.text.retrieved import Passage
from regpt.train.config import WritingPrecision
from regpt.train.precision import writing

CHECKPOINT_ROWS = 4  # texts of a checkpoint that are written at once: the page's columns
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # unless cache_tokens says otherwise
NAMED_TEMPLATES = {"": "", "plain": PLAIN, "bare": BARE}
NAMED = re.compile(r"([\w.:-]+)=(.+)")
STEP = re.compile(r"step-0*(\d+)")
INTERRUPTED = 130
Retrieve = Callable[[str], list[Passage]]
END_SECONDS = 10.0  # for a step to end


@dataclass(frozen=True)
class Loaded:
    """An opened model under its id, with an engine.

    Attributes:
        run: the folder whose newest checkpoint it is.
        read_checkpoint: id and folder → another one of the run.
    """

    id: str
    opened: OpenModel
    engine: Engine
    chat: ChatTemplate | None
    precision: str = "fp32"
    run: Path | None = None
    read_checkpoint: Callable[[str, Path], "Loaded"] | None = None


def short_id(name: str) -> str:
    """A name for clients: the last part of a path; of a checkpoint the run and the step."""
    path = Path(name)
    if path.parent.name == "checkpoints":
        step = STEP.fullmatch(path.name)
        return f"{path.parents[1].name}:{step[1] if step else path.name}"
    return path.name.removesuffix(".gguf") or path.resolve().name


def named_models(names: Sequence[str]) -> dict[str, str]:
    """Id → name of a model; `ID=MODEL` chooses the id.

    Raises:
        UsageError: two models have the same id.
    """
    found: dict[str, str] = {}
    for name in names:
        given = None if exists(Path(name)) else NAMED.fullmatch(name)
        one, model = (given[1], given[2]) if given else (short_id(name), name)
        if one in found:
            raise UsageError(f"two models are called {one!r}; name them: A={found[one]} B={model}")
        found[one] = model
    return found


def load_model(
    name: str,
    model: str,
    device: torch.device,
    precision: WritingPrecision,
    rows: int,
    cache_tokens: int,
    template: str,
    other_template: bool = False,
    options: Callable[[OpenModel], dict[str, Any]] = lambda opened: {},
) -> Loaded:
    """Open a model and give it an engine; `options`: more of the engine's. A `template` (empty: the model's own) that
    its certificate does not name is refused, unless `other_template` accepts it."""
    opened = open_model(model, device)
    opened.model.eval()
    source = template or opened.companions.get(CHAT, "")
    refuse_other_template(source, opened.companions, other_template)
    chat = ChatTemplate(source, opened.tokenizer) if source else None
    with writing(opened.model, precision, device):
        tokens = cache_tokens or default_cache(opened, rows, device)
        engine = Engine(opened.model, opened.tokenizer, max_rows=rows, cache_tokens=tokens, **options(opened))
    run = Path(model) if is_folder(Path(model) / CHECKPOINTS) else None

    def read_checkpoint(name: str, folder: Path) -> Loaded:
        few = min(rows, CHECKPOINT_ROWS)
        return load_model(name, str(folder), device, precision, few, 0, template, other_template, options)

    return Loaded(name, opened, engine, chat, precision, run, read_checkpoint)


def default_cache(opened: OpenModel, rows: int, device: torch.device) -> int:
    """Positions of the cache: all that `rows` texts may need, as far as they take no more than `CACHE_BYTES`."""
    config = opened.model.config
    each = config.n_layer * 2 * config.n_embd * 4  # at most
    most = max(config.max_seq_len, CACHE_BYTES.get(device.type, 1 << 30) // each)
    return min(rows * config.max_seq_len, most)


def read_template(given: str) -> str:
    """The template that a user names: a file, `plain` as in `regpt finetune`, `bare` or, empty, none."""
    if given in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[given]
    if not is_file(given):
        raise UsageError(f"--chat-template {given!r} is not a file; give one, or plain, or bare")
    try:
        return Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {given!r} is not UTF-8 text; convert it") from None


def check_address(host: str, token: str) -> None:
    if not is_local(host) and not token:
        raise UsageError(
            f"--host {host} can be reached from other machines; protect it with --token TOKEN (or "
            "REGPT_TOKEN), or leave out --host"
        )


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: a port that is taken is known before a model is read.

    Raises:
        UserError: the address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"cannot serve at {host}: {error.strerror or error}; choose another --host") from None
    try:
        if hasattr(signal, "SIGHUP"):  # elsewhere it would share the port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise taken(host, port, error) from None
    return found


def taken(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"cannot serve at port {port} of {host} ({error.strerror or error}); choose another with --port, or "
        "--port 0 for any that is free"
    )


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """The first signal lets streams finish, the second ends at once."""

    app: "Application"

    def handle_exit(self, sig: int, frame: object) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(
    models: Sequence[Loaded],
    bound: socket.socket,
    limits: Limits,
    token: str,
    ready: Callable[[], object],
    checkpoints: int,
    retrieve: Retrieve | None = None,
) -> int:
    """Answer requests until a signal comes; the exit code."""
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(2048)
    except OSError as error:
        raise taken(host, port, error) from None
    server = make_server(models, limits, token, ready, checkpoints, retrieve)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bound])
    for worker in server.app.all_workers():  # Python must not end in the middle of a step: C++ would abort
        worker.close()
        worker.thread.join(END_SECONDS)
    return INTERRUPTED if server.force_exit else 0


def make_server(
    models: Sequence[Loaded],
    limits: Limits,
    token: str,
    ready: Callable[[], object] = lambda: None,
    checkpoints: int = 4,
    retrieve: Retrieve | None = None,
) -> Server:
    """A server whose workers live as long as its event loop, with so many `checkpoints` in memory at most; `retrieve`
    gives passages for the questions of chats."""
    app = Application(models, limits, token, ready, checkpoints, retrieve)
    config = uvicorn.Config(
        app, lifespan="on", log_config=None, access_log=False, server_header=False, date_header=False, ws="none"
    )
    server = Server(config)
    server.app = app
    return server


class Application:
    """Builds the application inside the event loop, where the workers need it; ASGI's lifespan."""

    def __init__(
        self,
        models: Sequence[Loaded],
        limits: Limits,
        token: str,
        ready: Callable[[], object],
        checkpoints: int,
        retrieve: Retrieve | None,
    ):
        self.models, self.limits, self.token, self.ready = models, limits, token, ready
        self.gate, self.retrieve = None, retrieve
        self.workers = list[Worker]()
        runs = {one.id: one.run for one in models if one.run}
        self.checkpoints = Checkpoints(runs, self.read_checkpoint, checkpoints)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "lifespan":
            assert self.gate is not None
            await self.gate(scope, receive, send)
            return
        await receive()
        served = [self.served(one) for one in self.models]
        self.workers = [one.worker for one in served]
        self.gate = make_app(served, self.limits, self.token, self.checkpoints)
        await send({"type": "lifespan.startup.complete"})
        self.ready()
        await receive()
        for worker in self.all_workers():
            worker.close()
        await send({"type": "lifespan.shutdown.complete"})

    def all_workers(self) -> list[Worker]:
        return [*self.workers, *(one.worker for one in self.checkpoints.held.values())]

    def served(self, one: Loaded) -> ServedModel:
        worker = Worker(one.engine, self.limits)
        tokenizer = one.opened.tokenizer
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab))
        sizes = one.engine.longest, one.chat, int(time.time()), max(longest, 1)
        return ServedModel(one.id, worker, one.opened, one.precision, *sizes, self.retrieve)

    def read_checkpoint(self, id: str, name: str, folder: Path) -> Callable[[], ServedModel]:
        parent = next(one for one in self.models if one.id == id)
        assert parent.read_checkpoint is not None
        loaded = parent.read_checkpoint(name, folder)
        return lambda: self.served(loaded)
