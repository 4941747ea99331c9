"""The same command again on a folder that is finished: either there is nothing to do, or something differs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regpt.data.manifest import Manifest, read_manifest
from regpt.errors import UserError
from regpt.prepare.settings import TEXT_OPTIONS
from regpt.text.tokenizer import Tokenizer

Record = Mapping[str, Any]


def finished(
    out: Path, tokenizer: Tokenizer, options: Record, records: Sequence[Record], derived: Collection[str] = ()
) -> Manifest:
    """The manifest of `out`, if the same tokenizer, options and sources made it.

    `options` and `records` are those of a new manifest; what a record leaves out, and the options `derived`
    from the text, are not compared.

    Raises:
        UserError: something differs, or the folder is damaged.
    """
    manifest = read_manifest(out)
    options = {**options, **{name: manifest.options.get(name) for name in derived}}
    for what in differences(manifest, tokenizer, options, records):
        raise UserError(
            f"{out} already holds a data set, made {what} (see: regpt data info {out}); choose another --out or "
            "delete it"
        )
    return manifest


def differences(manifest: Manifest, tokenizer: Tokenizer, options: Record, records: Sequence[Record]) -> Iterator[str]:
    """Phrases that begin after `made`."""
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        yield f"with another --tokenizer ({manifest.tokenizer}, now {tokenizer.name})"
    for name in {**options, **manifest.options}:
        before, now = manifest.options.get(name), options.get(name)
        if before != now:
            yield f"with another {name.replace('_', ' ')} ({said(name, before)}, now {said(name, now)})"
    before, now = ({name_of(record): record for record in group} for group in (manifest.sources, records))
    for name in {**before, **now}:
        shown = f"{name[1]} in {name[0]}" if name[1] else name[0]
        if name not in now:
            yield f"with {shown} for {name[2]}"
        elif name not in before:
            yield f"without {shown} for {name[2]}"
        elif any(now[name][key] != before[name][key] for key in now[name].keys() & before[name].keys()):
            yield f"when {shown} had other content"
    if list(before) != list(now):
        yield "from the sources in another order"


def name_of(record: Record) -> tuple[str, str, str]:
    return record["source"], record.get("file", ""), record["split"]


def said(name: str, value: object) -> str:
    """An option's value in a message; one that the manifest leaves out is the default."""
    value = getattr(TEXT_OPTIONS, name, None) if value is None else value
    return "none" if value is None else str(value)
