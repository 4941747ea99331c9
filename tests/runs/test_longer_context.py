"""`--init-from` with other fields that hold no weights: longer rows in stages."""

from dataclasses import replace

import pytest

import tiny
from regpt.checkpoint.open import open_model
from regpt.cli.train import main
from regpt.errors import UserError
from regpt.runs.begin import WEIGHTLESS, other_fields
from regpt.runs.pretrain import pretrain


@pytest.fixture(scope="module")
def short(config):
    config = replace(config, model=tiny.ModelConfig("llama", 1, 2, 16, config.model.vocab_size, 16))
    return tiny.change(tiny.change(config, "train", steps=2), "eval", val_tokens=64)


def test_two_stages_of_a_longer_context_by_the_commands_of_the_page(short, tmp_path, capsys):
    assert pretrain(short, tmp_path / "base") == 0
    (tmp_path / "small.toml").write_text(short.to_toml(), encoding="utf-8")
    source = tmp_path / "base"
    for length in (32, 64):
        rope = ["--model.rope-theta", "500000", "--model.rope-type", "llama3", "--model.rope-factor", str(length // 16)]
        rope += ["--model.rope-original-max-seq-len", "16", "--data.seq-len", str(length)]
        flags = ["--init-from", str(source), "--out", str(tmp_path / f"long-{length}"), "--optim.warmup-steps", "0"]
        assert main([str(tmp_path / "small.toml"), *flags, "--model.max-seq-len", str(length), *rope]) == 0
        said = capsys.readouterr().out
        assert f"model.max_seq_len {length} instead of {length // 2}" in said
        source = tmp_path / f"long-{length}"
    longest = open_model(str(source)).model.config
    assert (longest.max_seq_len, longest.rope_theta, longest.rope_factor) == (64, 500000, 4)


def test_learned_positions_are_refused_with_the_reason(config, straight, tmp_path):
    longer = replace(config, model=replace(config.model, max_seq_len=32))
    with pytest.raises(UserError, match=r"has 16 positions and model\.max_seq_len is 32, but gpt2 learns a vector for"):
        pretrain(longer, tmp_path / "run", init_from=str(straight))
    assert not (tmp_path / "run").exists()


def assert_no_weights(model, other):
    changed = replace(model, **other)
    assert other_fields(model, changed).keys() == other.keys()
    shapes = [[(n, p.shape) for n, p in tiny.make_model(c).named_parameters()] for c in (model, changed)]
    assert shapes[0] == shapes[1]


def test_fields_without_weights_leave_the_shapes_of_all_weights(short):
    other = {"max_seq_len": 64, "window": 8, "dropout": 0.1, "norm_eps": 1e-6, "no_rope_every": 2, "rope_theta": 2.0}
    other |= {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_max_seq_len": 16, "rope_fraction": 0.5}
    other |= {"rope_low_freq_factor": 2.0, "rope_high_freq_factor": 8.0}
    layered = {"full_attention_every": 1, "rope_local_theta": 5.0, "query_pre_attn_scalar": 7}  # Gemma 3's
    assert {*other, *layered} == WEIGHTLESS
    assert_no_weights(short.model, other)
    assert_no_weights(tiny.FAMILY_CONFIGS["gemma3_text"], layered)
