"""Texts of a model with random weights obey a schema, are drawn from the renormalised distribution, or are refused."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import tiny
from regpt.cli.sample import main
from regpt.engine.generate import engine_for
from regpt.engine.noise import choice_seed
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request
from regpt.errors import UsageError, UserError
from regpt.text.bpe import train_bpe

pytest.importorskip("llguidance")
from regpt.engine.structured import Structures

TOKENIZER = train_bpe(['{"name": "x", "age": 12}\n' * 50], 266)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 3, "maximum": 40}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    config = tiny.replace(tiny.CONFIG, vocab_size=TOKENIZER.n_vocab, max_seq_len=96)
    return tiny.build_model(config=config, dtype=torch.float32)


@pytest.fixture(scope="module")
def structures(model) -> Structures:
    return Structures(TOKENIZER, model.config.vocab_size)


def texts(model, structure, n: int, seed: int = 1, most: int = 80, **options) -> list[str]:
    request = Request([TOKENIZER.eot], most, SamplingOptions(top_k=0, **options), seed, n, TOKENIZER.stop_ids,
                      structure=structure)  # fmt: skip
    (found,) = engine_for(model, [request]).run([request])
    assert all(new[-1] in TOKENIZER.stop_ids or len(new) == most for new in found)
    return [TOKENIZER.decode(new[:-1]) for new in found if new[-1] in TOKENIZER.stop_ids]


def test_every_text_obeys_the_schema(model, structures):
    found = texts(model, structures.of_schema(SCHEMA), 40)
    assert len(found) > 20
    for text in found:
        value = json.loads(text)
        assert set(value) == {"name", "age"}
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 4
        assert 3 <= value["age"] <= 40


@given(st.integers(0, 2**31), st.floats(0, 2))
@settings(deadline=None, max_examples=15)
def test_every_text_matches_the_expression(model, structures, seed, temperature):
    for text in texts(model, structures.of_regex("(ab|c){2,3}x"), 3, seed, temperature=temperature):
        assert text in {a + b + c + "x" for a in ("ab", "c") for b in ("ab", "c") for c in ("", "ab", "c")}


def test_draws_are_from_the_renormalised_distribution(model, structures):
    structure = structures.of_regex("[abcd]")
    counts = Counter(texts(model, structure, 600, most=3))
    ids = [TOKENIZER.encode(one)[0] for one in "abcd"]
    logits = model(torch.tensor([[TOKENIZER.eot]]))[0, -1, ids].double()
    expected = logits.softmax(0) * 600
    assert chisquare([counts[one] for one in "abcd"], expected.detach().numpy()).pvalue > 1e-4


def test_a_text_is_the_same_alone_and_among_others(model, structures):
    structure = structures.of_schema(SCHEMA)
    assert texts(model, structure, 6)[2:3] == texts(model, structure, 1, choice_seed(1, 2))[:1]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"type": "strin"}', "JSON schema cannot be obeyed: Invalid type: strin"),
        ('{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
        ("[1]", "the JSON schema is no object"),
        ('{"type":', "the JSON schema is not JSON"),
    ],
)
def test_a_schema_that_cannot_be_obeyed_is_refused(structures, schema, said):
    with pytest.raises(UserError, match=said):
        structures.of_schema(schema)


def test_the_command_writes_json_of_a_schema(model, tmp_path, capsys):
    checkpoint = str(tiny.save_model(tmp_path / "run" / "checkpoints" / "step-00000003", model, TOKENIZER))
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    options = ["--prompt", "", "-n", "2", "--max-new-tokens", "80", "--device", "cpu", "--json"]
    assert main([checkpoint, *options, "--json-schema", str(tmp_path / "s.json")]) == 0
    for sample in json.loads(capsys.readouterr().out)["samples"]:
        assert set(json.loads(sample["text"])) == {"name", "age"}
    with pytest.raises(UserError, match=r"the regular expression cannot be obeyed: .* unclosed group"):
        main([checkpoint, *options, "--regex", "a(b"])
    with pytest.raises(UsageError, match="--json-schema or --regex, not both"):
        main([checkpoint, *options, "--regex", "a", "--json-schema", "{}"])
    with pytest.raises(UsageError, match="neither a file nor an object"):
        main([checkpoint, *options, "--json-schema", "nowhere.json"])
