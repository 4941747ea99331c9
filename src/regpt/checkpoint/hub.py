"""Download a model from the Hugging Face hub into its own cache: only the files that are read."""

import re
from dataclasses import dataclass
from pathlib import Path

from regpt.checkpoint.hf_folder import CONFIG, INDEX, PICKLE, TOKENIZER, WEIGHTS, hf_config, how_to_convert, shard_names
from regpt.errors import UserError

# GPT-2's short names, and where OpenAI's weights lie.
SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TIMEOUT_S = 5.0  # for the first answer; a download itself may take as long as it needs
LOCAL = f"or give a local folder with {CONFIG} and {WEIGHTS}"


def repository(name: str) -> str | None:
    """The hub's full name for `name`: a short name of GPT-2's or `owner/repository`; None for anything else."""
    return SHORT_NAMES.get(name) or (name if REPOSITORY.fullmatch(name) else None)


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository; without a commit, what the cache holds of it, because the hub does not answer."""

    repo: str
    commit: str | None

    def file(self, name: str) -> Path | None:
        """Where the file `name` lies in the cache, downloaded if need be; None when the repository has no such file."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (httpx's or requests', whichever the hub's library uses)
            LocalEntryNotFoundError,
        )

        try:
            return Path(hf_hub_download(self.repo, name, revision=self.commit, local_files_only=self.commit is None))
        except LocalEntryNotFoundError as error:
            if self.commit is None:
                return None
            raise unreachable(self.repo, error) from None
        except EntryNotFoundError:
            return None
        except (OSError, HTTPError) as error:
            raise unreachable(self.repo, error) from None


def download(repo: str) -> Path:
    """The folder in the hub's cache that holds `repo`, as a Hugging Face folder.

    Raises:
        UserError: no such repository, no network and not in the cache, no safetensors, or a model that we do not
            implement; the last is known before the weights are downloaded.
    """
    snapshot = connect(repo)
    config = snapshot.file(CONFIG)
    if config is None:
        if snapshot.commit is None:
            raise unreachable(repo, "no answer")
        raise UserError(
            f"hub repository {repo!r} has no {CONFIG}, so it is no model for transformers; choose another, {LOCAL}"
        )
    folder = config.parent
    hf_config(folder)
    snapshot.file(TOKENIZER)
    if snapshot.file(WEIGHTS) is None:
        index = snapshot.file(INDEX)
        if index is None and snapshot.commit is None:
            raise unreachable(repo, "no answer")
        if index is None:
            raise UserError(
                f"hub repository {repo!r} has no {WEIGHTS}, and regpt never reads {PICKLE}; {how_to_convert()}"
            )
        for shard in shard_names(index):
            snapshot.file(shard)
    return folder


def connect(repo: str) -> Snapshot:
    """The newest commit of `repo`, by one request that is not repeated: without a network this fails in seconds.

    Raises:
        UserError: huggingface_hub is not installed, or the hub knows no such repository.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
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
        return Snapshot(repo, get_hf_file_metadata(hf_hub_url(repo, CONFIG), timeout=TIMEOUT_S).commit_hash)
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no public repository {repo!r}; check the name, {LOCAL}") from None
    except EntryNotFoundError:
        raise UserError(
            f"hub repository {repo!r} has no {CONFIG}, so it is no model for transformers; choose another, {LOCAL}"
        ) from None
    except (OSError, HTTPError):
        return Snapshot(repo, None)


def unreachable(repo: str, error: object) -> UserError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return UserError(
        f"model {repo!r} is not in the hub's cache and the hub cannot be reached ({reason}); check the network, {LOCAL}"
    )
