"""Download a model from the Hugging Face hub into its own cache: only the files that are read."""

import re
from dataclasses import dataclass
from pathlib import Path

from regpt.errors import UserError
from regpt.hf.folder import CONFIG, INDEX, PICKLE, WEIGHTS, hf_config, how_to_convert
from regpt.remote.network import WAYS_OUT, reach
from regpt.tensors import shard_names
from regpt.text.folder import ADDED, MERGES, NAMES, OPTIONS, TOKENIZER, VOCAB

# GPT-2's short names, and where OpenAI's weights lie.
SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9]([\w.-]*\w)?", re.ASCII)
UNNAMED = re.compile(r"--|\.\.|\.git$|.{97}")  # what the hub does not have in a name
TIMEOUT_S = 5.0  # for the first answer; a download itself may take as long as it needs
LOCAL = f"or give a local folder with {CONFIG} and {WEIGHTS}"


def repository(name: str) -> str | None:
    """The hub's full name for `name`: a short name of GPT-2's or `owner/repository`; None for anything else."""
    return SHORT_NAMES.get(name) or (name if REPOSITORY.fullmatch(name) and not UNNAMED.search(name) else None)


@dataclass(frozen=True)
class Repository:
    """A repository on the hub; `trouble` says why the hub does not answer, and then only the cache is read."""

    name: str
    trouble: str | None

    def file(self, file: str, commit: str | None = None) -> Path | None:
        """Where `file` lies in the cache, downloaded if need be; None when there is no such file.

        Without a `commit` it is the newest one, and the cache remembers which that was.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HTTPError,  # pyright: ignore[reportPrivateImportUsage] (httpx's or requests', whichever the library uses)
            LocalEntryNotFoundError,
        )

        if self.trouble is not None:  # not hf_hub_download(local_files_only=True), which asks the network who it is
            kept = try_to_load_from_cache(self.name, file, revision=commit)
            return Path(kept) if isinstance(kept, str) else None
        try:
            return Path(hf_hub_download(self.name, file, revision=commit))
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError, too
            raise unreachable(self.name, reason(error)) from None
        except EntryNotFoundError:
            return None
        except (OSError, HTTPError) as error:
            raise unreachable(self.name, reason(error)) from None


def download_model(repo: str) -> Path:
    """The folder in the hub's cache that holds `repo`, as a Hugging Face folder.

    Raises:
        UserError: no such repository, no network and not in the cache, no safetensors, or a model that we do not
            implement; the last is known before the weights are downloaded.
    """
    remote = connect(repo)
    config = remote.file(CONFIG)
    if config is None:
        raise unreachable(repo, remote.trouble) if remote.trouble else no_model(repo)
    folder = config.parent  # named after the commit, to which the other files must belong as well
    hf_config(folder)
    has_tokenizer = remote.file(TOKENIZER, folder.name) or all(
        remote.file(file, folder.name)
        for file in (VOCAB, MERGES)  # older models have these instead
    )
    if not has_tokenizer and remote.trouble:
        raise unreachable(repo, remote.trouble)
    for file in (OPTIONS, ADDED, NAMES):
        remote.file(file, folder.name)
    if remote.file(WEIGHTS, folder.name) is None:
        index = remote.file(INDEX, folder.name)
        if index is None and remote.trouble:
            raise unreachable(repo, remote.trouble)
        if index is None:
            raise UserError(
                f"hub repository {repo!r} has no {WEIGHTS}, and regpt never reads {PICKLE}; {how_to_convert()}"
            )
        for shard in shard_names(index):
            remote.file(shard, folder.name)
    return folder


def connect(repo: str) -> Repository:
    """`repo`, after one request that is not repeated: the library's own retries take half a minute without a network.

    Raises:
        UserError: huggingface_hub is not installed, or the hub knows no such repository.
    """
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HTTPError,  # pyright: ignore[reportPrivateImportUsage]
            RepositoryNotFoundError,
        )
    except ImportError:
        raise UserError(
            f"model {repo!r} is on the hub, which needs huggingface_hub; run: pip install 'regpt[data]', {LOCAL}"
        ) from None
    try:
        if not constants.HF_HUB_OFFLINE:
            reach(hf_hub_url(repo, CONFIG))
        get_hf_file_metadata(hf_hub_url(repo, CONFIG), timeout=TIMEOUT_S)
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no public repository {repo!r}; check the name, {LOCAL}") from None
    except EntryNotFoundError:
        raise no_model(repo) from None
    except (OSError, HTTPError) as error:
        return Repository(repo, reason(error))
    return Repository(repo, None)


def no_model(repo: str) -> UserError:
    return UserError(
        f"hub repository {repo!r} has no {CONFIG}, so it is no model for transformers; choose another, {LOCAL}"
    )


def unreachable(repo: str, why: str) -> UserError:
    return UserError(
        f"model {repo!r} is not in the hub's cache and the hub cannot be reached ({why}); {WAYS_OUT}, {LOCAL}"
    )


def reason(error: Exception) -> str:
    """The first line of what `error` says, or its type when it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
