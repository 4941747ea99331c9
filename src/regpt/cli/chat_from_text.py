"""`regpt chat-from-text`: a folder of texts to a model that answers, and its page."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt.cli.data_prepare import TextFlags, as_meant, download_folder
from regpt.cli.parse import parse
from regpt.errors import UsageError
from regpt.prepare.settings import TEXT_OPTIONS
from regpt.ranges import LONG, MANY, Range

HERE = "127.0.0.1"


@dataclass(frozen=True)
class ChatFromTextArgs:
    """From texts to a model that answers: a tokenizer, a base model, conversations, preferences where there are pairs,
    then a page to talk with it. The plan with its times comes first. Stopped at any moment, the same command goes on;
    every stage in OUT is an ordinary tokenizer, folder of shards or run."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = ""
    """Texts, as regpt data prepare reads them; tables of conversations and pairs among them have their columns."""
    out: str = ""
    """Folder for everything; default: runs/chat-FOLDER."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """More conversations, as regpt finetune reads them; repeat it for several files."""
    pairs: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Preferences (columns chosen and rejected), learned last."""
    size: Literal["auto", "tiny", "124m"] = "auto"
    """tiny: a million parameters, for any device; 124m: GPT-2's, for a GPU; auto: 124m on a GPU with 10 MB of text."""
    minutes: Annotated[float, Range(0, LONG)] = 0.0
    """Time for everything; 0: 5, of 124m 10."""
    vocab_size: Annotated[int, Range(0, MANY)] = 0
    """Tokens of the vocabulary; 0: 2,048, of 124m 32,768."""
    no_serve: tyro.conf.FlagCreatePairsOff[bool] = False
    """End with a sample conversation, without the page."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Of the page; 0: any that is free."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    text: TextFlags = TEXT_OPTIONS


def main(args: list[str]) -> int:
    given = parse(ChatFromTextArgs, args, prog="regpt chat-from-text")
    if not given.folder:
        raise UsageError("FOLDER is missing; regpt chat-from-text FOLDER, a folder of texts")
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    served = not (given.no_serve or missing)
    page = (f"http://{HERE}:{given.port}/" if given.port else "at a free port") if served else "none"
    if missing and not given.no_serve:
        page = f"none: {missing[0]} is not installed; install it with: pip install 'regpt[serve]'"
    if served:
        from regpt.serve.server import open_socket

        with open_socket(HERE, given.port):  # refused now, not after minutes
            pass
    from regpt.cli import serve
    from regpt.remote.download import RemoteOptions
    from regpt.runs.chat_from_text import chat_from_text
    from regpt.runs.chat_plan import BASE, ChatFromTextRequest

    out = Path(given.out or f"runs/chat-{Path(given.folder).resolve().name}")
    flags = given.data, given.pairs, given.size, given.minutes, given.vocab_size, given.device, as_meant(given.text)
    asked = ChatFromTextRequest(given.folder, out, *flags, RemoteOptions(download_folder()))
    code, model = chat_from_text(asked, page, ["regpt", "chat-from-text", *args])
    if code or not served:
        return code
    return serve.main([str(model), str(out / BASE), "--port", str(given.port), "--device", given.device])
