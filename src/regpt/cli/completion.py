"""`regpt completion`: a script for bash, zsh or fish that completes commands, flags, their words, and recipes.

The script holds all words itself: a key press starts no Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from regpt.cli.commands import ARGUMENTS, COMMANDS, arguments
from regpt.cli.flags import Flag, flags_of
from regpt.cli.parse import parse
from regpt.config import recipe_names
from regpt.console.lines import print_line

WITH_RECIPE = ("train", "plan", "verify-resume", "bench train", "bench sample")
BASH = """# bash completion of regpt: eval "$(regpt completion bash)"
_regpt() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words="" command=${COMP_WORDS[1]}
    case "$command" in
        GROUPS) command="$command ${COMP_WORDS[2]}" ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="COMMANDS"
    else
        case "$command:$prev" in
VALUES
        esac
        if [ -z "$words" ]; then
            case "$command" in
FLAGS
            esac
            case "$cur:$prev" in
                -*) ;;
                *:-*) words="" ;;
                *) words="${words%%--*}" ;;
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _regpt regpt
"""
ZSH = """#compdef regpt
# zsh completion of regpt: eval "$(regpt completion zsh)"
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""
FISH = """# fish completion of regpt: regpt completion fish | source
function __regpt_at
    set -l typed (commandline -opc)
    set -l last (math 1 + (count $argv))
    test (count $typed) -ge $last; and test "$typed[2..$last]" = "$argv"
end
"""


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script with which the shell completes regpt's commands, flags, words and recipes."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="{bash,zsh,fish}")]
    """bash: eval "$(regpt completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: regpt completion fish |
    source in ~/.config/fish/config.fish."""


def main(args: list[str]) -> int:
    given = parse(CompletionArgs, args, prog="regpt completion")
    print_line({"bash": bash, "zsh": lambda: ZSH + bash(), "fish": fish}[given.shell]().rstrip("\n"))
    return 0


def groups() -> dict[str, list[str]]:
    """Commands with commands of their own, and these."""
    found: dict[str, list[str]] = {}
    for command in ARGUMENTS:
        first, _, second = command.partition(" ")
        if second:
            found.setdefault(first, []).append(second)
    return found


def words_of(command: str, known: Mapping[str, Flag]) -> list[str]:
    """What may stand there: recipes and words without a flag first, then flags."""
    positional = [word for flag in known.values() if flag.positional for word in flag.choices]
    recipes = recipe_names() if command in WITH_RECIPE else []
    return [*positional, *recipes, *(name for name, flag in known.items() if not flag.positional), "--help"]


def bash() -> str:
    values, flags = [], []
    for group, inner in groups().items():
        values.append(f'            "{group} "*":{group}") words="{" ".join(inner)}" ;;')
    for command in ARGUMENTS:
        known = flags_of(arguments(command))
        flags.append(f'                "{command}") words="{" ".join(words_of(command, known))}" ;;')
        for name, flag in known.items():
            if flag.choices and not flag.switch and not flag.positional:
                values.append(f'            "{command}:{name}") words="{" ".join(flag.choices)}" ;;')
    script = BASH.replace("GROUPS", "|".join(groups())).replace(
        "COMMANDS", " ".join([*COMMANDS, "--help", "--version"])
    )
    return script.replace("VALUES", "\n".join(values)).replace("FLAGS", "\n".join(flags))


def fish() -> str:
    lines = [
        f"complete -c regpt -n __fish_use_subcommand -f -a {name} -d {shell_quoted(what)}"
        for name, what in COMMANDS.items()
    ]
    lines += ["complete -c regpt -l help", "complete -c regpt -n __fish_use_subcommand -l version"]
    for group, inner in groups().items():
        alone = f"'__regpt_at {group}; and test (count (commandline -opc)) -eq 2'"
        lines.append(f"complete -c regpt -n {alone} -f -a '{' '.join(inner)}'")
    for command in ARGUMENTS:
        known = flags_of(arguments(command))
        at = f"complete -c regpt -n '__regpt_at {command}'"
        words = [word for word in words_of(command, known) if not word.startswith("-")]
        if words:
            lines.append(f"{at} -a '{' '.join(words)}'")
        for name, flag in known.items():
            if flag.positional:
                continue
            spelled = f"-l {name.removeprefix('--')}" if name.startswith("--") else f"-s {name.removeprefix('-')}"
            value = "" if flag.switch else f" -x -a '{' '.join(flag.choices)}'" if flag.choices else " -r"
            lines.append(f"{at} {spelled}{value}")
    return FISH + "\n".join(lines) + "\n"


def shell_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
