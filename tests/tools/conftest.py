"""A recipe small enough to be timed in a test, and the command line as a function."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from regpt.__main__ import main

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
RECIPE = """
[model]
n_layer = 1
n_head = 2
n_embd = 16
vocab_size = 300
max_seq_len = 16

[data]
seq_len = 16

[train]
steps = 1000
batch_tokens = 128
micro_batch_rows = 4
precision = "fp32"
compile = false
device = "cpu"

[optim]
warmup_steps = 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`bench("train", …)`: exit code, standard output and error of `regpt bench train …`."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def benchmark_script(name: str) -> ModuleType:
    """A script of `benchmarks/` as a module."""
    sys.path.insert(0, str(SCRIPTS))  # as where a script is started
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture(scope="session")
def loader_script() -> ModuleType:
    return benchmark_script("loader")


@pytest.fixture(scope="session")
def ladder() -> ModuleType:
    return benchmark_script("ladder")


@pytest.fixture(scope="session")
def sampling() -> ModuleType:
    return benchmark_script("sampling")
