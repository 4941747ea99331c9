"""Files elsewhere: a local stand-in for the hub, a plain web server, fsspec's memory; all of them fail on request."""

import base64
import hashlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.prepare.conversations import ConversationReader
from regpt.prepare.named import open_sources, table_files
from regpt.prepare.sources import RemoteSource, SourceFile, localized
from regpt.remote.download import Download, RemoteFile, RemoteOptions
from regpt.remote.retry import Patience
from regpt.remote.web import open_http

TEXT = "".join(f"line {i} of a text that takes a few packets\n" for i in range(4000)).encode()
PATH = "/texts/a.txt"


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def options(tmp_path, slept) -> RemoteOptions:
    """Waits are written down instead of waited for."""
    return RemoteOptions(cache=tmp_path / "cache", patience=Patience(tries=3, sleep=slept.append))


@pytest.fixture
def on_web(web, options) -> RemoteSource:
    """`TEXT` on the web server, found but not downloaded."""
    web.files[PATH] = TEXT
    (source,) = open_sources([web.url + PATH], options)
    web.asked.clear()
    return source


def starts(web) -> list[int | None]:
    return [asked.start for asked in web.asked]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def hub_source(hub, options, source: str) -> list:
    return open_sources([source], RemoteOptions(options.cache, endpoint=hub.url, patience=options.patience))


def test_conversations_of_the_hub_are_the_files_of_a_split_at_one_commit(hub, options):
    rows = {
        split: json.dumps({"prompt": split, "completion": "b"}).encode() for split in ("train", "train_sft", "test")
    }
    files = {f"data/{split}-0000{i}-of-00002.jsonl": row for split, row in rows.items() for i in (0, 1)}
    hub.add("owner/set", files | {"README.md": b"# a set", "info.json": b"{}"})
    hub.add("owner/one", {"answers-15k.jsonl": rows["test"], "README.md": b"# one"})
    remote = RemoteOptions(options.cache, endpoint=hub.url, patience=options.patience)
    found = table_files(["owner/set", "owner/set:test", "owner/one"], remote)
    assert [one.file for one in found] == [
        *(f"data/{split}-0000{i}-of-00002.jsonl" for split in ("train", "test") for i in (0, 1)),
        "answers-15k.jsonl",
    ]
    assert [one.messages[0]["content"] for one in ConversationReader([one.path for one in found])][::2] == [
        "train",
        "test",
        "test",
    ]
    assert found[0].url == f"hf://datasets/owner/set@0123456789abcdef0123456789abcdef01234567/{found[0].file}"
    said = "owner/set:dev has no files of split dev; there are test, train, train_sft: give one"
    with pytest.raises(UserError, match=said):
        table_files(["owner/set:dev"], remote)
    with pytest.raises(UserError, match="404 Not Found; check the name"):
        table_files(["owner/nothing"], remote)
    assert [one.path for one in table_files(["folder/missing.jsonl", "x.csv"], remote)] == [
        Path("folder/missing.jsonl"),
        Path("x.csv"),
    ]


def test_a_file_behind_https_is_downloaded_once_and_then_read(on_web, web):
    assert on_web.bytes == len(TEXT)
    assert [document.text for document in on_web.documents()] == [TEXT.decode()]
    assert on_web.localize().path.read_bytes() == TEXT
    assert len(web.asked) == 1
    url = web.url + PATH
    sha256 = hashlib.sha256(TEXT).hexdigest()
    assert on_web.record() == {"source": url, "file": url, "bytes": len(TEXT), "sha256": sha256, "url": url}


@pytest.mark.parametrize(("ranges", "again"), [(True, 80_000), (False, 30_000)])  # without, each answer is the whole
def test_a_cut_connection_goes_on_where_it_was_cut(on_web, web, ranges, again):
    web.ranges = ranges
    web.faults.extend([50_000, 30_000])
    assert on_web.localize().path.read_bytes() == TEXT
    assert starts(web) == [None, 50_000, again]


def test_what_an_earlier_process_left_is_continued(on_web, web):
    partial = on_web.remote.path.with_name("a.txt.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(TEXT[:70_000])
    assert on_web.localize().path.read_bytes() == TEXT
    assert starts(web) == [70_000]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("faults", "seconds"),
    [
        ([(429, {"Retry-After": "3"}), (500, {})], 3 + 2),  # 3 s as asked, then the second wait of 1, 2, 4, …
        ([(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})], 1),  # long ago: the usual first wait
    ],
)
def test_a_busy_server_is_asked_again_when_it_says_and_a_failing_one_ever_later(on_web, web, slept, faults, seconds):
    web.faults.extend(faults)
    assert on_web.localize().path.read_bytes() == TEXT
    assert slept == [1.0] * seconds


def test_it_gives_up_after_tries_that_bring_nothing_and_later_goes_on(on_web, web):
    web.faults.extend([50_000, (500, {}), (503, {}), (502, {})])
    with pytest.raises(UserError, match="502 Bad Gateway, 3 times; the same command continues where this one stopped"):
        on_web.localize()
    assert on_web.localize().path.read_bytes() == TEXT
    assert starts(web)[-1] == 50_000


@pytest.mark.parametrize(("status", "said"), [(404, "404 Not Found; check the name"), (403, "403 Forbidden; it needs")])
def test_a_refusal_is_not_tried_again(on_web, web, slept, status, said):
    web.faults.append((status, {}))
    with pytest.raises(UserError, match=rf"texts/a\.txt could not be read: the server answered {said}"):
        on_web.localize()
    assert not slept


@pytest.mark.parametrize("source", ["tinyshakespeare", "fineweb-10B", "https://example.invalid/a.txt"])
def test_a_name_that_does_not_resolve_is_tried_twice_and_says_how_to_work_offline(
    options, monkeypatch, slept, source, capsys
):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("regpt.remote.network.time.sleep", slept.append)
    with pytest.raises(UserError, match=r"no connection to .*: Name or service not known; check .* give a local file"):
        [found.localize() for found in open_sources([source], options)]
    assert slept == [1.0]
    assert "Name or service not known; trying again in" in capsys.readouterr().err


def test_a_server_that_was_reached_is_tried_as_often_as_ever(on_web, web, monkeypatch, slept):
    """Its address was looked up once, in the listing."""

    def gone(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", gone)
    with pytest.raises(UserError, match="Name or service not known, 3 times; the same command continues"):
        on_web.localize()
    assert slept == [1.0] * (1 + 2)


def test_secrets_of_an_address_are_shown_nowhere_user_and_password_are_a_header(web, options, capsys):
    web.files[PATH] = TEXT
    (source,) = open_sources([web.url.replace("://", "://me:pa%3Ass@") + PATH + "?sig=secret"], options)
    assert source.localize().path.read_bytes() == TEXT
    assert "secret" not in json.dumps(source.record())
    assert web.asked[-1][3] == "Basic " + base64.b64encode(b"me:pa:ss").decode()
    assert "me:" not in json.dumps(source.record())
    print_note(f"{web.url.replace('://', '://me:secret@')}/b.txt could not be read")
    assert "secret" not in capsys.readouterr().err


def test_a_damaged_download_is_fetched_again_when_the_hash_is_known(web, options):
    web.files[PATH] = TEXT
    (source,) = open_sources([f"{web.url}{PATH}#sha256={hashlib.sha256(TEXT).hexdigest()}"], options)
    kept = source.localize().path
    kept.write_bytes(bytes(len(TEXT)))
    assert source.localize().path.read_bytes() == TEXT
    kept.unlink()
    kept.with_name("a.txt.partial").write_bytes(b"x" * 500)
    assert source.localize().path.read_bytes() == TEXT
    assert starts(web)[-2:] == [500, None]


def test_another_hash_than_the_published_one_is_refused(web, options):
    web.files[PATH] = TEXT
    (source,) = open_sources([web.url + PATH + "#sha256=" + "ab" * 32], options)
    with pytest.raises(UserError, match=r"a\.txt arrived twice with another sha256 hash than the published one"):
        source.localize()
    assert not source.remote.path.exists()


def test_a_changed_file_is_another_download(web, options):
    paths = set()
    for version in (b"one", b"two"):
        web.files[PATH], web.headers = version, {"ETag": f'"{version.decode()}"'}
        (source,) = open_sources([web.url + PATH], options)
        local = source.localize()
        assert local.path.read_bytes() == version
        paths.add(local.path)
    assert len(paths) == 2


def test_an_address_that_is_not_one_readable_file_is_refused(web, options):
    for path in ("/", "/a.pdf"):
        with pytest.raises(UserError, match=r"is not the address of one file that is read; allowed are \.txt"):
            open_sources([web.url + path], options)


def test_progress_tells_bytes_and_why_it_waits(on_web, web):
    news: list[Download] = []
    web.faults.append((429, {"Retry-After": "2"}))
    on_web.localize(news.append)
    assert "trying again in 2 s: the server answered 429" in news[0].note
    assert (news[-1].bytes, news[-1].total) == (len(TEXT), len(TEXT))


def test_two_at_once_download_once(on_web, web):
    together = [threading.Thread(target=on_web.localize) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(web.asked) == 1


def test_a_full_disk_is_one_sentence(on_web, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk of the download folder is full; free space and run the same command"):
        on_web.localize()


def test_the_next_file_is_downloaded_while_one_is_read(web, options):
    names = [f"/{i}.txt" for i in range(4)]
    web.files.update(dict.fromkeys(names, TEXT))
    sources = open_sources([web.url + name for name in names], options)
    web.asked.clear()
    local = localized(sources)
    first = next(local)
    assert isinstance(first, SourceFile)
    assert [source.path.read_bytes() for source in local] == [TEXT] * 3
    assert [asked.path for asked in web.asked] == names


def test_a_reader_that_leaves_stops_the_download(options):
    """The stream would never end: it goes on until whoever watches it raises."""
    opened = threading.Event()

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            opened.set()
            return b"x"

    class Open:
        def __enter__(self):
            return Endless(), 0

        def __exit__(self, *error):
            return None

    address = "https://host/s.txt"
    opened_at = lambda address, offset, timeout_s: Open()  # noqa: E731
    endless = RemoteSource("s", RemoteFile("s.txt", 1 << 40, address, address, opened_at, options))  # type: ignore[arg-type]
    done = SourceFile("a", "a", Path("a"))
    local = localized([done, endless])
    assert next(local) is done
    assert opened.wait(30)
    local.close()
    assert endless.remote.path.with_name("s.txt.partial").exists()


def test_a_set_on_the_hub_is_read_like_its_files(hub, options, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(500)]}), content, row_group_size=90)
    files = {"data/a.parquet": content.getvalue(), "data/b.jsonl": jsonl(["x", "y"]), "data/readme.pdf": b"%PDF"}
    hub.add("owner/name", files)
    sources = hub_source(hub, options, "hf://datasets/owner/name/data")
    assert [(source.file, source.bytes) for source in sources] == [
        (name, len(files[name])) for name in ("data/a.parquet", "data/b.jsonl")
    ]
    texts = [document.text for source in localized(sources) for document in source.documents()]
    assert texts == [*pq.read_table(io.BytesIO(content.getvalue()))["text"].to_pylist(), "x", "y"]
    assert sources[0].record() == {
        "source": "hf://datasets/owner/name/data",
        "file": "data/a.parquet",
        "bytes": len(content.getvalue()),
        "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        "url": "hf://datasets/owner/name@0123456789abcdef0123456789abcdef01234567/data/a.parquet",
    }


def test_the_hub_is_asked_for_a_file_a_glob_or_a_revision(hub, options):
    hub.add("owner/name", {"a/1.txt": b"1", "a/2.txt": b"2", "b/3.txt": b"3", "b/c/4.md": b"4"})

    def found(path: str) -> list[str]:
        return [source.file for source in hub_source(hub, options, f"hf://datasets/owner/name{path}")]

    assert found("/a/2.txt") == ["a/2.txt"]
    assert found("/a/*.txt") == ["a/1.txt", "a/2.txt"]
    assert found("/b/*") == ["b/3.txt"]
    assert found("@main/**/[34].*") == ["b/3.txt", "b/c/4.md"]
    assert found("") == ["a/1.txt", "a/2.txt", "b/3.txt", "b/c/4.md"]


def test_a_wrong_hash_from_the_hub_is_refused(hub, options):
    hub.add("owner/name", {"a.txt": TEXT})
    (source,) = hub_source(hub, options, "hf://datasets/owner/name/a.txt")
    assert source.localize().path.read_bytes() == TEXT
    source.remote.path.unlink()
    hub.files["/cdn/owner/name/a.txt"] = TEXT[:-1] + b"?"
    with pytest.raises(UserError, match="another sha256 hash than the published one"):
        source.localize()


def test_the_hub_survives_cuts_and_errors(hub, options):
    hub.add("owner/name", {"a.txt": TEXT})
    (source,) = hub_source(hub, options, "hf://datasets/owner/name/a.txt")
    hub.faults.extend([40_000, (429, {"Retry-After": "1"}), (500, {}), 60_000])
    assert source.localize().path.read_bytes() == TEXT
    assert [asked.start for asked in hub.asked if "/cdn/" in asked.path] == [None, 40_000, 40_000, 40_000, 100_000]


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, options, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("owner/name", {"a.txt": TEXT})
    hub_source(hub, options, "hf://datasets/owner/name/a.txt")[0].localize()
    assert [(asked.host.split(":")[0], asked.token) for asked in hub.asked] == [
        ("127.0.0.1", "Bearer hf_secret"),
        ("localhost", None),
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://datasets/owner/name/*.jsonl", r"no file matches hf://datasets/owner/name/\*\.jsonl"),
        ("hf://datasets/owner/nothing/*.txt", r"could not be read: the server answered 404 Not Found; check the name"),
        ("http://127.0.0.1:9/a.txt", r"no connection to 127\.0\.0\.1: .*refused; check"),
        ("hf://owner/name/a.txt", "no address of a data set; write hf://datasets/OWNER/NAME/PATH"),
        ("hf://datasets/owner/na..me/a.txt", "no address of a data set"),
        ("hf://datasets/owner/name/*", r"readme\.pdf' is of a kind that is not read; allowed are \.txt"),
        (
            "ftp2://host/a.txt",
            r"of an unknown kind; give s3://…, gs://…, a local path, or to read text also https://…",
        ),
    ],
)
def test_a_wrong_address_is_one_sentence(hub, options, source, said):
    hub.add("owner/name", {"a.txt": TEXT, "readme.pdf": b"x"})
    with pytest.raises(UserError, match=said) as error:
        hub_source(hub, options, source)
    assert "\n" not in str(error.value)


def test_hf_endpoint_stands_in_for_the_hub(hub, tmp_path):
    hub.add("owner/name", {"a.txt": TEXT})
    code = (
        "import sys; from pathlib import Path; from regpt.prepare.named import open_sources\n"
        "from regpt.remote.download import RemoteOptions\n"
        "(a,) = open_sources(['hf://datasets/owner/name/*.txt'], RemoteOptions(cache=Path(sys.argv[1])))\n"
        "sys.stdout.write(a.localize().sha256)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == hashlib.sha256(TEXT).hexdigest()


def test_a_redirect_on_the_same_host_keeps_the_token(web):
    web.files[PATH] = TEXT
    web.faults.append((302, {"Location": PATH}))
    with open_http(web.url + "/moved.txt", 0, 5.0, "Bearer x") as (stream, start):
        assert (stream.read(), start) == (TEXT, 0)
    assert [asked.token for asked in web.asked] == ["Bearer x", "Bearer x"]


def test_huggingface_hub_is_named_when_it_is_missing(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub; install it with: pip install 'regpt\[data\]'"):
        open_sources(["hf://datasets/owner/name"], options)


def test_a_remote_source_can_be_sent_to_another_process(on_web, options):
    remote = RemoteFile("f", 1, "u", "a", open_http, RemoteOptions(options.cache))
    plain = pickle.loads(pickle.dumps(RemoteSource("s", remote)))
    assert plain.source == "s"
    assert pickle.loads(pickle.dumps(on_web.localize())) == on_web.localize()
