"""Conversations → a folder of token shards with parts, their chat template and its certificate."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regpt.console.text import counted
from regpt.data.manifest import Manifest, Shard, read_manifest
from regpt.errors import UsageError, UserError
from regpt.files import exists, file_sha256, is_file, write_bytes, write_json, write_text
from regpt.prepare.conversations import Conversation, ConversationReader, Messages, question_fraction
from regpt.prepare.shards import finish_folder, remove_leftovers
from regpt.text.certificate import certify
from regpt.text.chat import CONTEXT, ChatTemplate
from regpt.text.folder import CERTIFICATE, CHAT

TOO_LONG = "too_long"  # a kind of rows that are skipped
CERTIFIED = 1000  # conversations on which the template is checked; every one is divided, which proves most of it


@dataclass(frozen=True)
class ConversationOptions:
    """How files of conversations become shards.

    Attributes:
        seq_len: tokens that a conversation has at most.
        val_fraction: of the conversations, held out by the hash of what the user asks first.
        on_error: a bad row, or one that is too long.
        pairs: of preferences, both answers, chosen then rejected, as two documents; without it the chosen ones.
    """

    seq_len: int
    val_fraction: float = 0.05
    on_error: Literal["stop", "skip"] = "stop"
    pairs: bool = False


class TooLong(UserError):
    """A conversation that fits into no row."""


class EncodedSplit:
    """The documents of a split, as they come."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.parts: list[np.ndarray] = []

    def write(self, folder: Path, split: Literal["train", "val"], dtype: str) -> Shard:
        """Write one shard: tokens, starts, parts."""
        lengths = [len(ids) for ids in self.ids]
        starts = (np.cumsum(lengths) - lengths).astype("<i8")
        tokens = np.concatenate(self.ids).astype(np.dtype(dtype).newbyteorder("<"))
        data = tokens.tobytes(), starts.tobytes(), np.concatenate(self.parts).tobytes()
        hashes = [hashlib.sha256(one).hexdigest() for one in data]
        shard = Shard(f"{split}-00000.bin", split, len(tokens), len(starts), hashes[0], hashes[1], False, hashes[2])
        for name, content in zip((shard.file, shard.idx_file, shard.parts_file), data):
            write_bytes(folder / name, content)
        return shard


def prepare_conversations(
    paths: Sequence[Path],
    folder: Path,
    template: ChatTemplate,
    options: ConversationOptions,
    urls: Mapping[Path, str] | None = None,
) -> Manifest:
    """Write the shards of the conversations in `paths` to `folder`, with template and certificate; a finished folder of
    the same files, template and options is left as it is. `urls`: where files were downloaded from.

    Raises:
        UsageError: a fraction outside 0 to 1.
        UserError: a bad row (with `on_error` stop), no conversation left, a split without any, a template whose claims
            do not hold, or a folder made of other files.
    """
    if not 0 <= options.val_fraction < 1:
        raise UsageError(f"--val-fraction is {options.val_fraction:g}, must be 0 or more and below 1")
    for path in paths:
        if not is_file(path):
            raise UserError(f"--data {str(path)!r} is not a file; give a file of conversations")
    sources = [{"source": str(path), "sha256": file_sha256(path)} for path in paths]
    for path, source in zip(paths, sources):
        source |= {"url": urls[path]} if urls and path in urls else {}
    facts = asdict(options) | {"template_sha256": template.sha256, "tokenizer_sha256": template.tokenizer.sha256}
    if exists(folder / "manifest.json"):
        return finished(folder, sources, facts)
    template.refuse_untrainable()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    reader = ConversationReader(paths, skip=options.on_error == "skip")
    splits = {"train": EncodedSplit(), "val": EncodedSplit()}
    sample: list[Messages] = []
    places: list[float] = []
    for conversation, rows in encoded(reader, template, options):
        places.append(question_fraction(conversation.messages))
        split = splits["val" if is_held_out(conversation, options.val_fraction) else "train"]
        split.ids += [ids for ids, _ in rows]
        split.parts += [parts for _, parts in rows]
        if len(sample) < CERTIFIED:
            sample.append(conversation.messages)
    check_counts(reader, splits, options, places)
    certificate = certify(template, sample)
    write_text(folder / CHAT, template.source)
    write_json(folder / CERTIFICATE, certificate)
    dtype = "uint16" if template.tokenizer.n_vocab <= 1 << 16 else "uint32"
    shards = [one.write(folder, name, dtype) for name, one in splits.items() if one.ids]  # type: ignore[arg-type]
    lengths = template.tokenizer.byte_lengths()
    return finish_folder(
        folder,
        template.tokenizer,
        dtype,
        shards,
        text_bytes={name: sum(int(lengths[ids].sum()) for ids in one.ids) for name, one in splits.items()},
        sources=[source | {"format": reader.formats[source["source"]]} for source in sources],
        options=facts,
        removed={kind: {"documents": count} for kind, count in reader.kinds.items()},
    )


def finished(folder: Path, sources: list[dict[str, Any]], facts: dict[str, Any]) -> Manifest:
    """The manifest of a finished folder, if it is of these sources and options."""
    manifest = read_manifest(folder)
    there = [source.get("sha256") for source in manifest.sources]
    differing = [key for key in facts if manifest.options.get(key) != facts[key]]
    differing += ["--data"] if there != [source["sha256"] for source in sources] else []
    if differing:
        raise UserError(
            f"{str(folder)!r} was made of other data or settings ({', '.join(differing)}); delete it, or choose "
            "another --out"
        )
    return manifest


def encoded(
    reader: ConversationReader, template: ChatTemplate, options: ConversationOptions
) -> Iterator[tuple[Conversation, list[tuple[np.ndarray, np.ndarray]]]]:
    """Each conversation with the tokens and parts of its documents; what cannot be encoded is refused or skipped."""
    for conversation in reader:
        pair = options.pairs and conversation.rejected is not None
        sides = [conversation.messages, conversation.rejected if pair else None]
        try:
            rows = [checked(template, side, options.seq_len) for side in sides if side is not None]
            if options.pairs and not pair:
                raise UserError("there is no chosen and rejected answer, which preference.method needs")
            if pair and (tokens := sum(len(ids) for ids, _ in rows)) > options.seq_len:
                raise TooLong(f"the pair has {tokens:,} tokens, more than data.seq_len {options.seq_len:,}")
        except UserError as error:
            reader.read -= 1
            reader.refuse(f"{conversation.where()}: {error}", TOO_LONG if isinstance(error, TooLong) else "bad_row")
            continue
        yield conversation, rows


def checked(template: ChatTemplate, messages: Messages, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Raises:
        UserError: longer than a row, or nothing to train on.
    """
    ids, parts, _ = template.encode_training(messages)
    if len(ids) > seq_len:
        raise TooLong(f"the conversation has {len(ids):,} tokens, more than data.seq_len {seq_len:,}")
    if not (parts != CONTEXT).any():
        raise UserError("there is nothing to learn: no token of an answer is left")
    return ids, parts


def is_held_out(conversation: Conversation, val_fraction: float) -> bool:
    """By what the user says first, so that one question is never in both splits."""
    return question_fraction(conversation.messages) < val_fraction


def check_counts(
    reader: ConversationReader, splits: dict[str, EncodedSplit], options: ConversationOptions, places: list[float]
) -> None:
    """Raise a UserError where a split that there should be is empty; `places` are the fractions of what was read."""
    if not any(one.ids for one in splits.values()):
        first = f", the first: {reader.reasons[0]}" if reader.reasons else ""
        raise UserError(f"no conversation is left of {reader.skipped:,}{first}; correct the data")
    for name, one in splits.items():
        if not one.ids and (name == "train" or options.val_fraction):
            enough = math.floor(min(places) * 100 + 1) / 100 if name == "val" else math.floor(max(places) * 100) / 100
            other = f"--val-fraction {enough:g} or " if 0 < enough < 1 else ""
            raise UserError(
                f"none of {counted(reader.read, 'conversation')} fell into the split {name} at --val-fraction "
                f"{options.val_fraction:g}; give {other}0 for no validation"
            )
