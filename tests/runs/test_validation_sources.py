"""Validation by source of the data."""

import json
import re
import shutil
from pathlib import Path

import pytest

import tiny
from regpt.cli.eval import main
from regpt.data.manifest import read_manifest
from regpt.data.stream import open_stream
from regpt.prepare.prepare import prepare
from regpt.runs.pretrain import pretrain
from regpt.runs.validation import folder_parts, source_spans
from regpt.text.bpe import train_bpe
from regpt.text.open import open_tokenizer


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory) -> Path:
    """Documents of two sources; half of each are held out."""
    folder = tmp_path_factory.mktemp("sources")
    words = {"a.jsonl": "ba do mi", "b.jsonl": "ta ru ke"}
    texts = {name: [" ".join([of] * (3 + k % 5)) for k in range(40)] for name, of in words.items()}
    for name, some in texts.items():
        lines = "".join(json.dumps({"text": f"{k} {text}"}) + "\n" for k, text in enumerate(some))
        (folder / name).write_text(lines, encoding="utf-8")
    tokenizer = train_bpe([" ".join(some) for some in texts.values()], 262)
    prepare([str(folder / name) for name in words], folder / "data", tokenizer, val_fraction=0.5, workers=1)
    return folder / "data"


def test_the_manifest_tells_where_each_source_lies(two_sources):
    manifest = read_manifest(two_sources)
    spans = source_spans(two_sources, manifest)
    assert [Path(name).name for name in spans] == ["a.jsonl", "b.jsonl"]
    (a, b), tokens = spans.values(), manifest.tokens("val")
    assert (a[0], a[1], b[1]) == (0, b[0], tokens)
    assert sum(record["val_documents"] for record in manifest.sources) == manifest.documents("val")
    stream = open_stream(two_sources, manifest, "val", "sequential", 0).tokens(0, tokens)
    tokenizer = open_tokenizer(two_sources)
    for (begin, end), words in zip(spans.values(), ("ba do mi", "ta ru ke")):
        assert stream[begin] == manifest.eot
        said = set(re.findall("[a-z]+", tokenizer.decode(stream[begin + 1 : end].tolist()))) - {"endoftext"}
        assert said == set(words.split())


def test_rows_never_hold_two_sources_and_share_the_limit(two_sources):
    manifest = read_manifest(two_sources)
    parts, spans = folder_parts(two_sources, manifest, 16), source_spans(two_sources, manifest)
    assert [part.n_rows for part in parts] == [(end - begin - 1) // 16 for begin, end in spans.values()]
    stream = open_stream(two_sources, manifest, "val", "sequential", 0)
    for part, (begin, _) in zip(parts, spans.values()):
        rows = part.rows.read(0, part.n_rows)
        assert rows.tolist() == [stream.tokens(begin + 16 * k, 17).tolist() for k in range(part.n_rows)]
    limited = folder_parts(two_sources, manifest, 16, 16 * 6)
    assert all(1 <= part.n_rows <= 4 for part in limited)


def test_one_source_is_read_as_before(shards):
    (part,) = folder_parts(shards, read_manifest(shards), 16)
    assert part.name == ""


def val_rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "val"]


def test_a_run_and_the_command_report_each_source(two_sources, tmp_path, capsys):
    config = tiny.change(tiny.run_config(two_sources), "model", vocab_size=262)
    config = tiny.change(config, "eval", val_tokens=0)
    assert pretrain(config, tmp_path / "run") == 0
    whole, a, b = val_rows(tmp_path / "run")[-3:]
    assert ("source" in whole, Path(a["source"]).name, Path(b["source"]).name) == (False, "a.jsonl", "b.jsonl")
    assert whole["tokens"] == a["tokens"] + b["tokens"]
    mean = (a["loss"] * a["tokens"] + b["loss"] * b["tokens"]) / whole["tokens"]
    assert whole["loss"] == pytest.approx(mean, rel=1e-6)
    assert 0 < whole["stderr"] < 1
    capsys.readouterr()
    assert main([str(tmp_path / "run"), "--device", "cpu", "--json", "-"]) == 0
    val = json.loads(capsys.readouterr().out)["tasks"]["val"]
    assert val["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert {Path(name).name: one["tokens"] for name, one in val["sources"].items()} == {
        "a.jsonl": a["tokens"],
        "b.jsonl": b["tokens"],
    }


def test_folders_of_a_mixture_are_sources(shards, tmp_path):
    second = shutil.copytree(shards, tmp_path / "second")
    config = tiny.change(tiny.run_config(shards), "data", path="", mixture={str(shards): 0.5, str(second): 0.5})
    assert pretrain(config, tmp_path / "run") == 0
    last = val_rows(tmp_path / "run")[-3:]
    assert [row.get("source") for row in last] == [None, str(shards.resolve()), str(second.resolve())]
