"""Files in buckets (s3, gs and whatever else fsspec knows): their description, and a stream from any offset.

Credentials, regions and endpoints are those of s3fs and gcsfs (their environment variables and files, and
`~/.config/fsspec/*.json`).
"""

import base64
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from regpt.errors import UserError
from regpt.remote.download import Checksum, RemoteFile, RemoteOptions
from regpt.remote.network import reach
from regpt.remote.retry import PATIENCE, Patience, persistently

MAGIC = re.compile(r"[*?[]")
BLOCK_BYTES = 16 << 20  # asked for at a time
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
VERSIONS = ("ETag", "etag", "generation", "LastModified", "mtime", "created")


def list_bucket(source: str, options: RemoteOptions) -> tuple[list[RemoteFile], str | None]:
    """The files that `source` names, and the folder that it is.

    Raises:
        UserError: a scheme that is not known, a package that is missing, no access, no network, nothing there.
    """
    patience = options.patience.of_listing()
    fs, path = file_system(source, patience)
    persistently(lambda: reach_store(fs), source, patience)
    infos, is_folder = persistently(lambda: describe(fs, path), source, patience)
    files = [bucket_file(fs.unstrip_protocol(name), info, options) for name, info in infos.items()]
    return files, fs.unstrip_protocol(path) if is_folder else None


def reach_store(fs: Any) -> None:
    """Raise `Unreached` where there is no connection to the server of s3fs or gcsfs, whose own tries take minutes."""
    if "s3" in fs.protocol:
        fs.connect()  # makes a client, and asks nobody
        reach(fs.s3.meta.endpoint_url)
    elif "gs" in fs.protocol:
        reach(fs.base)


def describe(fs: Any, path: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """fsspec's description of each file that `path` names, and whether it is a folder."""
    if MAGIC.search(path):
        found = fs.glob(path, detail=True)
        return {name: info for name, info in found.items() if info["type"] == "file"}, False
    info = fs.info(path)
    return (fs.find(path, detail=True), True) if info["type"] == "directory" else ({info["name"]: info}, False)


def bucket_file(url: str, info: dict[str, Any], options: RemoteOptions) -> RemoteFile:
    md5 = info.get("md5Hash")  # Google's; an S3 ETag is a hash only of objects that came in one piece, unencrypted
    checksum = Checksum("md5", base64.b64decode(md5).hex()) if md5 else None
    version = next((str(info[key]) for key in VERSIONS if key in info), "")
    return RemoteFile(url, int(info["size"]), url, url, open_bucket, options, checksum, version)


def file_system(source: str, patience: Patience = PATIENCE) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    _, known_implementations = import_fsspec(source)
    scheme = source.split("://")[0].lower()
    if scheme in ("file", "local") or scheme not in known_implementations:
        kinds = "hf://datasets/…, https://…, s3://…, gs://… or a local path"
        raise UserError(f"{source} is an address of a kind that is not read; give {kinds}")
    return connect(source, patience=patience)


def connect(address: str, doing: str = "reading", patience: Patience = PATIENCE, **options: Any) -> tuple[Any, str]:
    """fsspec's file system for an address of a scheme that it knows, with these options, and the path in it.

    Raises:
        UserError: no bucket in the address, a package that is missing, or a server that cannot be reached; `doing`
            begins the sentence.
    """
    fsspec, known_implementations = import_fsspec(address, doing)
    scheme, path = address.split("://", 1)
    scheme = scheme.lower()
    if scheme in PACKAGES and not path.split("/")[0]:
        raise UserError(f"{address} names no bucket; an address looks like {scheme}://BUCKET/PATH")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises
    try:
        if scheme in (
            "gs",
            "gcs",
        ):  # which asks for credentials at once, where there is no network for a quarter minute
            anonymous = fsspec.get_filesystem_class(scheme)(token="anon", skip_instance_cache=True)
            persistently(lambda: reach_store(anonymous), address, patience)
        return fsspec.url_to_fs(address, **options)
    except OSError as error:  # some connect at once
        raise UserError(f"{address} could not be read: {error.strerror or error}") from None
    except ImportError:
        package = PACKAGES.get(scheme)
        fix = f"{package}; install it with: pip install 'regpt[buckets]'"
        said = fix if package else known_implementations[scheme]["err"]
        raise UserError(f"{doing} {address} needs {said}") from None


@contextmanager
def open_bucket(address: str, offset: int, timeout_s: float) -> Iterator[tuple[BinaryIO, int]]:
    fs, path = file_system(address)
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as stream:
        stream.seek(offset)
        yield stream, offset


def import_fsspec(source: str, doing: str = "reading") -> tuple[Any, Any]:
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError:
        raise UserError(f"{doing} {source} needs fsspec; install it with: pip install 'regpt[data]'") from None
    return fsspec, known_implementations
