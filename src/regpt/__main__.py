"""`regpt COMMAND …`: find the command, run it, turn errors into one sentence and an exit code."""

import atexit
import errno
import faulthandler
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import regpt
from regpt.errors import UsageError, UserError, nearest
from regpt.parallel.signals import leave_when_terminated

COMMANDS = {
    "quickstart": "text to a trained, evaluated and sampled model on this machine, in about two minutes",
    "data": "prepare, describe and verify token shards",
    "tokenizer": "train a byte-level BPE",
    "doctor": "what this machine can do, tried; what is missing and how to get it",
    "plan": "parameters, memory, time and cost of a run, before it runs",
    "train": "train a model from a recipe, or go on with a run",
    "eval": "validation loss, HellaSwag, CORE and other tasks of a model",
    "checkpoint": "list the checkpoints of a run; check every file of them",
    "replay": "one step of a run once more: its loss, norm and documents",
    "verify-resume": "a run that is killed again and again against one that is not, and a certificate",
    "sample": "write text with a model",
    "export": "write a model as a Hugging Face folder",
    "report": "a run, or several over each other, as one self-contained page",
    "diff": "two runs against each other: what differs, and whether it matters",
    "scaling": "a power law through the losses of runs, and what it predicts",
    "inspect": "a model's parameters, pictures of its weights, tokens nearest to a token",
    "bench": "how fast training, batches and sampling are on this machine",
}
INTERRUPTED = 130
PLACES = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)
kept: list[Exception] = []  # with the tensors of their frames; see `leave_memory`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. `--debug` shows the traceback of an unexpected error."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if argv is None and args[:1] == ["train"]:
        leave_when_terminated()  # before what takes seconds to import
        if sys.__stderr__ is not None:
            faulthandler.enable()  # a crash in native code (a shard cut in the middle of a read) names its line
    try:
        return dispatch(args)
    except UserError as error:
        print(f"regpt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("regpt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_has_no_reader():  # `regpt … | head`
            sys.stderr.close()
            return 1
        if debug:
            raise
        if said := unusable_place(error):
            print(f"regpt: {said}", file=sys.stderr)
            return 1
        print(f"regpt: {type(error).__name__}: {first_line(error)}; traceback in {write_traceback()}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
        if argv is None and device_is_lost(error):
            leave_memory(error, code)
        return code


def dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(regpt.__version__)
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise UsageError(f"no command is called {name!r}{nearest(name, COMMANDS)}; choose from {', '.join(COMMANDS)}")
    return import_module(f"regpt.cli.{name.replace('-', '_')}").main(rest)


def usage() -> str:
    lines = [f"  regpt {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["regpt: train GPTs from scratch", "", *lines, "", "regpt COMMAND --help shows what a command takes."]
    )


def output_has_no_reader() -> bool:
    """Whether stdout or stderr is a pipe whose other end was closed: a broken pipe may be another one."""
    if not hasattr(select, "poll"):  # on Windows nothing tells
        return True
    poll = select.poll()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            poll.register(stream.fileno(), 0)  # errors are told whatever is asked for
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def unusable_place(error: Exception) -> str | None:
    """One sentence about an error that only another file, folder or disk can mend; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in PLACES:
        return None
    where = f" {error.filename!r}" if error.filename else ""
    return (
        f"cannot use the place{where} ({error.strerror}); give another name or folder, or mend its disk or permissions"
    )


def device_is_lost(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


def leave_memory(error: Exception, code: int) -> None:
    """End with `code` when the interpreter is about to end, and free nothing until then: to free what belongs to a GPU
    that has failed fails once more, in C++, and aborts the process."""

    def leave() -> None:
        sys.stdout.flush()
        os._exit(code)

    kept.append(error)
    atexit.register(leave)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def write_traceback() -> Path:
    """The current traceback in a new temporary file."""
    with tempfile.NamedTemporaryFile("w", prefix="regpt-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return Path(file.name)


if __name__ == "__main__":
    sys.exit(main())
