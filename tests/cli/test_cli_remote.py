"""Runs behind an address, as a user meets them: every command that reads one, and every mistake in one sentence."""

import json
import socket
import sys
from pathlib import Path

import pytest

from regpt.__main__ import main
from regpt.remote.store import Store
from regpt.runs.folder import is_run
from regpt.runs.remote import set_aside
from remote_stores import forget_s3, memory_bucket, s3_bucket

pytest.importorskip("fsspec")
TINY = "gpt2-tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_flags):
    """The address of a finished run of three steps."""
    folder = tmp_path_factory.mktemp("staging")
    with memory_bucket() as url:
        flags = [
            *tiny_flags,
            "--checkpoint.staging",
            str(folder),
            "--checkpoint.every-steps",
            "1",
            "--checkpoint.keep-last",
            "0",
        ]
        assert main(["train", TINY, "--out", url, *flags]) == 0
        yield url


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Another machine: its own home folder."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def one_sentence(err: str) -> bool:
    return err.startswith("regpt: ") and err.count("\n") == 1 and "Traceback" not in err


def names(url: str) -> set[str]:
    return set(Store(url).files())


def test_sample_eval_export_and_inspect_read_a_run_at_an_address(regpt, run, tmp_path):
    code, out, err = regpt("sample", run, "--prompt", "the", "-n", "2", "--max-new-tokens", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 3
    assert json.loads(out)["source"] == f"{run}, step 3"
    code, out, err = regpt("eval", run, "--tasks", "val", "--json", "-")  # of the data that the run was trained on
    assert code == 0, err
    rows = [json.loads(line) for line in (Store(run).read("metrics.jsonl") or b"").splitlines()]
    (val,) = [row for row in rows if row["kind"] == "val" and row["step"] == 3]
    assert json.loads(out)["tasks"]["val"]["loss"] == pytest.approx(val["loss"], rel=1e-5)
    assert regpt("export", run, "--out", tmp_path / "hf")[0] == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert regpt("inspect", f"{run}/checkpoints/step-00000002", "--json")[0] == 0


def test_report_and_scaling_read_runs_at_addresses(regpt, run, tmp_path):
    code, _, err = regpt("report", run)
    assert code == 2
    assert err == f"regpt: a report is not written to {run}; add --out FILE.html\n"
    assert regpt("report", run, "--out", tmp_path / "report.html")[0] == 0
    assert "<h1>a</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    code, _, err = regpt("report", run, run + "/", "--out", tmp_path / "report.html")
    assert code == 2
    assert "is given twice" in err
    assert "needs several runs" in regpt("scaling", run)[2]
    assert "is given twice" in regpt("diff", run, run)[2]


def test_resume_goes_on_on_a_machine_that_has_nothing(regpt, run, home, tmp_path):
    flags = ("--checkpoint.staging", tmp_path / "here", "--train.steps", "4")
    code, out, err = regpt("train", "--resume", run, *flags)
    assert code == 0, err
    assert "checkpoints/step-00000004/manifest.json" in names(run)
    (staging,) = (tmp_path / "here").iterdir()
    assert f"{run} is complete; the copy on this machine, {staging}, may be deleted" in out
    config = (Store(run).read("config.toml") or b"").decode()
    assert "steps = 4" in config
    code, out, err = regpt("train", "--resume", run, "--train.steps", "5")  # the folder is known from config.toml
    assert code == 0, err
    assert str(staging) in out
    assert not home.exists()
    code, _, err = regpt("train", "--resume", run, "--optim.lr", "1")
    assert code == 2
    assert one_sentence(err)
    assert "this would be another run: optim.lr" in err
    lease = json.loads(Store(run).read(sorted(n for n in names(run) if n.startswith("lease/"))[-1]) or b"")
    assert lease["released"]


def test_a_fork_from_an_address_names_it_as_its_parent(regpt, run, tmp_path):
    source = f"{run}/checkpoints/step-00000003"
    assert source.removeprefix(run + "/") + "/manifest.json" in names(run)
    out = "memory://bucket/runs/fork"
    staging = ("--checkpoint.staging", tmp_path / "here")
    code, _, err = regpt("train", "--fork-from", source, "--out", out, "--optim.lr", "1e-4", *staging)
    assert code == 0, err
    env = json.loads(Store(out).read("env.json") or b"")
    assert env["parent"]["checkpoint"] == source
    assert env["parent"]["step"] == 3
    code, _, err = regpt("train", "--fork-from", run, "--out", "memory://bucket/runs/other")
    assert code == 1
    assert err == f"regpt: --fork-from {run!r} is not a checkpoint; give RUN/checkpoints/step-…\n"


def test_a_run_starts_from_the_weights_at_an_address(regpt, run, tiny_flags, tmp_path):
    code, _, err = regpt("train", TINY, "--out", tmp_path / "next", *tiny_flags, "--init-from", run)
    assert code == 0, err
    assert json.loads((tmp_path / "next" / "env.json").read_text(encoding="utf-8"))["init_from"] == run


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["train", TINY, "--out", "RUN", "FLAGS"], 1, "RUN already holds a run; go on with: regpt train --resume RUN"),
        (
            ["train", TINY, "--out", "what://a", "FLAGS"],
            2,
            "what://a is an address of an unknown kind; give s3://",
        ),
        (["train", "--resume", "RUNx"], 1, "RUNx holds no run (no config.toml); start one with: regpt train RECIPE"),
        (["sample", "RUNx", "--prompt", "a"], 1, "RUNx cannot be opened, it has no complete checkpoint"),
        (["report", "RUNx", "--out", "r.html"], 1, "RUNx holds no run (no config.toml); check the address"),
        (["replay", "RUN", "--step", "1"], 2, "regpt replay reads folders of this machine and RUN is an address"),
        (["checkpoint", "list", "RUN"], 2, "regpt checkpoint reads folders of this machine and RUN is an address"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(regpt, run, tiny_flags, args, code, said):
    filled = [flag for arg in args for flag in (tiny_flags if arg == "FLAGS" else [arg.replace("RUN", run)])]
    got, _, err = regpt(*filled)
    assert got == code, err
    assert one_sentence(err), err
    assert said.replace("RUN", run) in err


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(regpt, monkeypatch, tiny_flags, scheme, package):
    registry = pytest.importorskip("fsspec.registry")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registry._registry, scheme, raising=False)
    code, _, err = regpt("train", TINY, "--out", f"{scheme}://bucket/a", *tiny_flags)
    assert code == 1
    assert err == (f"regpt: using {scheme}://bucket/a needs {package}; install it with: pip install 'regpt[buckets]'\n")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    code, _, err = regpt("sample", f"{scheme}://bucket/a", "--prompt", "a")
    assert code == 1
    assert err == f"regpt: using {scheme}://bucket/a needs fsspec; install it with: pip install 'regpt[data]'\n"


@pytest.mark.filterwarnings("default")  # those of the server
def test_on_s3_missing_credentials_and_buckets_are_one_sentence(regpt, monkeypatch, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--checkpoint.staging", str(tmp_path)]
    with s3_bucket() as (address, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code, _, err = regpt("train", TINY, "--out", "s3://nowhere/a", *flags)
        assert code == 1
        assert one_sentence(err), err
        assert "s3://nowhere/a" in err
        assert "there is no such file (The specified bucket does not exist)" in err
        forget_s3()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        code, _, err = regpt("train", TINY, "--out", f"{address}/a", *flags)
        assert code == 1
        assert one_sentence(err), err
        assert f"{address}/a/config.toml could not be read: Unable to locate credentials; log in" in err


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize(
    "args", [["train", TINY, "--out", "ADDRESS", "FLAGS"], ["sample", "ADDRESS", "--prompt", "a"]], ids=lambda it: it[0]
)
def test_without_a_network_the_first_contact_ends_soon_with_the_ways_out(regpt, monkeypatch, tiny_flags, scheme, args):
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[scheme], reason="needs regpt[buckets]")
    waits, asked = [], []

    def no_network(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("regpt.remote.network.time.sleep", waits.append)
    if scheme == "gs":  # whose credentials are looked for on the network, for a quarter of a minute
        monkeypatch.setattr("google.auth.default", lambda **_: asked.append(1) or no_network())
    filled = [flag for arg in args for flag in (tiny_flags if arg == "FLAGS" else [arg])]
    code, _, err = regpt(*(arg.replace("ADDRESS", f"{scheme}://bucket/{args[0]}") for arg in map(str, filled)))
    assert (code, waits, asked) == (1, [1.0], []), err
    assert "Name or service not known; check the network, or work offline: give a local file or folder" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["data", "prepare", "pydocs", "--out", "S3://b/x"], "--out takes a path of this machine and S3://b/x is an"),
        (["diff", "a", "b", "--out", "s3://b/x.html"], "--out takes a path of this machine and s3://b/x.html is an"),
        (
            ["tokenizer", "train", "pydocs", "--vocab-size", "300", "--out", "gs://b/x"],
            "--out takes a path of this machine and gs://b/x is an",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_address_to_write_to_is_no_folder_here(regpt, monkeypatch, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = regpt(*args)
    assert code == 2
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", ["s3://bucket/x", "https://host/x"])
def test_an_address_as_a_data_folder_is_named_as_it_was_given(regpt, tmp_path, data):
    code, _, err = regpt("train", TINY, "--out", tmp_path / "run", "--data", data)
    assert code == 1
    assert one_sentence(err), err
    assert f"{data} is an address and token shards are read from folders of this machine; copy it here" in err


def test_what_is_set_aside_survives_a_crash_in_the_middle(tmp_path, monkeypatch):
    folder = tmp_path / "staging"
    for name in ("config.toml", "env.json", "metrics.jsonl", "checkpoints/step-1/model.json", "samples.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    moved, replace = [], Path.replace

    def killed(path: Path, target: Path) -> Path:
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(path.name)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            set_aside(folder)
    assert is_run(folder)  # so the next process sets the rest aside, and deletes nothing
    set_aside(folder)
    found = {}
    for aside in sorted(tmp_path.glob("staging.old-*")):
        found |= {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert found == before
