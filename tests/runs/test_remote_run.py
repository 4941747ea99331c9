"""Runs behind an address: killed, resumed elsewhere, taken over, on several processes, against a server like S3's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints
from regpt.checkpoint.mirror import Mirror
from regpt.checkpoint.saver import Saver
from regpt.config import RunConfig
from regpt.errors import UserError
from regpt.remote.lease import Lease
from regpt.remote.store import Store
from regpt.runs.actions import RunActions
from regpt.runs.pretrain import pretrain, resume
from regpt.runs.remote import RemoteRun, stored_config
from remote_stores import COPY_UNTIL_KILLED, PATIENT, FaultyStore, Hand, s3_bucket

pytest.importorskip("fsspec")
TENSORS = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def config(shards) -> RunConfig:
    config = tiny.change(tiny.run_config(shards), "checkpoint", keep_last=2)
    return tiny.change(config, "train", deterministic=True)


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> dict[str, bytes]:
    """The tensors at the end of the run on a local disk."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain(config, run) == 0
    return {name: (checkpoint_folder(run, 8) / name).read_bytes() for name in TENSORS}


def on(machine: Path, config: RunConfig) -> RunConfig:
    """The configuration on another machine: with a staging folder of its own."""
    return tiny.change(config, "checkpoint", staging=str(machine))


def start(url: str, config: RunConfig, **options: Any) -> int:
    remote = RemoteRun(url, config.checkpoint, PATIENT)
    return pretrain(config, remote.folder, remote=remote, **options)


def go_on(url: str, machine: Path, hand: Hand | None = None, **train: Any) -> int:
    config = tiny.change(on(machine, stored_config(url, str(machine))), "train", **train)
    remote = RemoteRun(url, config.checkpoint, (hand or Hand()).patience)
    return resume(remote.folder, config, remote=remote)


def final(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.read(f"checkpoints/step-00000008/{name}") or b"" for name in TENSORS}


def complete(url: str) -> list[int]:
    return sorted(int(name[17:25]) for name in Store(url).files() if name.endswith("/manifest.json"))


def stop_after(step: int, monkeypatch) -> None:
    """The process gets SIGTERM after this step."""
    log = RunActions.log

    def logged(job: Any, row: Any) -> None:
        log(job, row)
        if row["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunActions, "log", logged)


def test_a_run_is_there_when_it_has_ended(config, straight, url, tmp_path, capsys):
    assert start(url, on(tmp_path, config)) == 0
    assert final(url) == straight
    assert complete(url) == [6, 8]
    staging = RemoteRun(url, on(tmp_path, config).checkpoint).folder
    for name in ("config.toml", "env.json", "metrics.jsonl", "samples.jsonl", "evals/val-step-00000008.jsonl"):
        assert Store(url).read(name) == (staging / name).read_bytes()
    assert f"{url} is complete; the copy on this machine, {staging}, may be deleted" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{url} already holds a run; go on with: regpt train --resume {url}"):
        start(url, on(tmp_path / "other", config))


def test_a_stopped_run_goes_on_bitwise_on_another_machine(config, straight, url, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert start(url, on(tmp_path / "one", config)) == 75
    assert f"go on with: regpt train --resume {url}" in capsys.readouterr().out
    assert complete(url) == [2, 3]
    hand = Hand()
    assert go_on(url, tmp_path / "two", hand) == 0
    assert hand.slept == []  # the lease was released
    assert final(url) == straight
    rows = [json.loads(line) for line in (Store(url).read("metrics.jsonl") or b"").splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_training_does_not_wait_for_the_network_and_the_newest_checkpoints_arrive(
    config, straight, url, tmp_path, monkeypatch
):
    trained, puts, log = threading.Event(), [], RunActions.log
    put = Store.put

    def slow(self, name: str, path: Path) -> None:
        if name.startswith("checkpoints/"):
            puts.append(name)
            assert trained.wait(60)  # the network takes longer than all steps together
        put(self, name, path)

    def logged(job: Any, row: Any) -> None:
        log(job, row)
        if row["step"] == 8:
            trained.set()

    monkeypatch.setattr(Store, "put", slow)
    monkeypatch.setattr(RunActions, "log", logged)
    assert start(url, on(tmp_path, config)) == 0
    assert trained.is_set()
    assert not puts[0].startswith("checkpoints/step-00000008")  # it began long before
    assert complete(url) == [6, 8]
    assert final(url) == straight
    staging = RemoteRun(url, on(tmp_path, config).checkpoint).folder
    assert [folder.name for folder in checkpoints(staging)] == ["step-00000006", "step-00000008"]


def test_a_damaged_checkpoint_of_the_store_is_skipped_and_the_run_is_the_same(
    config, straight, url, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        assert start(url, on(tmp_path / "one", config)) == 75
    assert complete(url) == [4, 5]
    store, name = Store(url), "checkpoints/step-00000005/optimizer.safetensors"
    store.write(name, (store.read(name) or b"")[:-1] + b"\x55")
    assert go_on(url, tmp_path / "two") == 0
    assert f"warning: skipped {url}/checkpoints/step-00000005: " in capsys.readouterr().err
    assert final(url) == straight
    rows = [json.loads(line) for line in (store.read("metrics.jsonl") or b"").splitlines()]
    (event,) = [row for row in rows if row.get("name") == "resume"]
    assert event["step"] == 4
    assert len(event["skipped"]) == 1
    assert "optimizer.safetensors" in event["skipped"][0]
    assert store.read(name) is not None  # never deleted: no other checkpoint took its name


def test_the_machine_that_was_left_behind_fetches_what_others_have_trained(config, url, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert start(url, on(tmp_path / "one", config)) == 75
    assert go_on(url, tmp_path / "two") == 0
    assert go_on(url, tmp_path / "one", steps=10) == 0
    said = capsys.readouterr()
    assert f"{url} was written elsewhere since" in said.err
    staging = RemoteRun(url, on(tmp_path / "one", config).checkpoint).folder
    assert [folder.name for folder in checkpoints(Path(f"{staging}.old-1"))] == ["step-00000002", "step-00000003"]
    assert complete(url) == [8, 10]


def test_the_same_machine_goes_on_from_its_own_folder(config, url, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert start(url, on(tmp_path, config)) == 75
    got: list[str] = []
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, name, path: got.append(name) or get(self, name, path))
    assert go_on(url, tmp_path) == 0
    assert got == []


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"claim": 1}'])
def test_a_staging_folder_without_its_note_is_kept_beside(config, straight, url, tmp_path, monkeypatch, content):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert start(url, on(tmp_path, config)) == 75
    staging = RemoteRun(url, on(tmp_path, config).checkpoint).folder
    (staging / ".remote.json").unlink()
    if content is not None:
        (staging / ".remote.json").write_bytes(content)
    assert go_on(url, tmp_path) == 0
    assert [folder.name for folder in checkpoints(Path(f"{staging}.old-1"))] == ["step-00000002", "step-00000003"]
    assert final(url) == straight


def test_an_unfinished_download_is_begun_again(config, straight, url, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert start(url, on(tmp_path / "one", config)) == 75
    with monkeypatch.context() as patched:
        patched.setattr(Store, "get", refuse("optimizer.safetensors", Store.get))
        with pytest.raises(UserError, match=r"optimizer\.safetensors could not be read: no route to host, 3 times"):
            go_on(url, tmp_path / "two")
    assert go_on(url, tmp_path / "two", Hand()) == 0
    assert final(url) == straight


def refuse(ending: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def refusing(self, name: str, *args: Any) -> Any:
        if name.endswith(ending):
            raise ConnectionError("no route to host")
        return function(self, name, *args)

    return refusing


def test_a_run_that_cannot_be_copied_ends_in_one_sentence_and_is_kept(
    config, straight, url, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", refuse("optimizer.safetensors", Store.put))
        with pytest.raises(UserError, match=r"could not be brought up to date: no route to host; everything is in"):
            start(url, on(tmp_path, config))
    said = capsys.readouterr().out
    assert said.count("could not be written (no route to host); training continues, it is retried") == 1
    assert complete(url) == []
    staging = RemoteRun(url, on(tmp_path, config).checkpoint).folder
    assert [folder.name for folder in checkpoints(staging)] == ["step-00000006", "step-00000008"]
    assert go_on(url, tmp_path) == 0  # as the sentence says: it only copies
    assert final(url) == straight


def test_a_run_that_never_reached_its_store_goes_on_from_the_staging_folder(config, url, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", refuse("", Store.put))
        with pytest.raises(UserError, match="could not be brought up to date"):
            start(url, on(tmp_path, config))
    with pytest.raises(UserError, match=r"never reached .*, holds a run; go on with: regpt train --resume"):
        start(url, on(tmp_path, config))
    assert go_on(url, tmp_path) == 0
    assert complete(url) == [6, 8]


def test_a_second_process_on_the_run_is_refused(config, url, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert start(url, on(tmp_path / "one", config)) == 75
    holder = Lease(FaultyStore(url))
    holder.acquire()
    with pytest.raises(
        UserError, match=rf"{url} is being written by process {os.getpid()} on .*, who renews its lease of 60 seconds"
    ):
        go_on(url, tmp_path / "two", Hand(holder.renew))
    staging = RemoteRun(url, on(tmp_path / "two", config).checkpoint).folder
    assert not checkpoints(staging)
    hand = Hand()  # the holder has crashed
    assert go_on(url, tmp_path / "two", hand) == 0
    assert sum(hand.slept) >= 60


def test_a_run_that_is_taken_over_stops_and_overwrites_nothing(config, url, tmp_path, monkeypatch):
    others: list[Lease] = []
    saved = tiny_saver(monkeypatch)

    def take_over(step: int, mirror: Any) -> None:
        if step == 4:
            other = Lease(FaultyStore(url))
            other.acquire()
            others.append(other)
            others[0].store.write("theirs", b"")
            mirror.wake.set()
            mirror.thread.join()  # the save of step 6 waits for this one, so training does not get further

    saved.append(take_over)
    with pytest.raises(
        UserError, match=rf"{url} was taken over by process .*; what this process trained is in {tmp_path}"
    ):
        start(url, on(tmp_path, tiny.change(config, "train", steps=16)))
    assert max(complete(url), default=0) <= 4
    newest = others[0].newest()
    assert newest is not None
    assert newest.token == others[0].claim.token
    staging = RemoteRun(url, on(tmp_path, config).checkpoint).folder
    rows = (staging / "metrics.jsonl").read_text(encoding="utf-8")
    last = max(json.loads(line)["step"] for line in rows.splitlines())
    assert last < 16
    assert checkpoints(staging)[-1].name == f"step-{last:08d}"  # what was trained is saved here


def tiny_saver(monkeypatch) -> list[Callable[[int, Any], None]]:
    """Functions that are called with the step after each local save, and the mirror before it is told of it."""
    called: list[Callable[[int, Any], None]] = []
    mirrors: list[Mirror] = []
    start, prune = Mirror.start, Saver.prune

    def started(self: Mirror) -> None:
        mirrors.append(self)
        start(self)

    def pruned(self: Saver) -> None:
        prune(self)
        for function in called:
            function(int(checkpoints(self.run)[-1].name[5:]), mirrors[-1])

    monkeypatch.setattr(Mirror, "start", started)
    monkeypatch.setattr(Saver, "prune", pruned)
    return called


@pytest.fixture(scope="module")
def s3():
    """The address of a bucket on a server that imitates S3."""
    with pytest.MonkeyPatch.context() as patched, s3_bucket() as (address, environment):
        for name, value in environment.items():
            patched.setenv(name, value)
        yield address


def killed(url: str, staging: Path, config: RunConfig, after: int) -> None:
    """Train in a process that is killed when it copies its tensor file number `after`, from 0; on as many threads."""
    file = staging.with_suffix(".toml")
    file.write_text(on(staging, config).to_toml(), encoding="utf-8")
    paths = os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", COPY_UNTIL_KILLED, url, str(file), str(after)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.filterwarnings("default")  # those of the server
@pytest.mark.parametrize("after", [1, 3])  # of the four files with tensors that are copied at least
def test_against_s3_a_run_killed_while_it_copies_goes_on_bitwise_elsewhere(config, straight, s3, tmp_path, after):
    url = f"{s3}/runs/{after}"
    killed(url, tmp_path / "one", config, after)
    before = Lease(Store(url)).newest()
    assert before is not None
    assert not before.released
    hand = Hand()
    assert go_on(url, tmp_path / "two", hand) == 0
    assert sum(hand.slept) >= 60  # nobody knows on this machine that the holder is dead
    assert final(url) == straight
    assert complete(url) in ([6, 8], [8])  # the second where 8 was there already and 6 was on its way
    create_twice_is_refused(url)


def create_twice_is_refused(url: str) -> None:
    store = Store(url)
    assert store.create("lease/test", b"1")
    assert not store.create("lease/test", b"2")
    assert store.read("lease/test") == b"1"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_the_machine_on_which_a_run_was_killed_goes_on_at_once(config, straight, tmp_path):
    url = f"{tmp_path.as_uri()}/store/a"
    killed(url, tmp_path / "one", config, after=3)
    hand = Hand()
    assert go_on(url, tmp_path / "one", hand) == 0
    assert hand.slept == []
    assert final(url) == straight


def be_rank(url: str, config: RunConfig) -> int:
    return start(url, config)


def test_of_several_processes_the_main_one_copies(config, tmp_path):
    pytest.importorskip("fsspec")
    url = f"{tmp_path.as_uri()}/store/a"
    assert tiny.in_processes(2, be_rank, url, on(tmp_path / "staging", config)) == [0, 0]
    assert complete(url) == [6, 8]
    newest = Lease(Store(url)).newest()
    assert newest is not None
    assert newest.released
    assert newest.number == 1
    shutil.rmtree(tmp_path / "staging")
    assert go_on(url, tmp_path / "other", steps=9) == 0
    assert complete(url) == [8, 9]
