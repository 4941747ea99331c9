"""A local server that imitates the Hugging Face hub; nothing here reaches the internet."""

import hashlib
import json
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
        if self.path.startswith("/api/models/"):
            self.list_files(self.path.split("/")[4])
            return
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

    def list_files(self, name: str) -> None:
        """`/api/models/OWNER/NAME/tree/REVISION` and `/api/models/OWNER/NAME/revision/REVISION`."""
        paths = sorted((self.root / name).iterdir())
        tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in paths]
        info = {"id": f"someone/{name}", "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in paths]}
        content = json.dumps(tree if "/tree/" in self.path else info).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        pass


class Server:
    """The imitation; repositories are folders in `root`."""

    def __init__(self, folder: Path):
        self.root, self.cache, self.asked = folder / "hub", folder / "cache", []
        self.root.mkdir()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=self.root, asked=self.asked))
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self) -> dict[str, str]:
        """For a process that takes it for the hub."""
        proxies = ("http_proxy", "https_proxy", "all_proxy", "hf_token", "hf_hub_offline")
        env = {key: value for key, value in os.environ.items() if key.lower() not in proxies}
        return env | {"HF_ENDPOINT": self.address, "HF_HOME": str(self.cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
