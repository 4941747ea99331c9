"""What `regpt inspect` shows of a model's weights."""

import json

import pytest
import torch
from torch import Tensor

from regpt.cli.inspect import first_matrix, main
from regpt.errors import UsageError, UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import without_memory
from regpt.report.weights import find_tensor, nearest_tokens, parameter_table, token_id
from regpt.runs.pretrain import pretrain
from regpt.text.open import open_tokenizer
from tiny import run_config, write_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight steps: one block, width 16, vocabulary 300."""
    folder = tmp_path_factory.mktemp("inspect")
    assert pretrain(run_config(write_shards(folder / "data")), folder / "run") == 0
    return folder / "run"


def tensors() -> dict[str, Tensor]:
    made = {"wte.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])}
    return made | {f"h.{i}.w": torch.full((2,), float(i)) for i in range(3)}


def test_blocks_of_one_shape_make_one_row():
    rows = parameter_table(tensors())
    assert [(row.name, row.shape, row.count, row.parameters) for row in rows] == [
        ("wte.weight", (3, 2), 1, 6),
        ("h.0-2.w", (2,), 3, 6),
    ]
    assert (rows[1].mean, rows[1].least, rows[1].greatest) == (1.0, 0.0, 2.0)
    assert rows[1].std == pytest.approx(torch.tensor([0.0, 0, 1, 1, 2, 2]).std(correction=0).item())


def test_every_parameter_can_have_its_row():
    assert [row.name for row in parameter_table(tensors(), every=True)] == ["wte.weight", "h.0.w", "h.1.w", "h.2.w"]


def test_blocks_of_different_shape_stay_apart():
    rows = parameter_table({"h.0.w": torch.zeros(2), "h.1.w": torch.zeros(3), "h.2.w": torch.zeros(3)})
    assert [(row.name, row.shape) for row in rows] == [("h.0.w", (2,)), ("h.1-2.w", (3,))]


def test_an_unknown_matrix_is_met_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'wte.weigth' is unknown \(did you mean 'wte.weight'\?\)"):
        find_tensor(tensors(), "wte.weigth")
    with pytest.raises(UserError, match=r"'h.0.w' is no matrix"):
        find_tensor(tensors(), "h.0.w")


class Letters:
    """A tokenizer of single letters."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def token_bytes(self, token):
        return bytes([token + ord("a")])


def test_the_nearest_tokens_have_the_smallest_angles():
    rows = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    found = nearest_tokens(rows, Letters(), 0, 3)
    assert [one.text for one in found][:1] == ["b"]
    assert found[0].cosine == pytest.approx(10 / 101**0.5)
    assert found[0].norm == pytest.approx(101**0.5)
    assert {one.text for one in found[1:]} == {"c", "e"}  # a right angle, and no direction at all
    assert len(nearest_tokens(rows, Letters(), 0, 99)) == 4


def test_a_token_is_one_token():
    assert token_id(Letters(), "c") == 2
    with pytest.raises(UserError, match=r"'abc' is 3 tokens, not one: 'a', 'b', 'c'"):
        token_id(Letters(), "abc")
    with pytest.raises(UserError, match="empty"):
        token_id(Letters(), "")


def test_the_command_shows_parameters_neighbours_and_a_picture(run, tmp_path, capsys):
    tokenizer = open_tokenizer(run.parent / "data")
    word = next(text for i in range(260, 300) if tokenizer.encode(text := tokenizer.decode([i])) == [i])
    picture = tmp_path / "weights.png"
    assert main([str(run), "--token", word, "-n", "3", "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "after 8 steps: 8,368 parameters" in said
    assert "h.0.attn.c_attn.weight" in said
    assert f"nearest to {word!r}" in said
    assert said.strip().endswith(str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_has_the_same(run, capsys):
    assert main([str(run), "--json", "--all"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(row["parameters"] for row in found["tensors"]) == 8368
    assert found["tensors"][0]["shape"] == [300, 16]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-n", "0"], "at least 1"),
        (["--out", "x.pdf"], r"\.png or \.svg"),
        (["--matrix", "wpe.weight"], "give the picture's file with --out"),
    ],
)
def test_bad_arguments_are_one_sentence(run, args, words):
    with pytest.raises(UsageError, match=words):
        main([str(run), *args])


@pytest.mark.parametrize(("n_layer", "name"), [(3, "h.1.attn.c_attn.weight"), (1, "h.0.attn.c_attn.weight")])
def test_the_lectures_matrix_is_drawn_or_that_of_the_only_block(n_layer: int, name: str):
    with without_memory():
        model = make_model(ModelConfig(n_layer=n_layer, n_head=1, n_embd=8, vocab_size=9, max_seq_len=4))
    assert first_matrix(model) == name


def test_any_matrix_can_be_drawn(run, tmp_path):
    picture = tmp_path / "x.svg"
    assert main([str(run), "--matrix", "h.0.mlp.c_fc.weight", "--out", str(picture)]) == 0
    assert "h.0.mlp.c_fc.weight" in picture.read_text(encoding="utf-8")
