"""Data sets on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION]/PATH` → names, sizes, hashes.

huggingface_hub lists the files and knows the endpoint (HF_ENDPOINT) and the token (HF_TOKEN, `hf auth login`). It does
not download here: version 2.4 deletes the bytes of an interrupted download.
"""

import re
import urllib.parse
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from regpt.errors import UserError, import_extra
from regpt.remote.download import RemoteFile, RemoteOptions
from regpt.remote.network import reach
from regpt.remote.retry import persistently
from regpt.remote.web import open_http

DATASET = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)
MAGIC = re.compile(r"[*?[]")


def list_dataset(source: str, options: RemoteOptions) -> tuple[list[RemoteFile], str | None]:
    """The files that `source` names, at the commit that its revision means now, and the folder that it is.

    Raises:
        UserError: not an address, no such data set, revision or file; no access; no network; no huggingface_hub.
    """
    hub = import_extra("huggingface_hub", f"reading {source} needs huggingface_hub", "data")
    match = DATASET.fullmatch(source)
    how = "write hf://datasets/OWNER/NAME/PATH or hf://datasets/OWNER/NAME@REVISION/PATH"
    if not match:
        raise UserError(f"{source} is no address of a data set; {how}")
    api, repo = hub.HfApi(endpoint=options.endpoint), match["repo"]
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None

    def listed() -> tuple[str | None, list[Any], str | None]:
        commit = api.dataset_info(repo, revision=revision).sha
        return commit, *tree(api, repo, commit, (match["path"] or "").strip("/"))

    try:
        if not hub.constants.HF_HUB_OFFLINE:
            reach(api.endpoint)
        commit, entries, root = persistently(listed, source, options.patience)
    except hub.errors.HFValidationError as error:
        raise UserError(f"{source} is no address of a data set ({error}); {how}") from None

    def file(entry: Any) -> RemoteFile:
        size, sha256 = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, "")
        address = hub.hf_hub_url(repo, entry.path, repo_type="dataset", revision=commit, endpoint=options.endpoint)
        url = f"hf://datasets/{repo}@{commit}/{entry.path}"
        return RemoteFile(entry.path, size, url, address, open_on_hub, options, sha256)

    return [file(entry) for entry in entries], root


def tree(api: Any, repo: str, commit: str | None, path: str) -> tuple[list[Any], str | None]:
    """huggingface_hub's description of each file that `path` names, and the folder that it is."""
    place = {"repo_id": repo, "revision": commit, "repo_type": "dataset"}
    magic = MAGIC.search(path)
    if path and not magic:
        known = [entry for entry in api.get_paths_info(paths=[path], **place) if hasattr(entry, "size")]
        if known:
            return known, None
    folder = path[: magic.start()].rpartition("/")[0] if magic else path
    entries = api.list_repo_tree(path_in_repo=folder or None, recursive=True, **place)
    files = [entry for entry in entries if hasattr(entry, "size")]  # a folder has none
    if not magic:
        return files, path
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(path))
    return [file for file in files if matches.match(file.path)], None


def open_on_hub(address: str, offset: int, timeout_s: float) -> AbstractContextManager[tuple[BinaryIO, int]]:
    """The stream of `open_http`, asked for with the user's token."""
    from huggingface_hub.utils import build_hf_headers

    return open_http(address, offset, timeout_s, build_hf_headers().get("authorization"))
