"""Data sets on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION]/PATH` → names, sizes, hashes.

huggingface_hub lists the files, knows the endpoint (HF_ENDPOINT) and the token (HF_TOKEN, `hf auth login`), and says
what its own folder of downloads holds. It does not download here: version 2.4 deletes what an interrupted download
brought.
"""

import re
import urllib.parse
from typing import Any, NamedTuple

from regpt.errors import UserError
from regpt.network import reach
from regpt.prepare.download import Checksum, Patience, persistently

ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)
MAGIC = re.compile(r"[*?[]")


class HubFile(NamedTuple):
    """One file at one commit: `url` for people and manifests, `address` to open."""

    name: str
    bytes: int
    checksum: Checksum | None
    url: str
    address: str


def list_dataset(source: str, endpoint: str | None, patience: Patience) -> tuple[list[HubFile], str | None]:
    """The files that `source` names, at the commit that its revision means now, and the folder that it is.

    Raises:
        UserError: no such address, data set, revision or file; no access; no network; huggingface_hub is missing.
    """
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
    url, place = f"hf://datasets/{repo}@{commit}/", {"repo_type": "dataset", "revision": commit, "endpoint": endpoint}
    return [
        HubFile(entry.path, *size_and_hash(entry), url + entry.path, hub.hf_hub_url(repo, entry.path, **place))
        for entry in entries
    ], root


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


def kept_by_hub(url: str) -> str | None:
    """Where huggingface_hub keeps the file of a `HubFile.url`, if it has it."""
    match = ADDRESS.fullmatch(url)
    assert match is not None, url
    found = import_hub(url).try_to_load_from_cache(
        match["repo"], match["path"], revision=match["revision"], repo_type="dataset"
    )
    return found if isinstance(found, str) else None


def authorization() -> str | None:
    """The header that carries the user's token; None without one."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers().get("authorization")


def import_hub(source: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"reading {source} needs huggingface_hub; install it with: pip install 'regpt[data]'") from None
    return huggingface_hub
