"""`regpt completion`: a script for bash, zsh or fish that completes commands, flags, their words, and recipes.

The script holds all words itself: a key press starts no Python.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from regpt.cli.commands import ARGUMENTS, COMMANDS, arguments
from regpt.cli.flags import flags_of
from regpt.cli.parse import parse
from regpt.config import recipe_names
from regpt.console.lines import print_line

WITH_RECIPE = ("train", "finetune", "plan", "verify-resume", "bench train")
# Each script looks up `COMMAND FLAG` (words of that flag), then `COMMAND` (recipes and words, then flags) in TABLE, of
# lines `KEY=WORDS`. After a flag without words only files are offered.
BASH = """# bash completion of regpt: eval "$(regpt completion bash)"
_regpt_table='
TABLE'
_regpt_words() {
    local line
    while IFS= read -r line; do
        if [ "${line%%=*}" = "$1" ]; then echo "${line#*=}"; fi
    done <<< "$_regpt_table"
}
_regpt() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command="" words=""
    if [ "$COMP_CWORD" -gt 1 ]; then command=${COMP_WORDS[1]}; fi
    case "$command" in
        GROUPS) if [ "$COMP_CWORD" -gt 2 ]; then command="$command ${COMP_WORDS[2]}"; fi ;;
    esac
    words=$(_regpt_words "$command $prev")
    if [ -z "$words" ]; then
        words=$(_regpt_words "$command")
        case "$cur:$prev" in
            -*) ;;
            *:-*) words="" ;;
            *) words="${words%%--*}" ;;
        esac
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
set -g __regpt_table (string split \\n -- 'TABLE')
function __regpt_words
    for line in $__regpt_table
        set -l found (string split -m 1 = -- $line)
        if test "$found[1]" = "$argv[1]"
            string split ' ' -- $found[2]
        end
    end
end
function __regpt_complete
    set -l typed (commandline -opc)
    set -l command "$typed[2]"
    if test (count $typed) -gt 2; and string match -qr '^(GROUPS)$' -- $command
        set command "$command $typed[3]"
    end
    set -l words (__regpt_words "$command $typed[-1]")
    if test -z "$words"
        set words (__regpt_words "$command")
        if not string match -q -- '-*' (commandline -ct)
            set words (string match -v -- '-*' $words)
            string match -q -- '-*' $typed[-1]; and set words
        end
    end
    if set words (string match -- (commandline -ct)'*' $words)
        printf '%s\\n' $words
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c regpt -f -a '(__regpt_complete)'
"""


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script with which the shell completes regpt's commands, flags, words and recipes."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="{bash,zsh,fish}")]
    """bash: eval "$(regpt completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: regpt completion fish |
    source in ~/.config/fish/config.fish."""


def main(args: list[str]) -> int:
    given = parse(CompletionArgs, args, prog="regpt completion")
    script = {"bash": BASH, "zsh": ZSH + BASH, "fish": FISH}[given.shell]
    table = "".join(f"{key}={' '.join(words)}\n" for key, words in word_table().items())
    groups = dict.fromkeys(command.split()[0] for command in ARGUMENTS if " " in command)
    print_line(script.replace("TABLE", table).replace("GROUPS", "|".join(groups)).rstrip("\n"))
    return 0


def word_table() -> dict[str, list[str]]:
    """Words by `""` (commands), group, command, or command and flag; of a command words and recipes before flags."""
    found: dict[str, list[str]] = {"": [*COMMANDS, "--help", "--version"]}
    for command in ARGUMENTS:
        group, _, inner = command.partition(" ")
        if inner:
            found.setdefault(group, []).append(inner)
        known = flags_of(arguments(command))
        words = [word for flag in known.values() if flag.positional for word in flag.choices]
        words += recipe_names() if command in WITH_RECIPE else []
        found[command] = [*words, *(name for name, flag in known.items() if not flag.positional), "--help"]
        for name, flag in known.items():
            if flag.choices and not flag.switch and not flag.positional:
                found[f"{command} {name}"] = [*flag.choices]
    return found
