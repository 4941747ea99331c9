"""What a fast encoder wrote is compared with the tokenizer, on one document in so many."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.errors import UserError
from regpt.prepare import partition, shards, workers
from regpt.prepare import prepare as prepare_module
from regpt.prepare.encode import encode_partition
from regpt.prepare.partition import DOCUMENT, Partition, partitions
from regpt.prepare.prepare import prepare
from regpt.prepare.settings import Settings
from regpt.prepare.shards import EncoderCheck
from regpt.prepare.sources import find_files
from regpt.prepare.split import Unusable
from regpt.text import fast
from regpt.text.bpe import train_bpe
from regpt.text.fast import save_model

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
OTHER = train_bpe(["zz zz yy yy xx xx ww ww" * 9], 260)
SETTINGS = Settings(TOKENIZER.to_json(), TOKENIZER.sha256, TOKENIZER.n_vocab, TOKENIZER.eot, val_fraction=0.3)


def encoded(folder: Path, texts: list[str]) -> list[tuple[Partition, dict[str, np.ndarray]]]:
    """`texts`, three a partition, encoded into `folder`, and their tables."""
    for i in range(0, len(texts), 3):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[i : i + 3])
        (folder / f"{i:03}.jsonl").write_text("".join(lines), encoding="utf-8")
    parts = []
    for i, source in enumerate(find_files(str(folder))):
        (whole,) = partitions([(source, "train")], 1 << 20, SETTINGS.key())
        part = replace(whole, index=i)
        encode_partition(folder, part, SETTINGS, TOKENIZER)
        found = json.loads((folder / f"{part.name}.json").read_text(encoding="utf-8"))["splits"]
        tables = {split: np.fromfile(folder / f"{part.name}.{split}.docs", dtype=DOCUMENT) for split in found}
        parts.append((part, tables))
    return parts


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_the_tokenizers_own_tokens_pass(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "EVERY", 1)
        seen = EncoderCheck(folder, TOKENIZER, "uint16")
        for part, tables in encoded(folder, texts):
            seen.compare(part.name, tables)


@pytest.mark.parametrize("every", [1, 2, 5, 7])
def test_one_document_in_so_many_is_looked_at(tmp_path, monkeypatch, every):
    monkeypatch.setattr(shards, "EVERY", every)
    parts = encoded(tmp_path, [f"the cat {i}" for i in range(20)])
    positions = [(part, split, i) for part, tables in parts for split in tables for i in range(len(tables[split]))]
    assert {split for _, split, _ in positions} == {"train", "val"}
    noticed = []
    for position, (part, split, i) in enumerate(positions):
        path = tmp_path / f"{part.name}.{split}.bin"
        whole = np.fromfile(path, dtype="<u2")
        table = next(tables for other, tables in parts if other == part)[split]
        changed = whole.copy()
        changed[table["tokens"][: i + 1].sum() - 1] ^= 1  # the document's last token
        changed.tofile(path)
        seen = EncoderCheck(tmp_path, TOKENIZER, "uint16")
        try:
            for other, tables in parts:
                seen.compare(other.name, tables)
        except Unusable:
            noticed.append(position)
        whole.tofile(path)
    assert noticed == list(range(0, 20, every))


def test_other_tokens_of_the_same_text_are_a_difference(tmp_path):
    ((part, tables),) = encoded(tmp_path, ["the cat"])
    tokens = [TOKENIZER.eot, *(TOKENIZER.encode(character)[0] for character in "the cat")]
    np.array(tokens, dtype="<u2").tofile(tmp_path / f"{part.name}.train.bin")
    tables["train"]["tokens"] = len(tokens)
    with pytest.raises(Unusable, match=r"gigatoken encodes 'the cat'… differently from the tokenizer bpe-270"):
        EncoderCheck(tmp_path, TOKENIZER, "uint16").compare(part.name, tables)


@pytest.mark.skipif(not fast.available(), reason="the package gigatoken is not installed")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_encoder_leaves_nothing(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(partition, "MIN_BYTES", 600)
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    for module in (fast, prepare_module):
        monkeypatch.setattr(module, "save_model", lambda tokenizer, folder: save_model(OTHER, folder))
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"the cat {i}"}) + "\n" for i in range(300)), encoding="utf-8")

    def make(out: str, encoder: str):
        return prepare([str(source)], tmp_path / out, TOKENIZER, workers=processes, encoder=encoder)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"differently from the tokenizer bpe-270.*; do without it: --encoder exact"):
        make("out", "auto")
    assert not (tmp_path / "out").exists()
    assert make("out", "exact").tokens("train") > 0
