"""What `pip install regpt-*.whl` brings: every file of the package, a version, a command that trains."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import regpt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "regpt"
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a source tree")


def package_files() -> set[str]:
    """Files of the source tree that belong into a wheel."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACKAGE.parent).as_posix() for path in files}


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source without git, as from a downloaded archive."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "src" / "regpt", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    # pytest's paths are not the build's: of the environment nothing but the interpreter counts.
    run(command, source, PYTHONPATH="")
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("regpt/")}
        licences = [name for name in archive.namelist() if "/licenses/" in name]
    assert held == package_files()
    assert {
        "regpt/py.typed",
        "regpt/recipes/quickstart.toml",
        "regpt/report/report.css",
        "regpt/report/page.html",
    } <= held
    assert len(licences) == 2


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> dict[str, str]:
    """Environment in which the unpacked wheel is the `regpt` that is found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_the_installed_wheel_knows_its_version_and_recipes(installed: dict[str, str], tmp_path: Path):
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools_scm"]["fallback_version"]
    code = (
        "import regpt.__main__, regpt.config as config; regpt.__main__.main(['--version']); "
        "print(regpt.__file__, config.read_config('quickstart').train.steps)"
    )
    version, rest = run([sys.executable, "-c", code], tmp_path, **installed).splitlines()
    assert version == fallback
    assert rest == f"{tmp_path / 'site' / 'regpt' / '__init__.py'} 1200"


@pytest.mark.slow
def test_the_installed_wheel_trains(installed: dict[str, str], tmp_path: Path):
    command = [sys.executable, "-m", "regpt", "quickstart", "--steps", "2", "--out", "run"]
    run(command, tmp_path, OMP_NUM_THREADS="1", **installed)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_source_tree_that_was_not_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch):
    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert re.fullmatch(r"0\+\w+", regpt.installed_version())
