"""How many processes encode: one a core, as far as the memory goes."""

import pytest

from regpt.prepare import workers
from regpt.prepare.settings import Filters
from regpt.prepare.sources import SourceFile
from regpt.prepare.workers import affordable_workers, count_workers, start_pool
from regpt.text.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)


@pytest.mark.parametrize(
    ("cores", "asked", "filters", "count"),
    [
        (2, None, Filters(), 2),
        (16, None, Filters(), 16),
        (64, None, Filters(), 16),
        (64, None, Filters(dedup="exact"), 16),
        (64, None, Filters(decontaminate=("items.jsonl",)), 13),
        (64, None, Filters(dedup="near"), 9),
        (64, 40, Filters(dedup="near"), 40),
        (2, 5, Filters(), 5),
    ],
)
def test_one_process_a_core_as_far_as_memory_goes(monkeypatch, cores, asked, filters, count):
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    assert count_workers(asked, filters) == count


def test_the_default_stays_within_the_memory():
    for filters in (Filters(), Filters(dedup="near"), Filters(dedup="near", decontaminate=("items.jsonl",))):
        assert affordable_workers(filters) >= 2


def test_processes_start_where_they_are_worth_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Pool", lambda count: f"{count} processes")
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    source = SourceFile("a.txt", "a.txt", tmp_path / "a.txt")
    monkeypatch.setattr(workers, "SMALL_BYTES", 2000)
    assert start_pool(3, "local", [source], TOKENIZER) is None
    assert start_pool(3, "local", [source, source], TOKENIZER) == "3 processes"
    assert start_pool(1, "local", [source, source], TOKENIZER) is None
    assert start_pool(3, "ray", [source, source], TOKENIZER) is None
