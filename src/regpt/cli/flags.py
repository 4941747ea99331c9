"""The flags of a command, read from its dataclass: for spelling, true and false, numbers, and completion."""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from regpt.console.text import counted
from regpt.errors import UsageError, nearest
from regpt.files import at_home
from regpt.ranges import SEED, Range

TRUTH = {"true": "True", "false": "False"}
NEAR = 3  # names that are offered for one that does not exist
HELP = ("-h", "--help")
NATURAL = Range(0, SEED)  # of a whole number that has no range of its own
TEXT = ("--prompt", "--sample.prompt", "--sample.more-prompts", "--separator", "--template", "--text-column", "--token")
ELSEWHERE = {  # flags of nanoGPT and Hugging Face's Trainer
    "learning-rate": "--optim.lr",
    "min-lr": "--optim.min-lr-ratio",
    "warmup-iters": "--optim.warmup-steps",
    "lr-decay-iters": "--optim.decay-steps",
    "max-iters": "--train.steps",
    "max-steps": "--train.steps",
    "batch-size": "--train.batch-tokens",
    "per-device-train-batch-size": "--train.micro-batch-rows",
    "gradient-accumulation-steps": "--train.batch-tokens",
    "block-size": "--data.seq-len",
    "dtype": "--train.precision",
    "eval-interval": "--eval.every-steps",
    "eval-iters": "--eval.val-tokens",
    "log-interval": "--log.every-steps",
    "out-dir": "--out",
    "output-dir": "--out",
}
WANTED = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
        name: such as `--train.steps`, or the metavar of a positional argument.
        kinds: types of its value, such as `int`.
        choices: words that it takes, next to values of `kinds`.
        allowed: range of its numbers; None leaves them to the command.
        many: it takes several values, one after another, or with `append` one each time that it is given.
        entry: values that belong together, of a list of lists; else 1.
        switch: it takes no value; `--no-…` turns it off.
        positional: it has no name on the command line.
        required: it has no default.
        optional: `None` is a value of it.
        blank: a key of a section that is empty by default, and may be set so.
    """

    name: str
    kinds: tuple[Any, ...]
    choices: tuple[str, ...] = ()
    allowed: Range | None = None
    many: bool = False
    entry: int = 1
    append: bool = False
    switch: bool = False
    positional: bool = False
    required: bool = False
    optional: bool = False
    blank: bool = False

    @property
    def boolean(self) -> bool:
        return self.kinds == (bool,)


def flags_of(command: type) -> dict[str, Flag]:
    """Every spelling of the flags of the dataclass `command`; positional arguments under their metavars."""
    return dict(walk(command, "", switches=True))


def walk(command: type, prefix: str, switches: bool) -> Iterator[tuple[str, Flag]]:
    hints = get_type_hints(command, include_extras=True)
    for field in fields(command):
        kind, notes = bare(hints[field.name])
        name = next((note.name for note in notes if getattr(note, "name", None) is not None), field.name)
        if isinstance(kind, type) and is_dataclass(kind):
            inner = f"{prefix}{name}." if name else prefix
            yield from walk(kind, inner, switches and tyro.conf.FlagConversionOff not in notes)
            continue
        positional = tyro.conf.Positional in notes
        metavar = next((note.metavar for note in notes if getattr(note, "metavar", None)), field.name.upper())
        kinds, choices = values_of(kind)
        flag = Flag(
            name=metavar if positional else f"--{prefix}{name}".replace("_", "-"),
            kinds=kinds,
            choices=choices,
            allowed=next((note for note in notes if isinstance(note, Range)), NATURAL if int in kinds else None),
            many=get_origin(kind) in (tuple, dict),
            entry=entry_of(kind),
            append=tyro.conf.UseAppendAction in notes,
            switch=switches and kind is bool,
            positional=positional,
            required=field.default is MISSING and field.default_factory is MISSING,
            optional=types.NoneType in get_args(kind),
            blank=field.default == "" and bool(prefix),
        )
        yield flag.name, flag
        for alias in (alias for note in notes for alias in getattr(note, "aliases", None) or ()):
            yield alias, flag
        if flag.switch and tyro.conf.FlagCreatePairsOff not in notes:
            yield f"--no-{flag.name.removeprefix('--')}", flag


def bare(hint: Any) -> tuple[Any, list[Any]]:
    """A type without its annotations, and these."""
    notes: list[Any] = []
    while get_origin(hint) is Annotated:
        notes += hint.__metadata__
        hint = hint.__origin__
    return hint, notes


def values_of(kind: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The types of a value, and the words that it may be."""
    kind, _ = bare(kind)
    if get_origin(kind) is Literal:
        return (), tuple(map(str, get_args(kind)))
    if kind is bool:
        return (bool,), tuple(TRUTH)
    if get_origin(kind) in (Union, types.UnionType, tuple, dict):
        inner = [values_of(one) for one in get_args(kind) if one not in (types.NoneType, ...)]
        return tuple(t for kinds, _ in inner for t in kinds), tuple(word for _, words in inner for word in words)
    return (kind,), ()


def entry_of(kind: Any) -> int:
    """Values of one entry of a list: 3 of `tuple[tuple[int, int, int], ...]`."""
    inner = get_args(kind)[:1] if get_origin(kind) is tuple else ()
    return len(get_args(inner[0])) if inner and get_origin(inner[0]) is tuple else 1


def normalized(known: Mapping[str, Flag], args: Sequence[str], prog: str) -> list[str]:
    """`args` as tyro wants them: True and False for either spelling and for a bare flag, values that begin with a
    hyphen after an equals sign. Words and numbers are checked.

    Raises:
        UsageError: a flag that does not exist, with the nearest names; a value that it does not take.
    """
    found, rest = list[str](), list(args)
    several = dict[str, list[str]]()  # values of the flags that take several, however often these are given
    while rest:
        arg = rest.pop(0)
        refuse_empty(arg if arg != "--" else min(rest, default=arg), prog)
        if arg == "--":
            return [*found, *spelled(several), arg, *rest]
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        flag = known.get(name)
        if flag is None or flag.positional:
            if name.startswith("--") and name not in HELP:
                raise UsageError(unknown(name, known, prog))
            found.append(at_home(arg))
        elif flag.boolean:
            if not equals and rest and (rest[0].lower() in TRUTH or not (flag.switch or rest[0].startswith("-"))):
                value = rest.pop(0)
            found += truth(name, flag, value)
        elif equals or (rest and is_value(rest[0], known)):
            values = [value if equals else rest.pop(0)]
            while flag.many and not flag.append and rest and is_value(rest[0], known):
                values.append(rest.pop(0))
            values = values if name in TEXT else [*map(at_home, values)]
            for one in values:
                check_value(name, flag, one)
            if len(values) % flag.entry:
                raise UsageError(f"{name} got {counted(len(values), 'value')}, must be {wanted(flag)}")
            if flag.many and not flag.append:
                several.setdefault(flag.name, []).extend(values)
            else:
                found += spelled({name: values})
        elif flag.many and "." in name:
            several.setdefault(flag.name, [])  # of no values: what the recipe lists is left out
        else:
            hyphens = rest and rest[0].partition("=")[0] not in known
            also = f" (one that begins with hyphens after an equals sign: {name}={rest[0]})" if hyphens else ""
            raise UsageError(f"{name} needs a value{also}; {prog} --help shows which")
    return [*found, *spelled(several)]


def refuse_empty(arg: str, prog: str) -> None:
    if not arg:
        raise UsageError(f"an argument is empty (an unset variable?); {prog} --help shows what it takes")


def spelled(given: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Flags and their values as tyro reads them; one that begins with a hyphen after an equals sign."""
    for name, values in given.items():
        hyphen = bool(values) and values[0].startswith("-")
        yield from [f"{name}={values[0]}", *values[1:]] if hyphen else [name, *values]


def is_value(arg: str, known: Mapping[str, Flag]) -> bool:
    return not arg.startswith("--") and (arg not in known or known[arg].positional)


def truth(name: str, flag: Flag, value: str) -> list[str]:
    """A flag that is true or false; without a value true."""
    said = TRUTH.get((value or "true").lower())
    if said is None:
        raise UsageError(f"{name} is {value!r}, must be true or false")
    if not flag.switch:
        return [name, said]
    return [name] if said == "True" else []


def check_value(name: str, flag: Flag, value: str) -> None:
    """Raise a UsageError for a word or a number that the flag does not take."""
    if value in flag.choices or (value == "None" and flag.optional):
        return
    if not value and {str, Path} & {*flag.kinds} and not flag.blank and name not in TEXT:
        raise UsageError(f"{name} is empty (an unset variable?); give a value, or leave the flag out")
    for kind in flag.kinds if not flag.many else flag.kinds[:1]:
        try:
            number = kind(value) if kind in WANTED else None
        except ValueError:  # not this one, or a million digits
            continue
        if number is not None and flag.allowed and (problem := flag.allowed.problem(number)):
            raise UsageError(f"{name.removeprefix('--') if '.' in name else name} is {value}, {problem}")
        return
    raise UsageError(f"{name} is {value!r}{nearest(value, flag.choices)}, must be {wanted(flag)}")


def wanted(flag: Flag) -> str:
    """What the flag takes, in words."""
    if flag.entry > 1:
        return f"{flag.entry} whole numbers for each entry, all one after another and without brackets"
    words = [*(choice or '""' for choice in flag.choices), *(WANTED.get(kind, kind.__name__) for kind in flag.kinds)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def unknown(name: str, known: Mapping[str, Flag], prog: str) -> str:
    """A sentence about a flag that does not exist, with those that may be meant."""
    near = nearest_flags(name, [flag for flag in known if flag.startswith("--")])
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"no flag of {prog} is called {name!r}{hint}; {prog} --help shows all"


def nearest_flags(name: str, known: Sequence[str]) -> list[str]:
    """The same last part in another section; names that hold it; similar ones."""
    last = last_part(name)
    if ELSEWHERE.get(last) in known:
        return [ELSEWHERE[last]]
    same = [flag for flag in known if last_part(flag) == last]
    longer = [f for f in known if last_part(f).endswith(f"-{last}") or last_part(f).startswith(f"{last}-")]
    close = difflib.get_close_matches(name, known, n=NEAR, cutoff=0.7)
    alike = difflib.get_close_matches(last, list(map(last_part, known)), n=NEAR, cutoff=0.7)
    return list(dict.fromkeys([*same, *longer, *close, *(f for f in known if last_part(f) in alike)]))[:NEAR]


def last_part(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2]
