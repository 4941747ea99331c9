"""Read a whole data folder and say what in it is damaged."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from regpt.data.manifest import SPLITS, Manifest, Shard, load_manifest, wrong_sizes
from regpt.errors import UserError
from regpt.files import file_sha256, is_file
from regpt.text.open import NAMED, open_tokenizer

SMALL_BYTES = 256 << 20  # half a second of SHA-256 on a core without instructions for it
LAST_PART = 2  # 0 read only, 1 an answer's text, 2 what the template writes in and after an answer
CHUNK_TOKENS = 16_000_000  # tokens compared at a time: tens of megabytes


def verify(folder: Path, progress: Callable[[str], None] | None = None) -> list[str]:
    """One sentence for each damage found, none for an intact folder; `progress` hears each file's name first.

    Files are hashed and compared with the manifest, and their contents with the format: documents start with the
    end-of-text token and nothing else is one (but for conversations, which have parts), starts increase, every token is
    in the vocabulary.

    Raises:
        UserError: there is no readable manifest.
    """
    manifest = load_manifest(folder)
    wrong = wrong_sizes(folder, manifest)
    damage = [*check_tokenizer(folder, manifest), *wrong.values()]
    for split in SPLITS:
        continued = False
        for shard in manifest.split(split):
            if progress:
                progress(shard.file)
            if not {shard.file, shard.idx_file, shard.parts_file} & wrong.keys():
                damage += check_shard(folder, shard, manifest, continued)
            continued = shard.continues
        if continued:
            damage.append(f"{folder / 'manifest.json'}: the last {split} shard continues in one that is not listed")
    return damage


def verify_small(folder: Path, manifest: Manifest, at_most: int = SMALL_BYTES) -> int | None:
    """Compare the hashes of all shards and indices if they have at most `at_most` bytes together; the bytes read, None
    where there are more.

    Raises:
        UserError: the first file that is damaged.
    """
    width = manifest.numpy_dtype.itemsize
    names = [(name, sha256) for shard in manifest.shards for name, _, sha256 in shard.files(width)]
    total = sum((folder / name).stat().st_size for name, _ in names)
    for name, sha256 in names if total <= at_most else ():
        if file_sha256(folder / name) != sha256:
            raise UserError(
                f"{folder / name} is damaged: its SHA-256 is not the manifest's; restore the file or prepare the "
                "folder again"
            )
    return total if total <= at_most else None


def check_tokenizer(folder: Path, manifest: Manifest) -> Iterator[str]:
    if manifest.tokenizer in NAMED:
        return
    path = folder / "tokenizer.json"
    if not is_file(path):
        yield f"{path} is missing"
    elif not is_tokenizer(path, manifest.tokenizer_sha256):
        yield f"{path} is damaged: its SHA-256 is not the manifest's"


def is_tokenizer(path: Path, sha256: str) -> bool:
    """Whether `path` is the tokenizer of this identity: for a BPE of ours the hash of its file, for others of its
    rules."""
    try:
        return file_sha256(path) == sha256 or open_tokenizer(path).sha256 == sha256
    except UserError:
        return False


def check_shard(folder: Path, shard: Shard, manifest: Manifest, continued: bool) -> list[str]:
    """What is wrong with one shard; `continued`: it begins inside a document of the shard before."""
    damage = [
        f"{folder / name} is damaged: its SHA-256 is not the manifest's"
        for name, _, expected in shard.files(manifest.numpy_dtype.itemsize)
        if file_sha256(folder / name) != expected
    ]
    if damage:  # what is in such a file would only repeat it
        return damage
    starts = np.fromfile(folder / shard.idx_file, dtype="<i8")
    if problem := wrong_starts(starts, shard.tokens, continued):
        return [f"{folder / shard.idx_file}: {problem}"]
    tokens = np.memmap(folder / shard.file, dtype=manifest.numpy_dtype, mode="r")
    if problem := wrong_tokens(tokens, starts, manifest, shard.parts_sha256 != ""):
        return [f"{folder / shard.file}: {problem}"]
    if shard.parts_sha256 and (problem := wrong_parts(np.fromfile(folder / shard.parts_file, np.uint8), starts)):
        return [f"{folder / shard.parts_file}: {problem}"]
    return []


def wrong_parts(parts: np.ndarray, starts: np.ndarray) -> str | None:
    """What is wrong with the parts of conversations, which begin with whatever their template writes."""
    if int(parts.max(initial=0)) > LAST_PART:
        return f"part {parts.max()} is not one of 0 to {LAST_PART}"
    if parts[starts].any():
        return "the first token of a conversation is trained on, and nothing precedes it"
    empty = int(np.count_nonzero(np.add.reduceat(parts, starts, dtype=np.int64) == 0)) if len(starts) else 0
    return f"{empty:,} conversations have nothing to train on" if empty else None


def wrong_starts(starts: np.ndarray, tokens: int, continued: bool) -> str | None:
    if len(starts) and (starts[0] < 0 or starts[-1] >= tokens):
        return f"a document start lies outside the shard's {tokens:,} tokens"
    if (np.diff(starts) <= 0).any():
        return "the document starts do not increase"
    if not continued and (not len(starts) or starts[0] != 0):
        return "the first token starts no document, and no shard before continues here"
    return None


def wrong_tokens(tokens: np.ndarray, starts: np.ndarray, manifest: Manifest, conversations: bool = False) -> str | None:
    if not conversations and (tokens[starts] != manifest.eot).any():
        return f"a document does not start with token {manifest.eot}"
    ends = 0
    for i in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[i : i + CHUNK_TOKENS]
        if (largest := int(chunk.max())) >= manifest.vocab_size:
            return f"token {largest} is not in the vocabulary of {manifest.vocab_size}"
        ends += int(np.count_nonzero(chunk == manifest.eot))
    if not conversations and ends != len(starts):
        return f"token {manifest.eot} occurs {ends:,} times, but {len(starts):,} documents start"
    return None
