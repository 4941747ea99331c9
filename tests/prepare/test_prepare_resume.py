"""Stopped at any moment, the same command goes on, and ends with the bytes of an attempt that nobody stopped."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from regpt.data.manifest import read_manifest
from regpt.data.verify import verify
from regpt.errors import UserError
from regpt.files import locked
from regpt.prepare import encode, partition, workers
from regpt.prepare.dedup import SIGNATURE
from regpt.prepare.partition import DOCUMENT
from regpt.prepare.prepare import prepare
from regpt.prepare.settings import Filters, TextOptions
from regpt.text.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
KILLED = 9
posix = pytest.mark.skipif(os.name != "posix", reason="uses fork or signals")


@pytest.fixture(autouse=True)
def many_partitions(monkeypatch):
    """Tiny sources divide into several partitions, and are worth processes."""
    monkeypatch.setattr(partition, "MIN_BYTES", 600)
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)


@pytest.fixture
def corpus(tmp_path) -> list[str]:
    """Five files of 20 documents, some of them repeated, of about 1,000 bytes each."""
    chosen = random.Random(7)
    texts = ["".join(chosen.choice("the cat sat on mats ") for _ in range(chosen.randint(1, 70))) for _ in range(85)]
    texts += texts[:15]
    for k in range(5):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[20 * k : 20 * k + 20])
        (tmp_path / f"{k}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [str(tmp_path / f"{k}.jsonl") for k in range(5)]


def make(corpus: list[str], out: Path, **options):
    options = {"val_fraction": 0.2, "shard_tokens": 300, "workers": 1, **options}
    return prepare(corpus, out, TOKENIZER, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def killed_at(step: int, function) -> bool:
    """Run `function` in a forked process that ends, as if killed, at its `step`-th change of the file system."""
    child = os.fork()
    if not child:
        steps = 0

        def counted(original):
            def call(*args, **options):
                nonlocal steps
                steps += 1
                if steps == step:
                    os._exit(KILLED)
                return original(*args, **options)

            return call

        os.replace, os.fsync = counted(os.replace), counted(os.fsync)
        Path.unlink, Path.mkdir = counted(Path.unlink), counted(Path.mkdir)  # type: ignore[method-assign]
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
def test_an_attempt_killed_at_any_step_is_gone_on_with(tmp_path, corpus, dedup):
    filters = Filters(dedup=dedup)
    if dedup == "near":
        pytest.importorskip("datasketch")
    make(corpus, tmp_path / "whole", filters=filters)
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("train")]) > 6
    step, stride = 1, {"none": 9, "exact": 11, "near": 29}[dedup]
    while killed_at(step, lambda out=tmp_path / f"out{step}": make(corpus, out, filters=filters)):
        out = tmp_path / f"out{step}"
        if not (out / "manifest.json").exists():
            killed_at(step // 2, lambda out=out: make(corpus, out, filters=filters))
        if not (out / "manifest.json").exists():
            make(corpus, out, filters=filters)
        else:
            make(corpus, out, filters=filters)  # nothing to do but to tidy up
        assert contents(out) == whole
        assert not (out / ".work").exists()
        step += stride
    assert step > 60


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_an_earlier_attempt_encoded_is_not_encoded_again(tmp_path, corpus, monkeypatch):
    assert killed_at(60, lambda: make(corpus, tmp_path / "out"))
    encoded, original = [], encode.encode_partition

    def counted(work, part, *more, **options):
        encoded.append(part.index)
        original(work, part, *more, **options)

    monkeypatch.setattr(encode, "encode_partition", counted)
    make(corpus, tmp_path / "out")
    first = len(encoded)
    make(corpus, tmp_path / "whole")
    assert 0 < first < len(encoded) - first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


DRIVER = """
import sys
from pathlib import Path
from regpt.prepare import partition, workers
from regpt.prepare.prepare import prepare
from regpt.text.open import open_tokenizer
partition.MIN_BYTES, workers.SMALL_BYTES = 600, 0
folder = Path(sys.argv[1])
if len(sys.argv) > 2:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
files = [str(folder / f"{k}.jsonl") for k in range(5)]
prepare(files, folder / "out", open_tokenizer(folder / "bpe.json"), val_fraction=0.2, shard_tokens=300, workers=2)
"""


def start(folder: Path, *more: str) -> subprocess.Popen:
    (folder / "bpe.json").write_bytes(TOKENIZER.to_json().encode())
    (folder / "script.py").write_text(DRIVER, encoding="utf-8")  # without `if __name__ == "__main__"`
    command = [sys.executable, str(folder / "script.py"), str(folder), *more]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


@posix
@pytest.mark.parametrize("whom", ["the whole tree", "the first process"])
def test_processes_killed_at_random_moments_end_with_the_same_bytes(tmp_path, corpus, whom):
    make(corpus, tmp_path / "whole")
    chosen = random.Random(whom)
    for _ in range(3):
        process = start(tmp_path)
        until = time.monotonic() + 30
        while process.poll() is None and not list(tmp_path.glob("out/.work/part*")) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chosen.random() * 0.05)
        (os.killpg if whom == "the whole tree" else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        if (tmp_path / "out" / "manifest.json").exists():
            break
    else:
        assert start(tmp_path).communicate(timeout=60)[1] == ""
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@posix
def test_a_worker_that_cannot_write_is_a_full_disk(tmp_path, corpus):
    Path(corpus[4]).write_text(json.dumps({"text": "the cat sat " * 10_000}) + "\n", encoding="utf-8")
    make(corpus, tmp_path / "whole")
    process = start(tmp_path, "30000")  # bytes in a file: enough for all but the tokens of that document
    assert "is full; free space, then the same command goes on" in process.communicate(timeout=60)[1]
    make(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_bytes_do_not_depend_on_processes_or_partitions(tmp_path, corpus, monkeypatch):
    make(corpus, tmp_path / "one")
    make(corpus, tmp_path / "three", workers=3)
    monkeypatch.setattr(partition, "MIN_BYTES", 10_000)
    make(corpus, tmp_path / "large", workers=1)
    monkeypatch.setattr(partition, "MIN_BYTES", 1)
    make(corpus, tmp_path / "small", workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "large") == contents(tmp_path / "small")


def test_sets_in_memory_are_encoded_beside_files(tmp_path, corpus):
    make(["pydocs", *corpus], tmp_path / "one", shard_tokens=10**6)
    make(["pydocs", *corpus], tmp_path / "two", shard_tokens=10**6, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(tmp_path / "two") == []


@posix
def test_a_worker_that_is_killed_loses_only_its_partition(tmp_path, corpus, monkeypatch):
    make(corpus, tmp_path / "whole")
    killed = []

    def kill_one(now) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    make(corpus, tmp_path / "out", workers=2, progress=kill_one)
    assert killed
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_partition_that_kills_every_worker_is_one_sentence_and_the_rest_stays(tmp_path, corpus, monkeypatch):
    multiprocessing.set_executable("/bin/false" if os.name == "posix" else "where.exe")
    try:
        with pytest.raises(UserError, match=r"a process was killed while it read .*\.jsonl, perhaps for want"):
            make(corpus, tmp_path / "out", workers=2)
    finally:
        multiprocessing.set_executable(sys.executable)


def test_a_bad_file_can_be_mended(tmp_path, corpus):
    make(corpus, tmp_path / "whole")
    good = Path(corpus[4]).read_bytes()
    Path(corpus[4]).write_bytes(good[:-50] + b"\xff" + good[-50:])
    for count in (1, 2):
        with pytest.raises(UserError, match=r"4\.jsonl, line \d+: byte 0xff is not valid UTF-8"):
            make(corpus, tmp_path / "out", workers=count)
    assert list((tmp_path / "out" / ".work").glob("part-*.json"))
    Path(corpus[4]).write_bytes(good)
    make(corpus, tmp_path / "out")
    assert contents(tmp_path / "out")["train-00000.bin"] == contents(tmp_path / "whole")["train-00000.bin"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupt_after(documents: int):
    def show(now) -> None:
        if now.documents > documents:
            raise KeyboardInterrupt

    return show


def test_ctrl_c_keeps_what_is_done(tmp_path, corpus):
    make(corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", progress=interrupt_after(50))
    with pytest.raises(UserError, match="never finished"):
        read_manifest(tmp_path / "out")
    seen = []
    make(corpus, tmp_path / "out", progress=seen.append)
    assert seen[0].found_bytes > 0
    assert (seen[-1].done, seen[-1].documents) == (1.0, 100)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"val_fraction": 0.3},
            r"another --val-fraction \(0.2, now 0.3\); repeat its options to go on, or add --restart",
        ),
        ({"filters": Filters(dedup="exact")}, r"another --dedup \(none, now exact\)"),
        ({"filters": Filters(min_chars=3)}, r"another --min-chars \(0, now 3\)"),
        ({"text": TextOptions(template="{text}.")}, r"another --template \(none, now {text}.\)"),
        ({"text": TextOptions(on_error="skip", template="{text}")}, r"another --template \(none, now \{text\}\)"),
    ],
)
def test_other_options_are_refused_until_restart(tmp_path, corpus, options, said):
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", progress=interrupt_after(50))
    with pytest.raises(UserError, match=said):
        make(corpus, tmp_path / "out", **options)
    make(corpus, tmp_path / "out", restart=True, **options)
    make(corpus, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_shard_size_and_a_changed_source_are_taken_up(tmp_path, corpus):
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", progress=interrupt_after(50))
    text = json.dumps({"text": "a document more"}) + "\n"
    Path(corpus[0]).write_text(text + Path(corpus[0]).read_text(encoding="utf-8"), encoding="utf-8")
    make(corpus, tmp_path / "out", shard_tokens=250)
    make(corpus, tmp_path / "whole", shard_tokens=250)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, corpus):
    def write(now) -> None:
        if 41 < now.documents < 60:  # in the middle of it
            Path(corpus[2]).write_text(json.dumps({"text": "another"}) + "\n", encoding="utf-8")

    with pytest.raises(UserError, match=r"2\.jsonl changed while it was read; run the same command again"):
        make(corpus, tmp_path / "out", progress=write)
    make(corpus, tmp_path / "out")
    make(corpus, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


DAMAGE = {  # of the same size: only the checksum tells
    ".train.bin": (np.dtype("<u2"), lambda tokens: tokens.__setitem__(3, tokens[3] ^ 1)),
    ".val.bin": (np.dtype("<u2"), lambda tokens: tokens.__setitem__(1, tokens[1] ^ 1)),
    ".train.docs": (DOCUMENT, lambda rows: rows["bytes"].__iadd__(1)),
    ".val.docs": (DOCUMENT, lambda rows: rows["bytes"].__iadd__(1)),
    ".sig": (SIGNATURE, lambda rows: rows["values"].__setitem__(..., 7)),
}


@pytest.mark.parametrize("suffix", DAMAGE)
def test_a_damaged_part_of_an_earlier_attempt_is_made_again(tmp_path, corpus, suffix):
    options = {"filters": Filters(dedup="near" if suffix == ".sig" else "none"), "shard_tokens": 10**6}
    if suffix == ".sig":
        pytest.importorskip("datasketch")
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", progress=interrupt_after(50), **options)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    make(corpus, tmp_path / "whole", **options)
    paths = list((tmp_path / "out" / ".work").glob(f"part-*{suffix}"))
    assert paths
    for path in paths:
        shutil.copytree(tmp_path / "cut", tmp_path / "out", dirs_exist_ok=True)
        dtype, change = DAMAGE[suffix]
        content = np.fromfile(path, dtype=dtype)
        change(content)
        content.tofile(path)
        make(corpus, tmp_path / "out", **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"key": ' + "9" * 5000 + "}", "[]", '{"text": 5}'])
def test_notes_of_an_earlier_attempt_are_read_within_limits(tmp_path, corpus, content):
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", progress=interrupt_after(50))
    work = tmp_path / "out" / ".work"
    for path in work.glob("part-*.json"):
        path.write_text(content, encoding="utf-8")
    settings = (work / "settings.json").read_bytes()
    (work / "settings.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"settings.json.*add --restart to prepare from the start"):
        make(corpus, tmp_path / "out")
    (work / "settings.json").write_bytes(settings)
    make(corpus, tmp_path / "out")
    make(corpus, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_in_use_is_refused_untouched(tmp_path, corpus):
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    with (
        locked(out / ".work" / "lock", out),
        pytest.raises(UserError, match=rf"out is being written by process {os.getpid()}; wait .* or choose another"),
    ):
        make(corpus, out)
    make(corpus, out)
    assert verify(out) == []


def test_nothing_of_the_work_stays(tmp_path, corpus):
    make(corpus, tmp_path / "out", workers=2)
    assert all(path.is_file() for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="none of the 100 documents"):
        make(corpus, tmp_path / "none", val_fraction=1e-9)
    assert not (tmp_path / "none").exists()


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_formats_of_every_kind_are_gone_on_with_and_do_not_depend_on_workers(tmp_path, corpus):
    """Tables, arrays, other encodings, separators and skipped rows, stopped and with several processes."""
    texts = [json.loads(line)["text"] for path in corpus for line in Path(path).read_text("utf-8").splitlines()]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(texts) + "\nragged,row\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts] + [1]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("<|e|>".join(texts), encoding="utf-16")
    (tmp_path / "b.jsonl").write_text("{oops\n" * 100 + json.dumps({"text": "the cat"}), encoding="utf-8-sig")
    given = [str(tmp_path / name) for name in ("a.csv", "a.json", "a.txt", "b.jsonl")]
    options = {"text": TextOptions(on_error="skip", separator="<|e|>")}
    made = make(given, tmp_path / "whole", **options)
    assert made.documents("train") + made.documents("val") == 301
    assert sum(source["skipped"] for source in made.sources if "skipped" in source) == 102
    whole = contents(tmp_path / "whole")
    for step in (20, 60, 90, 120):
        out = tmp_path / f"out{step}"
        assert killed_at(step, lambda out=out: make(given, out, **options))
        make(given, out, **options)
        assert contents(out) == whole
    make(given, tmp_path / "several", workers=2, **options)
    assert contents(tmp_path / "several") == whole
