"""`regpt COMMAND …`: find the command, run it, turn errors into one sentence and an exit code."""

import atexit
import errno
import faulthandler
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import TracebackType

import regpt
from regpt.cli.commands import COMMANDS
from regpt.cli.threads import spin_briefly
from regpt.console.lines import print_error, print_line, print_note
from regpt.console.streams import harden, lost_text
from regpt.errors import UsageError, UserError, first_line, nearest
from regpt.parallel.signals import leave_when_terminated

KEEP_RECORDS = ("train", "quickstart", "tokenizer", "export", "report")  # in files; stdout only follows
INTERRUPTED = 130
PLACES = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)
kept: list[Exception] = []  # with the tensors of their frames; see `leave_memory`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. `--debug` shows the traceback of an unexpected error."""
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        harden()
        spin_briefly()
        sys.excepthook = print_traceback
        if args[:1] == ["train"]:
            leave_when_terminated()  # before what takes seconds to import
            faulthandler.enable()  # a crash in native code (a shard cut in the middle of a read) names its line
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return checked(command_of(args)(), args)
    except UserError as error:
        print_note(error)
        return error.exit_code
    except KeyboardInterrupt:
        print_note("interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if said := unusable_place(error):
            print_note(said)
            return 1
        print_note(f"{type(error).__name__}: {first_line(error)}; {write_traceback()}")
        code = getattr(error, "exit_code", 1)
        if argv is None and device_is_lost(error):
            leave_memory(error, code)
        return code


def checked(code: int, args: list[str]) -> int:
    """`code`, or 1 where stdout is all that a command gives and some of it could not be written."""
    reason = lost_text(sys.stdout)
    if reason:  # a reader that left needs no message
        print_note(f"standard output could not be written ({reason}); free the disk, or choose another place for it")
    if code or reason is None or not args or args[0] in KEEP_RECORDS or writes_file(args):
        return code
    return 1


def writes_file(args: list[str]) -> bool:
    """Whether flags name a file or folder for the results."""
    named = dict(zip(args, [*args[1:], "-"])) | dict(arg.split("=", 1) for arg in args if "=" in arg)
    return any(not named.get(flag, "-").startswith("-") for flag in ("--json", "--out"))


def command_of(args: list[str]) -> Callable[[], int]:
    """What `args` ask for; it returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        return partial(printed, usage())
    if args[0] in ("--version", "version"):
        return partial(printed, regpt.__version__)
    name, *rest = args
    if name not in COMMANDS:
        raise UsageError(f"no command is called {name!r}{nearest(name, COMMANDS)}; choose from {', '.join(COMMANDS)}")
    return partial(import_module(f"regpt.cli.{name.replace('-', '_')}").main, rest)


def printed(text: str) -> int:
    print_line(text)
    return 0


def usage() -> str:
    lines = [f"  regpt {name:<15}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["regpt: train GPTs from scratch", "", *lines, "", "regpt COMMAND --help shows what a command takes."]
    )


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


def write_traceback() -> str:
    """Write the current traceback into a new temporary file; where it is, or what to do where there is no room."""
    content = traceback.format_exc().encode("utf-8", "backslashreplace")
    try:
        with tempfile.NamedTemporaryFile(prefix="regpt-", suffix=".log", delete=False) as file:
            file.write(content)
    except OSError as error:
        return f"its traceback cannot be written ({error.strerror}); --debug shows it"
    return f"traceback in {file.name}"


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` with control characters made visible."""
    print_error("".join(traceback.format_exception(kind, error, trace)))


if __name__ == "__main__":
    sys.exit(main())
