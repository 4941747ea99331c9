"""`regpt bench`: how fast training, batches and sampling are on this machine."""

from importlib import import_module

from regpt.console.lines import print_line
from regpt.errors import UsageError, nearest

COMMANDS = {
    "train": "tokens/s, MFU, memory and time to the first step of a recipe",
    "ladder": "what makes training fast, change by change, on this device",
    "data": "batches and tokens a second from a data folder",
    "sample": "tokens/s of a model that writes",
}


def main(args: list[str]) -> int:
    """Hand over to the subcommand."""
    if args[:1] in (["--help"], ["-h"]):
        print_line(f"usage: regpt bench {{{','.join(COMMANDS)}}} …\n")
        print_line("\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items()))
        return 0
    if not args:
        raise UsageError(f"regpt bench needs a command; choose from {', '.join(COMMANDS)}")
    if args[0] not in COMMANDS:
        hint = nearest(args[0], COMMANDS)
        raise UsageError(f"regpt bench has no command {args[0]!r}{hint}; choose from {', '.join(COMMANDS)}")
    return import_module(f"regpt.cli.bench_{args[0]}").main(args[1:])
