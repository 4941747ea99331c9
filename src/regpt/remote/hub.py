"""Data sets on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION]/PATH` → names, sizes, hashes.

huggingface_hub lists the files, knows the endpoint (HF_ENDPOINT) and the token (HF_TOKEN, `hf auth login`), and says
what its own folder of downloads holds. It does not download here: version 2.4 deletes what an interrupted download
brought.
"""

import re
import urllib.parse
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.remote.download import Checksum, RemoteFile, RemoteOptions, Stream
from regpt.remote.network import reach
from regpt.remote.retry import persistently
from regpt.remote.web import open_http

ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)
MAGIC = re.compile(r"[*?[]")


def list_dataset(source: str, options: RemoteOptions) -> tuple[list[RemoteFile], str | None]:
    """The files that `source` names, at the commit that its revision means now, and the folder that it is.

    Raises:
        UserError: no such address, data set, revision or file; no access; no network; huggingface_hub is missing.
    """
    endpoint, patience = options.endpoint, options.patience.of_listing()
    hub = import_hub(source)
    match = ADDRESS.fullmatch(source)
    how = "write hf://datasets/OWNER/NAME/PATH or hf://datasets/OWNER/NAME@REVISION/PATH"
    if not match:
        raise UserError(f"{source} is no address of a data set; {how}")
    api, repo = hub.HfApi(endpoint=endpoint), match["repo"]
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None
    path = (match["path"] or "").strip("/")
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            persistently(lambda: reach(api.endpoint), source, patience)
        commit = persistently(lambda: api.dataset_info(repo, revision=revision).sha, source, patience)
        entries, root = persistently(lambda: tree(api, repo, commit, path), source, patience)
    except hub.errors.HFValidationError as error:
        raise UserError(f"{source} is no address of a data set ({error}); {how}") from None
    place = {"repo_type": "dataset", "revision": commit}

    def file(entry: Any) -> RemoteFile:
        size, checksum = size_and_hash(entry)
        url = f"hf://datasets/{repo}@{commit}/{entry.path}"
        address = hub.hf_hub_url(repo, entry.path, **place, endpoint=endpoint)
        kept = hub.try_to_load_from_cache(repo, entry.path, **place)
        there = Path(kept) if isinstance(kept, str) else None
        return RemoteFile(entry.path, size, url, address, open_on_hub, options, checksum, kept=there)

    return [file(entry) for entry in entries], root


def tree(api: Any, repo: str, commit: str, path: str) -> tuple[list[Any], str | None]:
    """huggingface_hub's description of each file that `path` names, and the folder that it is."""
    place = {"repo_id": repo, "revision": commit, "repo_type": "dataset"}
    matches, folder = None, path
    if found := MAGIC.search(path):
        from fsspec.utils import glob_translate

        matches, folder = re.compile(glob_translate(path)), path[: found.start()].rpartition("/")[0]
    elif path:
        known = [entry for entry in api.get_paths_info(paths=[path], **place) if hasattr(entry, "size")]
        if known:
            return known, None
    entries = api.list_repo_tree(path_in_repo=folder or None, recursive=True, **place)
    files = [entry for entry in entries if hasattr(entry, "size")]  # a folder has none
    return [file for file in files if not matches or matches.match(file.path)], None if matches else path


def size_and_hash(entry: Any) -> tuple[int, Checksum | None]:
    if entry.lfs:
        return entry.lfs.size, Checksum("sha256", entry.lfs.sha256)
    in_git = not getattr(entry, "xet_hash", None)  # otherwise the blob is a pointer to the content
    return entry.size, Checksum("blob", entry.blob_id) if in_git else None


def open_on_hub(address: str, offset: int, timeout_s: float) -> Stream:
    """The stream of `open_http`, asked for with the user's token."""
    from huggingface_hub.utils import build_hf_headers

    return open_http(address, offset, timeout_s, build_hf_headers().get("authorization"))


def import_hub(source: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"reading {source} needs huggingface_hub; install it with: pip install 'regpt[data]'") from None
    return huggingface_hub
