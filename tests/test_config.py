"""The configuration of a run: strict reading, what comes from where, and the way to a file and back."""

import errno
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import regpt
from regpt.config import RunConfig, read_config, recipe_names
from regpt.errors import UsageError, UserError
from regpt.structured import MAX_TOML_BYTES


def read(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(str(path))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_the_way_to_a_file_and_back(name: str, tmp_path: Path):
    config = read_config(name)
    assert read(tmp_path, config.to_toml()) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path):
    assert read(tmp_path, "") == RunConfig()


def test_a_file_changes_only_what_it_sets_of_the_recipe_it_names(tmp_path: Path):
    recipe = read_config("gpt2-tiny")
    config = read(tmp_path, 'recipe = "gpt2-tiny"\n[train]\nsteps = 7\n[optim]\nlr = 1\n')
    assert config.train.steps == 7
    assert config.optim.lr == 1.0  # a whole number is a number
    assert config.train.batch_tokens == recipe.train.batch_tokens
    assert config.model == recipe.model
    assert config.sample == recipe.sample


def test_a_recipe_may_build_on_another():
    medium, small = read_config("gpt2-350m"), read_config("gpt2-124m")
    assert medium.model.n_layer == 24
    assert medium.eval == small.eval
    assert medium.optim.weight_decay == small.optim.weight_decay


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[train]\nstep = 7", "unknown key 'train.step' (did you mean 'steps'?); allowed here: steps, "),
        ("[trian]\nsteps = 7", "unknown key 'trian' (did you mean 'train'?); allowed here: model, data, "),
        ('[train]\nsteps = "12"', "train.steps is '12', must be a valid integer"),
        ("[train]\nsteps = 12.0", "train.steps is 12.0, must be a valid integer"),
        ("[train]\nsteps = true", "train.steps is True, must be a valid integer"),
        ('[optim]\nlr = "6e-4"', "optim.lr is '6e-4', must be a valid number"),
        ("[train]\ncompile = 1", "train.compile is 1, must be a valid boolean"),
        (
            '[train]\nprecision = "fp4"',
            "train.precision is 'fp4', must be 'fp64', 'fp32', 'tf32', 'bf16', 'fp16' or 'fp8'",
        ),
        (
            "[train]\nbatch_ramp = [10, 128, 16]",
            "train.batch_ramp has the entry 10, must be lists inside a list, as [[…]",
        ),
        ("[train]\nbatch_ramp = [[10, 128]]", "train.batch_ramp has the entry [10, 128], which lacks value 3"),
        ("[train]\nsteps = 0", "train.steps is 0, must be at least 1"),
        ("[optim]\nlr = nan", "optim.lr is nan, must be 0 or more"),
        ("[model]\nn_embd = 100\nn_head = 3", "model.n_embd = 100 is not divisible by model.n_head = 3"),
        ("[model]\nmax_seq_len = 512", "data.seq_len 1024 is longer than model.max_seq_len 512; lower the first"),
        (
            '[model]\nfamily = "mixtral"\n[train]\nmlp_tokens = 64',
            "train.mlp_tokens divides the tokens that an MLP computes at once; experts balance",
        ),
        ("[adapter]\nr = 4\ndropout = 0.1\n[train]\nmlp_tokens = 64", "and adapter.dropout counts them, so leave it"),
        ("[train]\nmicro_batch_rows = 1.5", "train.micro_batch_rows is 1.5, must be 'auto' or a valid integer"),
        ("[train]\nmicro_batch_rows = 'all'", "train.micro_batch_rows is 'all', must be 'auto' or a valid integer"),
        ("train = 3", "train is 3, must be"),
        ('recipe = "gpt2-12m"', "names the unknown recipe 'gpt2-12m' (did you mean 'gpt2-124m'?); choose from "),
        ("recipe = 124", "names the unknown recipe 124"),
        ("[train\nsteps = 1", "is not valid TOML: "),
        ("[train]\nsteps = 1\nsteps = 2", "is not valid TOML: "),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key_and_the_way_out(tmp_path: Path, text: str, sentence: str):
    with pytest.raises(UsageError, match=re.escape(sentence)) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "run.toml" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "gpt2-124",
            r"no recipe is called 'gpt2-124' \(did you mean 'gpt2-124m'\?\); choose from .*gpt2-124m, .*\.toml file",
        ),
        ("missing.toml", r"the file 'missing\.toml' does not exist"),
        ("", r"no recipe is called ''"),
    ],
)
def test_an_unknown_recipe_or_file_is_refused(name: str, sentence: str):
    with pytest.raises(UsageError, match=sentence):
        read_config(name)


@pytest.mark.parametrize("kind", ["locked", "large", "pointer"])
def test_a_file_that_cannot_be_read_is_not_called_invalid_toml(tmp_path: Path, monkeypatch, kind: str):
    path = tmp_path / "x.toml"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"
    path.write_text(pointer if kind == "pointer" else "", encoding="utf-8")
    if kind == "large":
        path.write_bytes(b"#" * (MAX_TOML_BYTES + 1))
    if kind == "locked":  # root may read what nobody may

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    sentence = {"locked": "Permission denied", "large": "too much for its kind", "pointer": "LFS"}[kind]
    with pytest.raises(UserError, match=sentence) as caught:
        read_config(str(path))
    assert "TOML" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"x\.toml is not UTF-8 text"):
        read_config(str(tmp_path / "x.toml"))


def sections(config: Any, path: str = "") -> list[tuple[str, Any]]:
    own = [(path, config)]
    return own + [
        found
        for f in fields(config)
        if is_dataclass(getattr(config, f.name))
        for found in sections(getattr(config, f.name), f"{path}{f.name}.")
    ]


@pytest.mark.parametrize(("path", "section"), sections(RunConfig()))
def test_every_section_refuses_unknown_keys(tmp_path: Path, path: str, section: Any):
    """Without `extra = "forbid"` pydantic would ignore them silently."""
    head = f"[{path.rstrip('.')}]\n" if path else ""
    with pytest.raises(UsageError, match=rf"unknown key '{re.escape(path)}nonsense'"):
        read(tmp_path, f"{head}nonsense = 1\n")
    assert fields(section)


def test_none_is_left_out_of_the_file():
    values = tomllib.loads(RunConfig().to_toml())
    assert "decay_steps" not in values["optim"]
    assert values["train"] == asdict(RunConfig().train) | {"batch_ramp": []}


def test_sections_help_typos_and_refused_flags_import_no_torch():
    """Torch and triton take seconds to import."""
    package = Path(regpt.__file__).parent
    modules = [f"regpt.{path.parent.name}.config" for path in package.glob("*/config.py")]
    commands = [
        ["train", "--help"],
        ["train", "gpt2-tiny", "--trian.steps", "3"],
        ["train", "gpt2-tiny", "--train.steps=-1"],
    ]
    code = (
        "import sys, importlib; from regpt.__main__ import main\n"
        f"for name in {['regpt.config', *modules]}: importlib.import_module(name)\n"
        "codes = []\n"
        f"for words in {commands}:\n"
        "    try: codes.append(main(words))\n"
        "    except SystemExit as end: codes.append(end.code)\n"
        "print(codes, sorted({'torch', 'triton'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2, 2] []"
