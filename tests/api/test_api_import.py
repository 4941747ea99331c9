"""What `import regpt` offers, and what it costs."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import regpt

EXPECTED = "(recipe, out, *, data=None, init_from=None, quiet=False, **sections)"
SCRIPT = """
import regpt
reveal_type(regpt.load("gpt2").generate("a"))
reveal_type(regpt.load("gpt2").generate(["a"]))
reveal_type(regpt.load("gpt2").generate("a", stream=True))
reveal_type(regpt.train("gpt2-tiny", "run", train={"steps": 10}))
reveal_type(regpt.read_run("run").metrics["train"]["loss"])
reveal_type(regpt.evaluate("run"))
regpt.train("gpt2-tiny")
regpt.load(3)
"""


def test_importing_regpt_imports_neither_torch_nor_numpy():
    code = (
        "import sys, regpt; dir(regpt), regpt.UserError; print(sorted({'torch', 'numpy', 'pydantic'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_name_is_there_and_listed():
    assert set(regpt.__all__) <= set(dir(regpt))
    for name in regpt.__all__:
        assert getattr(regpt, name).__doc__
    assert regpt.__version__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        regpt.trian  # noqa: B018


def test_every_name_has_one_home():
    homes = [name for names in regpt.HOMES.values() for name in names]
    assert sorted([*homes, *regpt.FUNCTIONS]) == regpt.__all__


def test_train_is_a_function_whatever_was_imported_before():
    assert regpt.train is importlib.import_module("regpt.train")
    importlib.import_module("regpt.train.trainer")
    parameters = inspect.signature(regpt.train).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(bare)) == EXPECTED
    assert callable(regpt.train)


def test_prepare_is_a_function_whatever_was_imported_before():
    assert regpt.prepare is importlib.import_module("regpt.prepare")
    importlib.import_module("regpt.prepare.shards")
    assert next(iter(inspect.signature(regpt.prepare).parameters)) == "sources"
    assert callable(regpt.prepare)


def test_errors_are_regpts_own():
    from regpt import errors

    assert regpt.UserError is errors.UserError
    assert issubclass(regpt.UsageError, regpt.UserError)


@pytest.mark.filterwarnings("ignore")
def test_the_types_of_a_users_script_are_known(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    source = Path(regpt.__file__).parents[1]
    settings = {"extraPaths": [str(source)], "include": ["script.py"], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "-p", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
    )
    said = json.loads(checked.stdout)["generalDiagnostics"]
    revealed = [one["message"].partition(" is ")[2] for one in said if one["severity"] == "information"]
    assert revealed[:4] == ['"str"', '"list[str]"', '"Iterator[str]"', '"TrainingRun"']
    assert "ndarray" in revealed[4]
    assert revealed[5] == '"list[dict[str, Any]]"'
    wrong = [one["range"]["start"]["line"] for one in said if one["severity"] == "error"]
    assert wrong == [8, 9]
