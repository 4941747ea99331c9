"""Files in buckets (s3, gs and whatever else fsspec knows): their description, and a stream from any offset.

Credentials, regions and endpoints are those of s3fs and gcsfs (their environment variables and files, and
`~/.config/fsspec/*.json`).
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from regpt.errors import UsageError, UserError, import_extra
from regpt.remote.download import RemoteFile, RemoteOptions
from regpt.remote.network import reach
from regpt.remote.retry import persistently

MAGIC = re.compile(r"[*?[]")
BLOCK_BYTES = 16 << 20  # asked for at a time
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
VERSIONS = ("ETag", "etag", "generation", "LastModified", "mtime", "created")


def list_bucket(source: str, options: RemoteOptions) -> tuple[list[RemoteFile], str | None]:
    """The files that `source` names, and the folder that it is.

    Raises:
        UserError: a scheme that is not known, a package that is missing, no access, no network, nothing there.
    """
    fs, path = connect(source)
    infos, is_folder = persistently(lambda: describe(fs, path), source, options.patience)
    files = [bucket_file(fs.unstrip_protocol(name), info, options) for name, info in infos.items()]
    return files, fs.unstrip_protocol(path) if is_folder else None


def describe(fs: Any, path: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """fsspec's description of each file that `path` names, and whether it is a folder."""
    if MAGIC.search(path):
        found = fs.glob(path, detail=True)
        return {name: info for name, info in found.items() if info["type"] == "file"}, False
    info = fs.info(path)
    return (fs.find(path, detail=True), True) if info["type"] == "directory" else ({info["name"]: info}, False)


def bucket_file(url: str, info: dict[str, Any], options: RemoteOptions) -> RemoteFile:
    version = next((str(info[key]) for key in VERSIONS if key in info), "")
    return RemoteFile(url, int(info["size"]), url, url, open_bucket, options, version=version)


def connect(address: str, doing: str = "reading", **options: Any) -> tuple[Any, str]:
    """fsspec's file system for an address, with these options, whose server answers; and the path in it.

    Raises:
        UsageError: an unknown scheme.
        UserError: no bucket in the address, a missing package, or an unreachable server; `doing` begins the sentence.
    """
    fsspec = import_extra("fsspec", f"{doing} {address} needs fsspec", "data")
    from fsspec.registry import known_implementations

    scheme, _, path = address.partition("://")
    scheme = scheme.lower()
    if scheme not in known_implementations or (doing == "reading" and scheme in ("file", "local")):
        kinds = "s3://…, gs://…, a local path, or to read text also https://… and hf://datasets/…"
        raise UsageError(f"{address} is an address of an unknown kind; give {kinds}")
    if scheme in PACKAGES and not path.split("/")[0]:
        raise UserError(f"{address} names no bucket; an address looks like {scheme}://BUCKET/PATH")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises
    try:
        if scheme in ("gs", "gcs"):  # asks for credentials at once, without a network for a quarter of a minute
            reach(fsspec.get_filesystem_class(scheme)(token="anon", skip_instance_cache=True).base)
        fs, path = fsspec.url_to_fs(address, **options)
        if "s3" in fs.protocol:
            fs.connect()  # makes a client, and asks nobody
            reach(fs.s3.meta.endpoint_url)
        return fs, path
    except OSError as error:  # some connect at once
        raise UserError(f"{address} could not be read: {error.strerror or error}") from None
    except ImportError:
        package = PACKAGES.get(scheme)
        fix = f"{package}; install it with: pip install 'regpt[buckets]'"
        raise UserError(f"{doing} {address} needs {fix if package else known_implementations[scheme]['err']}") from None


@contextmanager
def open_bucket(address: str, offset: int, timeout_s: float) -> Iterator[tuple[BinaryIO, int]]:
    fs, path = connect(address)
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as stream:
        stream.seek(offset)
        yield stream, offset
