"""Hub names, against a local server that imitates the hub; nothing here reaches the internet."""

import hashlib
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from regpt.checkpoint.export import export_hf
from regpt.checkpoint.hub import repository

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import sys, warnings
warnings.simplefilter("error")
from regpt.checkpoint.open import open_model
from regpt.errors import UserError
try:
    opened = open_model(sys.argv[1])
except UserError as error:
    print(f"{type(error).__name__}: {error}")
else:
    print(opened.source, opened.model.config.n_embd, opened.tokenizer.n_vocab)
"""


class Hub(BaseHTTPRequestHandler):
    """`/OWNER/NAME/resolve/REVISION/FILE` from the folder `root/NAME`; 401 for a repository that is not there."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, root: Path, asked: list[str]):
        self.root, self.asked = root, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        _, _, name, _, _, file = self.path.split("/")
        self.asked.append(f"{self.command} {file}")
        path = self.root / name / file
        content = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if path.is_file() else 404 if path.parent.is_dir() else 401)
        if path.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        elif path.parent.is_dir():
            self.send_header("X-Error-Code", "EntryNotFound")
        else:  # what the hub tells a stranger
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        pass


class Server:
    """The imitation, and `open` to open a model in a process that takes it for the hub."""

    def __init__(self, folder: Path):
        self.root, self.cache, self.asked = folder / "hub", folder / "cache", []
        self.root.mkdir()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=self.root, asked=self.asked))
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def open(self, name: str) -> str:
        proxies = ("http_proxy", "https_proxy", "all_proxy", "hf_token", "hf_hub_offline")
        env = {key: value for key, value in os.environ.items() if key.lower() not in proxies}
        env |= {"HF_ENDPOINT": self.address, "HF_HOME": str(self.cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", OPEN, name]
        done = subprocess.run(command, env=env, cwd=self.root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def hub(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop()


def test_a_model_is_downloaded_once_and_opens_without_the_hub(hub, model, tokenizer):
    folder = export_hf(model, tokenizer, hub.root / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    assert hub.open("someone/tiny") == "someone/tiny 27 263"
    fetched = sorted(line.split()[1] for line in hub.asked if line.startswith("GET"))
    assert fetched == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.stop()
    assert hub.open("someone/tiny") == "someone/tiny 27 263"
    said = hub.open("someone/other")
    assert said.startswith("UserError: model 'someone/other' is not in the hub's cache and the hub cannot be reached")
    assert "give a local folder" in said


def test_an_unknown_repository_and_one_without_safetensors_are_one_sentence(hub, model, tokenizer):
    assert hub.open("someone/typo").startswith(
        "UserError: the hub has no public repository 'someone/typo'; check the name"
    )
    folder = export_hf(model, tokenizer, hub.root / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = hub.open("someone/pickled")
    assert said.startswith(
        "UserError: hub repository 'someone/pickled' has no model.safetensors, and regpt never reads"
    )
    assert not any("pytorch_model.bin" in line for line in hub.asked)


def test_a_model_of_another_kind_is_refused_before_its_weights_are_downloaded(hub):
    (hub.root / "llama").mkdir()
    (hub.root / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (hub.root / "llama" / "model.safetensors").write_bytes(b"gigabytes")
    assert "config.json has model_type 'llama'" in hub.open("someone/llama")
    assert not any("safetensors" in line for line in hub.asked)


def test_short_names_are_openais_repositories():
    assert repository("gpt2-xl") == "openai-community/gpt2-xl"
    assert repository("openai-community/gpt2") == "openai-community/gpt2"
    assert [repository(name) for name in ("bert", "a/b/c", "../x", "/x/y", "")] == [None] * 5
