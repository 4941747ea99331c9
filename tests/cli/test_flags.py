"""Flags as people write them: true and false, mistyped names, numbers beyond every bound."""

import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from regpt.__main__ import main
from regpt.cli.commands import ARGUMENTS, arguments
from regpt.cli.data_prepare import PrepareArgs
from regpt.cli.flags import ELSEWHERE, TEXT, flags_of, normalized
from regpt.cli.parse import parse
from regpt.cli.train import Train, named_recipe
from regpt.config import RunConfig, read_config, with_home
from regpt.errors import UsageError
from regpt.ranges import Range, ranges_of

NUMBERS = {name: flag for name, flag in flags_of(Train).items() if {int, float} & set(flag.kinds) and not flag.many}


@dataclass(frozen=True)
class Args:
    name: tyro.conf.Positional[str] = ""
    text: str = ""
    ema: bool = False
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 5


@pytest.mark.parametrize(
    ("given", "compile"),
    [
        (["--train.compile", "true"], True),
        (["--train.compile", "False"], False),
        (["--train.compile=false"], False),
        (["--train.compile"], True),
        (["--train_compile", "TRUE"], True),
        (["--train.compile", "--train.steps", "3"], True),
    ],
)
def test_true_and_false_are_written_as_in_toml_or_python_or_left_out(given: list[str], compile: bool):
    given = [arg.replace("train_", "train.") for arg in given]
    assert parse(Train, ["gpt2-tiny", *given], "regpt train").config.train.compile is compile


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--ema"], (True, False)),
        (["--ema", "true", "--json=true"], (True, True)),
        (["--ema", "false", "--json"], (False, True)),
        (["--no-ema"], (False, False)),
    ],
)
def test_switches_take_a_value_too(given: list[str], wanted: tuple[bool, bool]):
    args = parse(Args, ["x", *given], "regpt x")
    assert (args.name, args.ema, args.json) == ("x", *wanted)


def test_a_flag_that_is_neither_is_refused():
    with pytest.raises(UsageError, match=r"--train\.compile is 'maybe', must be true or false"):
        parse(Train, ["gpt2-tiny", "--train.compile=maybe"], "regpt train")


def test_a_value_may_begin_with_a_hyphen():
    assert parse(Args, ["--text", "-- a dash"[1:], "-n", "3"], "regpt x") == Args(text="- a dash", n=3)


def test_the_home_folder_is_found_where_the_shell_leaves_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    given = parse(Train, ["~/my.toml", "--out=~/runs/a", "--data=~/a=1", "--sample.prompt", "~/"], "regpt train")
    assert (given.recipe, given.out, given.config.sample.prompt) == ("/home/ann/my.toml", "/home/ann/runs/a", "~/")
    assert given.data == ("/home/ann/a=1",)
    data = {"path": "~/tokens", "mixture": {"~/a": 1.0, "b~": 2.0}}
    assert with_home({"data": data})["data"] == {"path": "/home/ann/tokens", "mixture": {"/home/ann/a": 1.0, "b~": 2.0}}


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--steps", "--train.steps"),
        ("--lr", "--optim.lr"),
        ("--train.stesp", "--train.steps"),
        ("--n_layer", "--model.n-layer"),
        ("--modle.n-layer", "--model.n-layer"),
        ("--optim.learning-rate", ""),
    ],
)
def test_a_mistyped_flag_is_one_short_sentence_with_the_nearest_names(flag: str, near: str):
    with pytest.raises(UsageError) as found:
        parse(Train, ["gpt2-tiny", flag, "10"], "regpt train")
    assert len(str(found.value)) < 250
    assert f"'{flag.replace('_', '-')}'" in str(found.value)
    assert near in str(found.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--train.steps", "abc"], "--train.steps is 'abc', must be a whole number"),
        (["--train.micro-batch-rows", "x"], "--train.micro-batch-rows is 'x', must be auto or a whole number"),
        (["--train.precision", "bf61"], "--train.precision is 'bf61' (did you mean 'bf16'?), must be fp64, fp32"),
        (["--optim.lr", "1e-1x"], "--optim.lr is '1e-1x', must be a number"),
        (["--out"], "--out needs a value; "),
        (["--out", "--train.steps", "3"], "--out needs a value; "),
        (["--out", "---"], "--out needs a value (one that begins with hyphens after an equals sign: --out=---)"),
        (["more"], "more is too much for regpt train"),
        (["--train.ema-decay", "0.5", "--eval.ema", "--train.ema-decay", "0"], "eval.ema asks for an average"),
    ],
)
def test_a_wrong_value_is_one_sentence_without_the_parsers_words(given: list[str], sentence: str):
    with pytest.raises(UsageError) as found:
        parse(Train, ["gpt2-tiny", *given], "regpt train")
    assert str(found.value).startswith(sentence)


@dataclass(frozen=True)
class Several:
    """A command with a flag of several numbers."""

    batch: Annotated[tuple[int, ...], Range(1, 1 << 20)] = (1, 64)


@pytest.mark.parametrize("batch", [["0"], ["1", "0"], ["1", "-3"], ["8", "1000000000"]])
def test_every_value_of_a_flag_of_several_is_checked(batch: list[str]):
    with pytest.raises(UsageError, match=rf"^--batch is {batch[-1]}, must be"):
        parse(Several, ["--batch", *batch], "regpt several")
    assert parse(Several, ["--batch", "1", "8"], "regpt several").batch == (1, 8)


def test_what_is_missing_is_named():
    @dataclass(frozen=True)
    class Required:
        model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
        prompt: str

    with pytest.raises(UsageError, match=r"^MODEL and --prompt are missing; regpt x --help"):
        parse(Required, [], "regpt x")


@pytest.mark.parametrize("theirs", ELSEWHERE)
def test_a_flag_of_another_trainer_is_answered_with_ours(theirs: str):
    with pytest.raises(UsageError, match=rf"\(did you mean {ELSEWHERE[theirs]}\?\)"):
        parse(Train, [f"--{theirs.replace('-', '_')}=1"], "regpt train")


def test_help_shows_no_empty_default(capsys):
    with pytest.raises(SystemExit):
        parse(Args, ["--help"], "regpt x")
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: )" not in shown
    assert "(default: 5)" in shown


def test_the_recipe_is_found_after_switches_and_bare_flags():
    given = ["--force", "--train.compile", "--train.steps", "3", "--out=r", "gpt2-tiny"]
    assert named_recipe(Train, given, "regpt train") == "gpt2-tiny"


@pytest.mark.parametrize("recipe", ["", "gpt2-tiny"])
def test_values_of_a_flag_of_several_are_no_recipe(recipe: str):
    rest = ["--train.batch-ramp", "10", "128", "16", "--sample.more-prompts", "-a", "b", "--data.mixture=x", "1"]
    for given in ([recipe, *rest], [*rest, "--", recipe], [*rest, "--force", recipe])[: 3 if recipe else 1]:
        assert named_recipe(Train, [arg for arg in given if arg], "regpt train") == recipe


@pytest.mark.parametrize("flag", NUMBERS)
def test_every_number_of_a_run_has_bounds(flag: str):
    for value in ("1" + "0" * 38, "-1" + "0" * 38, "1e400", "nan"):
        with pytest.raises(UsageError, match=flag.removeprefix("--") if "." in flag else flag):
            parse(Train, [flag, value], "regpt train")


@pytest.mark.parametrize("section", [field.name for field in fields(RunConfig)])
def test_every_number_of_a_file_has_bounds(section: str, tmp_path):
    defaults: Any = getattr(RunConfig(), section)
    assert is_dataclass(defaults)
    numbers = [f.name for f in fields(defaults) if re.search(r"\b(int|float)\b", str(f.type))]
    numbers = [name for name in numbers if name not in ("mixture", "batch_ramp")]  # tables, checked apart
    assert set(numbers) == set(ranges_of(type(defaults)))
    for name in numbers:
        for value in ("1" + "0" * 38, "-1" + "0" * 38):
            (tmp_path / "a.toml").write_text(f"[{section}]\n{name} = {value}\n", encoding="utf-8")
            with pytest.raises(UsageError, match=rf"{section}\.{name} "):
                read_config(str(tmp_path / "a.toml"))


@pytest.mark.parametrize("flag", ["--out", "--resume", "--init-from", "--data", "--log.wandb-project"])
@pytest.mark.parametrize("spelled", [lambda flag: [flag, ""], lambda flag: [f"{flag}="]])
def test_an_empty_value_as_of_an_unset_variable_is_refused(flag: str, spelled):
    with pytest.raises(UsageError, match=rf"^{flag} is empty \(an unset variable\?\)"):
        parse(Train, ["gpt2-tiny", *spelled(flag)], "regpt train")


@pytest.mark.parametrize("command", sorted(ARGUMENTS))
def test_no_flag_of_a_path_or_name_takes_an_empty_value(command: str):
    for flag in flags_of(arguments(command)).values():
        if {str, Path} & {*flag.kinds} and not flag.positional and "." not in flag.name and flag.name not in TEXT:
            with pytest.raises(UsageError, match=f"^{flag.name} is empty"):
                normalized({flag.name: flag}, [f"{flag.name}="], f"regpt {command}")


def test_keys_that_are_empty_by_default_may_be_set_so():
    config = parse(Train, ["gpt2-tiny", "--eval.tasks=", "--data.tokenizer", ""], "regpt train").config
    assert (config.eval.tasks, config.data.tokenizer) == ("", "")


def test_a_flag_of_several_values_counts_each_time_that_it_is_given():
    args = ["texts", "--val", "a", "b", "--out", "shards", "--val=c", "--decontaminate", "x"]
    given = parse(PrepareArgs, args, "regpt data prepare")
    assert (given.val, given.filters.decontaminate, given.sources) == (("a", "b", "c"), ("x",), ("texts",))
    prompts = ["--sample.more-prompts", "A", "--sample.more-prompts", "B"]
    assert parse(Train, ["gpt2-tiny", *prompts], "regpt train").config.sample.more_prompts == ("A", "B")


def test_a_flag_of_several_values_needs_one_and_a_key_of_a_section_may_list_nothing():
    with pytest.raises(UsageError, match=r"^--val needs a value"):
        parse(PrepareArgs, ["texts", "--out", "shards", "--val"], "regpt data prepare")
    assert parse(Train, ["gpt2-tiny", "--sample.more-prompts"], "regpt train").config.sample.more_prompts == ()


def test_none_is_a_value_of_what_may_be_left_open_alone():
    with pytest.raises(UsageError, match=r"^--train.steps is 'None', must be a whole number$"):
        parse(Train, ["gpt2-tiny", "--train.steps", "None"], "regpt train")
    assert parse(Train, ["gpt2-tiny", "--optim.decay-steps", "None"], "regpt train").config.optim.decay_steps is None


def test_a_value_may_be_called_as_the_help_calls_a_positional_argument():
    given = parse(PrepareArgs, ["texts", "--val", "SOURCE", "--out", "shards"], "regpt data prepare")
    assert given.val == ("SOURCE",)


def test_an_empty_argument_is_refused_as_an_empty_flag_is():
    for args in (["", "--out", "shards"], ["texts", "", "--out", "shards"], ["texts", "--out", "shards", "--", ""]):
        with pytest.raises(UsageError, match=r"^an argument is empty \(an unset variable\?\)"):
            parse(PrepareArgs, args, "regpt data prepare")


def test_a_list_of_lists_is_written_as_its_numbers_and_a_mistake_says_so():
    ramp = "--train.batch-ramp"
    config = parse(Train, ["gpt2-tiny", ramp, "10", "128", "16", "20", "256", "32"], "regpt train").config
    assert config.train.batch_ramp == ((10, 128, 16), (20, 256, 32))
    allowed = "must be 3 whole numbers for each entry, all one after another and without brackets"
    for values, got in ((["[[10, 128, 16]]"], "is '[[10, 128, 16]]'"), (["10", "128", "16", "20"], "got 4 values")):
        with pytest.raises(UsageError) as found:
            parse(Train, ["gpt2-tiny", ramp, *values], "regpt train")
        assert str(found.value) == f"{ramp} {got}, {allowed}"


def test_an_empty_choice_can_be_seen(capsys):
    assert main(["serve", "gpt2", "--kv-cache", "fp9"]) == 2
    assert 'must be "" or fp8' in capsys.readouterr().err
