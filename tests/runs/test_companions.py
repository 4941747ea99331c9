"""Chat template and options of generation of a model that a run begins with: through its checkpoints into exports."""

import json
from pathlib import Path

import pytest

import tiny
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint
from regpt.checkpoint.manifest import IMPORTED, write_manifest
from regpt.hf.export import export_hf
from regpt.hf.gguf import GGUFFile
from regpt.prepare.prepare import prepare
from regpt.runs.pretrain import fork, pretrain, resume
from regpt.text.bpe import train_bpe
from regpt.text.companions import read_companions
from regpt.text.open import open_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
GENERATION = '{"do_sample": true, "top_k": 7, "eos_token_id": [299, 5]}\n'


@pytest.fixture(scope="module")
def theirs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face's with the shape of `tiny.run_config` and the tokenizer of its data."""
    config = tiny.run_config(shards).model
    model = tiny.build_model(config=config, dtype=tiny.torch.float32)
    folder = export_hf(model, open_tokenizer(shards), tmp_path_factory.mktemp("theirs") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8", newline="")
    (folder / "generation_config.json").write_text(GENERATION, encoding="utf-8", newline="")
    return folder


def begun(theirs: Path, data: Path, run: Path) -> Path:
    config = tiny.change(tiny.run_config(data), "train", steps=2)
    assert pretrain(config, run, init_from=str(theirs)) == 0
    return run


def exported(model: Path, out: Path) -> Path:
    assert main(["export", str(model), "--out", str(out)]) == 0
    return out


def test_the_export_of_a_run_has_those_of_the_model_that_it_began_with(theirs: Path, shards: Path, tmp_path: Path):
    run = begun(theirs, shards, tmp_path / "run")
    assert resume(run, tiny.change(tiny.run_config(shards), "train", steps=4)) == 0
    longer = tiny.change(tiny.run_config(shards), "train", steps=6)
    assert fork(longer, checkpoint_folder(run, 4), tmp_path / "fork") == 0
    for name in ("run", "fork"):
        out = exported(tmp_path / name, tmp_path / f"{name}-hf")
        for file in ("chat_template.jinja", "generation_config.json"):
            assert (out / file).read_bytes() == (theirs / file).read_bytes()
    assert main(["export", str(run), "--format", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf")]) == 0
    assert GGUFFile(tmp_path / "m.gguf").metadata["tokenizer.chat_template"] == TEMPLATE
    begun(tmp_path / "m.gguf", shards, tmp_path / "third")
    assert load_checkpoint(checkpoint_folder(tmp_path / "third", 2)).companions() == {"chat_template.jinja": TEMPLATE}


def test_with_another_tokenizer_nothing_is_kept(theirs: Path, tmp_path: Path):
    texts = [f"{a}{b}lo {b}{a}ne" for a in "aeiouklmnst" for b in "aeioubdfgr"] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    tokenizer = train_bpe(texts, tiny.VOCAB)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "data", tokenizer, val_fraction=0.2, workers=1)
    run = begun(theirs, tmp_path / "data", tmp_path / "run")
    assert load_checkpoint(checkpoint_folder(run, 2)).companions() == {}
    assert not (exported(run, tmp_path / "hf") / "chat_template.jinja").exists()


def test_a_crafted_checkpoint_writes_no_other_file_into_an_export(theirs: Path, shards: Path, tmp_path: Path):
    folder = checkpoint_folder(begun(theirs, shards, tmp_path / "run"), 2)
    stored = json.loads((folder / IMPORTED).read_text(encoding="utf-8"))
    crafted = stored | {"../evil.txt": "x", "config.json": "{}", "chat_template.jinja": 5}
    (folder / IMPORTED).write_text(json.dumps(crafted), encoding="utf-8")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    out = exported(folder, tmp_path / "hf")
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    assert not (tmp_path / "evil.txt").exists()
    assert not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("inside", "found"),
    [("one", "one"), ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"), ([3], None)],
)
def test_a_template_inside_the_options_of_a_tokenizer_is_found(tmp_path: Path, inside: object, found: str | None):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": inside}), encoding="utf-8")
    assert read_companions(tmp_path).get("chat_template.jinja") == found
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_companions(tmp_path)["chat_template.jinja"] == "file"
