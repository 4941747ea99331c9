"""Download a model from the Hugging Face hub into its own cache: only the files that are read."""

import re
from pathlib import Path

from regpt.errors import UserError
from regpt.files import is_file
from regpt.hf.folder import CONFIG, HOW_TO_CONVERT, INDEX, PICKLE, WEIGHTS, hf_config
from regpt.remote.network import WAYS_OUT, Unreached, reach
from regpt.text.folder import ADDED, CERTIFICATE, CHAT, GENERATION, MERGES, MODEL, NAMES, OPTIONS, TOKENIZER, VOCAB

# GPT-2's short names, and where OpenAI's weights lie.
SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9]([\w.-]*\w)?", re.ASCII)
UNNAMED = re.compile(r"--|\.\.|\.git$|.{97}")  # what the hub does not have in a name
TEXT_FILES = (TOKENIZER, VOCAB, MERGES, MODEL, OPTIONS, ADDED, NAMES, GENERATION, CHAT, CERTIFICATE)
FILES = [*TEXT_FILES, "params.json", WEIGHTS, INDEX, "model-*-of-*.safetensors"]
LOCAL = f"or give a local folder with {CONFIG} and {WEIGHTS}"


def repository(name: str) -> str | None:
    """The hub's full name for `name`: a short name of GPT-2's or `owner/repository`; None for anything else."""
    return SHORT_NAMES.get(name) or (name if REPOSITORY.fullmatch(name) and not UNNAMED.search(name) else None)


def download_model(repo: str) -> Path:
    """The folder in the hub's cache that holds `repo`, as a Hugging Face folder; only the cache is read where the hub
    does not answer.

    Raises:
        UserError: no such repository, no network and not in the cache, no safetensors, no huggingface_hub, or a model
            that we do not implement; the last is known before the weights are downloaded.
    """
    try:
        from huggingface_hub import constants, hf_hub_download, hf_hub_url, snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HTTPError,  # pyright: ignore[reportPrivateImportUsage] (httpx's or requests', whichever the library uses)
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise UserError(
            f"model {repo!r} is on the hub, which needs huggingface_hub; run: pip install 'regpt[data]', {LOCAL}"
        ) from None
    trouble = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    try:
        if not trouble:
            reach(hf_hub_url(repo, CONFIG), tries=1)  # the library's own retries take half a minute without a network
            folder = Path(hf_hub_download(repo, CONFIG)).parent  # named after the commit
            hf_config(folder)
            snapshot_download(repo, revision=folder.name, allow_patterns=FILES)
            return with_weights(folder, repo)
    except Unreached as error:
        trouble = error.why
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no public repository {repo!r}; check the name, {LOCAL}") from None
    except (OSError, HTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"hub repository {repo!r} has no {CONFIG}, so it is no model for transformers; choose another, {LOCAL}"
            ) from None
        trouble = next(iter(str(error).splitlines()), "") or type(error).__name__
    kept = try_to_load_from_cache(repo, CONFIG)
    if not isinstance(kept, str):
        raise UserError(
            f"model {repo!r} is not a file or folder here and not in the hub's cache, and the hub cannot be reached "
            f"({trouble}); {WAYS_OUT}, {LOCAL}"
        )
    hf_config(Path(kept).parent)
    return with_weights(Path(kept).parent, repo)


def with_weights(folder: Path, repo: str) -> Path:
    """`folder`; a UserError where it holds no safetensors."""
    if not (is_file(folder / WEIGHTS) or is_file(folder / INDEX)):
        raise UserError(f"hub repository {repo!r} has no {WEIGHTS}, and regpt never reads {PICKLE}; {HOW_TO_CONVERT}")
    return folder
