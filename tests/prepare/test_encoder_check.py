"""A fast encoder that makes other tokens than the tokenizer ends a preparation, and nothing of it stays."""

import json

import pytest

from regpt.errors import UserError
from regpt.prepare import partition, workers
from regpt.prepare import prepare as prepare_module
from regpt.prepare.prepare import prepare
from regpt.text import fast
from regpt.text.bpe import train_bpe
from regpt.text.fast import save_model

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
OTHER = train_bpe(["zz zz yy yy xx xx ww ww" * 9], 260)


@pytest.mark.skipif(not fast.available(), reason="the package gigatoken is not installed")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_encoder_leaves_nothing(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(partition, "MIN_BYTES", 600)
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    for module in (fast, prepare_module):
        monkeypatch.setattr(module, "save_model", lambda tokenizer, folder: save_model(OTHER, folder))
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"the cat {i}"}) + "\n" for i in range(3000)), encoding="utf-8")

    def make(out: str, encoder: str):
        return prepare([str(source)], tmp_path / out, TOKENIZER, workers=processes, encoder=encoder)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"differently from the tokenizer; do without it: --encoder exact"):
        make("out", "auto")
    assert not (tmp_path / "out").exists()
    assert make("out", "exact").tokens("train") > 0
