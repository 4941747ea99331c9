"""Processes start where they are worth it."""

from regpt.prepare import workers
from regpt.prepare.sources import SourceFile
from regpt.prepare.workers import start_pool
from regpt.text.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)


def test_processes_start_where_they_are_worth_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Pool", lambda count: f"{count} processes")
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    source = SourceFile("a.txt", "a.txt", tmp_path / "a.txt")
    monkeypatch.setattr(workers, "SMALL_BYTES", 2000)
    assert start_pool(3, [source], TOKENIZER) is None
    assert start_pool(3, [source, source], TOKENIZER) == "3 processes"
    assert start_pool(1, [source, source], TOKENIZER) is None
