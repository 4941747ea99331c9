"""`open_model`: what a MODEL may be, and what is said about anything else."""

import json

import pytest
import torch

from regpt.checkpoint.open import open_model
from regpt.errors import UsageError, UserError
from regpt.hf.export import export_hf
from regpt.hf.folder import hf_tokenizer
from regpt.model.weights import state_tensors

IDX = torch.tensor([[1, 5, 260, 7, 0]])


@torch.no_grad()
def assert_opens(name, model, tokenizer):
    opened = open_model(str(name))
    assert not opened.model.training
    assert opened.model(IDX).equal(model(IDX))
    assert opened.tokenizer.encode("that cat") == tokenizer.encode("that cat")
    return opened


def test_a_run_opens_at_its_newest_intact_checkpoint(tmp_path, save, model, tokenizer, capsys):
    for step in (10, 20):
        save(tmp_path, step)
    assert assert_opens(tmp_path, model, tokenizer).step == 20
    (tmp_path / "checkpoints" / "step-00000020" / "state.json").unlink()
    opened = assert_opens(tmp_path, model, tokenizer)
    assert opened.step == 10
    assert opened.source == str(tmp_path / "checkpoints" / "step-00000010")
    assert "skipped step-00000020" in capsys.readouterr().err


def test_a_checkpoint_folder_opens_under_any_name(tmp_path, save, model, tokenizer):
    folder = save(tmp_path, 10)
    assert assert_opens(folder, model, tokenizer).step == 10
    folder.rename(tmp_path / "best")
    assert assert_opens(tmp_path / "best", model, tokenizer).step == 10


def test_a_hugging_face_folder_opens(tmp_path, model, tokenizer):
    opened = assert_opens(export_hf(model, tokenizer, tmp_path / "hf"), model, tokenizer)
    assert opened.step is None
    assert state_tensors(opened.model)["wte.weight"].equal(state_tensors(model)["wte.weight"])


def test_the_weights_go_to_the_device_asked_for(tmp_path, save):
    opened = open_model(str(save(tmp_path, 1)), torch.device("cpu"))
    assert {p.device.type for p in opened.model.parameters()} == {"cpu"}


def test_a_damaged_checkpoint_is_not_opened(tmp_path, save):
    folder = save(tmp_path, 10)
    (folder / "model.json").unlink()
    with pytest.raises(UserError, match=r"model\.json' is missing"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "name", ["quikstart", "runs/x/y", "./nowhere", "/no/where", "a b/c", "gpt2-medum", "a" * 5000, "o/" + "a" * 96]
)
def test_a_name_that_means_nothing_says_what_is_allowed(name):
    with pytest.raises(UsageError, match=r"does not exist.*a model is a run folder, .*hub name \(gpt2, "):
        open_model(name)


@pytest.mark.parametrize(("way", "folder"), [("@10", "step-00000010"), (":9", "step-00000009"), ("@best", "best")])
def test_a_step_after_the_name_of_a_run_is_answered_with_the_folder_of_the_checkpoint(tmp_path, save, way, folder):
    save(tmp_path, 10)
    with pytest.raises(
        UsageError, match=f"does not exist; give the checkpoint's folder, {tmp_path}/checkpoints/{folder}"
    ):
        open_model(f"{tmp_path}{way}")


def test_a_misspelled_short_name_is_recognised():
    with pytest.raises(UsageError, match="did you mean 'gpt2-medium'"):
        open_model("gpt2-medum")


def test_a_typo_below_a_folder_that_exists_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="'runs/typo' does not exist"):
        open_model("runs/typo")


@pytest.mark.parametrize("name", ["typo/model.gguf", "typo/model.safetensors", "typo/config.json"])
def test_a_missing_file_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"'{name}' does not exist"):
        open_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no model"):
        open_model(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="it has no complete checkpoint"):
        open_model(str(tmp_path))


@pytest.fixture
def exported(tmp_path, model, tokenizer):
    return export_hf(model, tokenizer, tmp_path / "hf")


def test_a_pickle_is_never_read(exported):
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has only pytorch_model\.bin, a pickle.*safetensors only"):
        open_model(str(exported))
    (exported / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_model(str(exported))


@pytest.mark.parametrize("weight_map", [None, {}, [], {"wte.weight": "../x.safetensors"}, {"wte.weight": 3}])
def test_an_index_that_names_no_plain_files_is_refused(exported, weight_map):
    (exported / "model.safetensors").unlink()
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json' has no weight_map from tensors to plain file names"):
        open_model(str(exported))


def test_a_missing_shard_is_named(exported):
    (exported / "model.safetensors").unlink()
    (exported / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "a.safetensors"}}')
    with pytest.raises(UserError, match=r"cannot read '.*a\.safetensors': 1 of the 1 weight files .* are missing"):
        open_model(str(exported))


def test_a_damaged_file_is_named(exported):
    (exported / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot read '.*model\.safetensors' as safetensors"):
        open_model(str(exported))
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json' is not JSON"):
        open_model(str(exported))


def test_a_missing_or_wrong_tokenizer_is_named(exported):
    path = exported / "tokenizer.json"
    for rows in (262, 263 + 1024):
        with pytest.raises(UserError, match=rf"has {rows:,} tokens and its tokenizer\.json 263, which padding"):
            hf_tokenizer(exported, rows)
    path.unlink()
    with pytest.raises(UserError, match=r"has 263 tokens and no tokenizer; put the tokenizer\.json"):
        open_model(str(exported))
    path.write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        open_model(str(exported))


def test_a_vocabulary_is_nobodys_by_its_size(tmp_path):
    with pytest.raises(UserError, match="has 50,257 tokens and no tokenizer"):
        hf_tokenizer(tmp_path, 50257)


def edit(exported, **weights):
    """Replace tensors of the folder; None leaves one out."""
    from safetensors.torch import load_file, save_file

    now = {**load_file(exported / "model.safetensors"), **weights}
    save_file({name: tensor for name, tensor in now.items() if tensor is not None}, exported / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_rows_of_padding_are_left_out(exported, model, tokenizer, name):
    padded = torch.cat([state_tensors(model)["wte.weight"], torch.full((57, 27), float("nan"))])
    edit(exported, **{"transformer.wte.weight": None, name: padded})
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    assert_opens(exported, model, tokenizer)
    assert open_model(str(exported)).model.config.vocab_size == 263


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_tied_weight_may_be_stored_as_the_head_alone(exported, model, tokenizer, prefix):
    from safetensors.torch import load_file, save_file

    weights = load_file(exported / "model.safetensors")
    head = weights.pop("transformer.wte.weight")
    plain = {prefix + name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    (exported / "model.safetensors").unlink()
    for number, part in ((1, {"lm_head.weight": head}), (2, plain)):
        save_file(part, exported / f"model-0000{number}-of-00002.safetensors")
    weight_map = dict.fromkeys(plain, "model-00002-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_opens(exported, model, tokenizer)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 301966000\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named(exported, name):
    (exported / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name}' is a Git LFS pointer.*git lfs pull"):
        open_model(str(exported))


def test_a_pointer_of_git_lfs_among_a_checkpoints_files_is_named(tmp_path, save):
    folder = save(tmp_path, 10)
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"model\.safetensors' is a Git LFS pointer.*git lfs pull"):
        open_model(str(folder))


def test_a_head_of_its_own_is_refused_with_the_folder(exported):
    from safetensors.torch import load_file, save_file

    weights = load_file(exported / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1}, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"hf' cannot be read: the weights hold an lm_head\.weight"):
        open_model(str(exported))
