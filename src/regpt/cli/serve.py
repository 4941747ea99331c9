"""`regpt serve`: models behind OpenAI's interface."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.chat import check_draft_flags, open_draft
from regpt.cli.parse import parse
from regpt.console.lines import print_line
from regpt.errors import UsageError, UserError
from regpt.ranges import LONG, MANY, Range
from regpt.train.config import WritingPrecision

if TYPE_CHECKING:
    from regpt.checkpoint.open import OpenModel
    from regpt.text.retrieved import Passage

PACKAGES = ("fastapi", "uvicorn")


@dataclass(frozen=True)
class ServeArgs:
    """Answer OpenAI's clients with models, /v1/completions, /v1/chat/completions and /v1/models, to this machine unless
    --host says otherwise. SIGTERM or Ctrl-C finishes what is written and ends; twice, it ends at once."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Runs, checkpoints, addresses, Hugging Face folders, GGUF files or hub names; ID=MODEL chooses the id that clients
    use, default: the last part of the name."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines can reach needs --token."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """0: any that is free."""
    token: str = ""
    """What clients send as their API key; better in the environment variable REGPT_TOKEN, which other users of the
    machine cannot read."""
    chat_template: Annotated[str, tyro.conf.arg(metavar="FILE|plain|bare")] = ""
    """Jinja template of conversations, instead of the models' own; plain: roles as words, as in regpt finetune; bare:
    the messages one after another, which a base model continues as text."""
    other_template: bool = False
    """Serve a model that was trained on conversations with another template than its certificate names."""
    retrieve: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """In chats put the passages of these documents (whatever regpt data prepare reads) that BM25 finds before the last
    message; answers say where they are from."""
    passages: Annotated[int, Range(1, 100)] = 3
    """How many at most, and together half of what the model reads."""
    rows: Annotated[int, Range(1, 4096)] = 64
    """Texts of a model that are written at once."""
    cache_tokens: Annotated[int, Range(0, MANY)] = 0
    """Positions that the cache of a model holds; 0: what the rows may need, up to 1 GiB (CUDA: 8 GiB)."""
    queue: Annotated[int, Range(0, 1 << 20)] = 256
    """Texts that may wait; more are answered with 429."""
    checkpoints: Annotated[int, Range(0, 4096)] = 4
    """Checkpoints of runs that are held in memory at most, opened when a client asks for ID:STEP; 0: none."""
    max_texts: Annotated[int, Range(1, 1 << 16)] = 64
    """Texts of one request: prompts × n."""
    max_body_mib: Annotated[float, Range(0, 4096, above=True)] = 4.0
    """The largest body of a request."""
    max_seconds: Annotated[float, Range(0, LONG, above=True)] = 600.0
    """After which a request is ended with an error."""
    draft: Annotated[str, tyro.conf.arg(metavar="MODEL|ngram")] = ""
    """What proposes several tokens a step of each text, as in regpt sample: the texts stay the same. For few clients:
    every proposal is computed, drawn or not."""
    draft_tokens: Annotated[int, Range(1, 64)] = 4
    """Tokens proposed a step at most."""
    kv_cache: Literal["", "fp8"] = ""
    """fp8: keep keys and values in 8 bits; default: in the format of the computation."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: WritingPrecision = "fp32"
    """Number format of the computation; int8: weights in 8.5 bits, products in fp32 on a CPU and in bf16 on
    CUDA; bf16-invariant: on CUDA, bf16 in which no text depends on the others of its batch."""


def main(args: list[str]) -> int:
    given = parse(ServeArgs, args, prog="regpt serve")
    if not given.models:
        raise UsageError("MODEL is missing; regpt serve --help shows what it takes")
    token = given.token or os.environ.get("REGPT_TOKEN", "")
    try:
        from regpt.serve.server import (
            Limits,
            check_address,
            load_model,
            named_models,
            open_socket,
            read_template,
            serve,
            url_of,
        )
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise UserError(f"{error.name} is not installed; install it with: pip install 'regpt[serve]'") from None
    from regpt.parallel.mesh import choose_device
    from regpt.prepare.passages import PassageIndex
    from regpt.train.precision import check_precision, set_matmul_precision

    check_draft_flags(given.draft, given.draft_tokens)
    check_address(given.host, token)
    names, template = named_models(given.models), read_template(given.chat_template)
    index = PassageIndex(given.retrieve) if given.retrieve else None
    with open_socket(given.host, given.port) as bound:
        device = choose_device(given.device)
        check_precision(given.precision, device)
        set_matmul_precision(given.precision)
        settings = device, given.precision, given.rows, given.cache_tokens, template, given.other_template
        how = {"draft_tokens": given.draft_tokens, "narrow_cache": given.kv_cache == "fp8"}

        def options(opened: "OpenModel") -> dict[str, Any]:
            return {"draft": open_draft(given.draft, opened, given.precision), **how}

        models = [load_model(one, name, *settings, options) for one, name in names.items()]
        limits = Limits(int(given.max_body_mib * (1 << 20)), given.max_texts, given.queue, given.max_seconds)

        def retrieve(question: str) -> "list[Passage]":
            return index.search(question, given.passages)[0] if index else []

        def ready() -> None:
            key = "$REGPT_TOKEN" if token else "none"
            print_line(f"serving {', '.join(names)} on {device}, {given.precision}; Ctrl-C ends after what is written")
            print_line(f"export OPENAI_BASE_URL={url_of(bound)}/v1 OPENAI_API_KEY={key}")
            print_line(f"page: {url_of(bound)}/")
            if index:
                print_line(f"chats read {index.sentence()}")

        return serve(models, bound, limits, token, ready, given.checkpoints, retrieve if index else None)
