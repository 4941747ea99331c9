import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from regpt.engine.generate import generate, stream_sample, write_samples
from regpt.engine.processing import SamplingOptions
from regpt.engine.reference import generate_uncached
from regpt.engine.request import check_length
from regpt.engine.text import text_pieces
from regpt.errors import UsageError, UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.text.open import open_tokenizer

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=27, max_seq_len=24)
EOT = 26
GREEDY = SamplingOptions(top_k=1)


class Letters:
    """a … z are 0 … 25, `<|endoftext|>` is 26."""

    name, sha256, n_vocab, eot, stop_ids = "letters", "0" * 64, 27, EOT, (EOT,)

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    encode_prompts = encode_batch

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("<|endoftext|>" if i == EOT else chr(ord("a") + i) for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return self.decode([token]).encode()

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 26 + [0])

    def to_json(self) -> str:
        return "{}"


@pytest.fixture
def model() -> Transformer:
    """Weights ten times the initial ones: attention then matters for which token is likeliest."""
    model = initialize(make_model(CONFIG), seed=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and ".ln" not in name:
                parameter.mul_(10)
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(1.3, 0), SamplingOptions(0.8, 9, 0.9)])
@pytest.mark.parametrize("length", [1, 5, 23])
def test_the_cache_changes_no_token(model, options, length):
    prompt, new = prompts(3, length), CONFIG.max_seq_len - length
    expected = generate_uncached(model, prompt, new, options, seed=3)
    assert torch.equal(generate(model, prompt, new, options=options, seed=3), expected)


def test_greedy_text_depends_on_more_than_the_last_token(model):
    """Otherwise the comparison above could not notice a broken cache."""
    prompt = prompts(1, 6)
    changed = prompt.clone()
    changed[0, 0] = (changed[0, 0] + 1) % CONFIG.vocab_size
    texts = [generate(model, x, 18, options=GREEDY, seed=0) for x in (prompt, changed)]
    assert not torch.equal(texts[0][:, 6:], texts[1][:, 6:])


def test_a_prompt_is_continued_alike_alone_and_in_a_batch(model):
    prompt = prompts(3, 4)
    together = generate(model, prompt, 10, options=GREEDY, seed=0)
    alone = [generate(model, row[None], 10, options=GREEDY, seed=0) for row in prompt]
    assert torch.equal(together, torch.cat(alone))


def test_rows_of_one_prompt_differ_and_the_seed_decides(model):
    prompt, options = prompts(1, 4).expand(5, -1), SamplingOptions(2.0, 0)
    first, again, other = (generate(model, prompt, 12, options=options, seed=s) for s in (1, 1, 2))
    assert len(set(map(tuple, first.tolist()))) == 5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_stop_token_fills_its_row_and_ends_all(model):
    prompt = prompts(4, 3)
    free = generate(model, prompt, 20, options=GREEDY, seed=0)
    stop = int(free[0, 5])
    text = generate(model, prompt, 20, options=GREEDY, seed=0, stop=[stop])
    for row, wanted in zip(text[:, 3:].tolist(), free[:, 3:].tolist()):
        end = wanted.index(stop) if stop in wanted else len(wanted)
        assert row[:end] == wanted[:end][: len(row)]
        assert set(row[end:]) <= {stop}
    ends = [row.index(stop) if stop in row else 19 for row in free[:, 3:].tolist()]
    assert text.size(1) == 3 + max(ends) + 1


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    prompt = torch.full((1, 3), EOT)
    assert generate(model, prompt, 5, options=GREEDY, seed=0, stop=()).size(1) == 8
    first_new = int(generate(model, prompt, 1, options=GREEDY, seed=0)[0, -1])
    stopped = generate(model, prompt, 5, options=GREEDY, seed=0, stop=[EOT])
    assert first_new == EOT or stopped.size(1) > 4


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_state_stay(model, training):
    model.train(training)
    state = torch.get_rng_state()
    text = generate(model, prompts(2, 3), 4, options=SamplingOptions(), seed=0)
    assert model.training is training
    assert not text.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_is_restored_after_an_error(model):
    model.train()
    model.wpe.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        generate(model, prompts(1, 3), 4, options=GREEDY, seed=0)
    assert model.training


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(), SamplingOptions(0.7, 0, 0.9)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stop", [(), (EOT,)])
def test_logits_that_become_infinite_on_the_way_are_one_sentence(model, options, value, stop):
    model.wpe.weight.data[5:] = value
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, prompts(2, 3), 8, options=options, seed=0, stop=stop)


def test_it_runs_under_autocast(model):
    """The cache then holds bfloat16, as attention does."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = generate(model.float(), prompts(2, 3), 6, options=GREEDY, seed=0)
        expected = generate_uncached(model, prompts(2, 3), 1, GREEDY, seed=0)
    assert text.shape == (2, 9)
    assert torch.equal(text[:, :4], expected)


def test_padded_rows_of_the_vocabulary_are_never_drawn():
    """101 padded rows of logit 0 beside 27 real ones: nearly every draw would be one of them."""
    model = initialize(make_model(CONFIG, pad_vocab=True), seed=1)
    text = generate(model, prompts(8, 2), 20, options=SamplingOptions(top_k=0), seed=0)
    assert text.max() < CONFIG.vocab_size


def test_too_long_is_an_error_that_names_what_fits():
    check_length(20, 4, 24)
    check_length(23, 1, 24)
    with pytest.raises(UserError, match="max-new-tokens 4 is the most that fits"):
        check_length(20, 5, 24)
    with pytest.raises(UserError, match="shorten the prompt to 23 tokens"):
        check_length(24, 1, 24)
    with pytest.raises(UsageError, match="max-new-tokens is 0, must be at least 1"):
        check_length(3, 0, 24)


def write(model, prompt: str = "abc", **changes):
    values = {"n": 4, "max_new_tokens": 15, "options": SamplingOptions(1.5, 0), "seed": 1337}
    return write_samples(model, Letters(), prompt, **{**values, **changes})


def test_samples_continue_the_prompt_and_end_at_the_end_of_text(model):
    samples = write(model, n=40)
    ended = [s for s in samples if EOT in s.ids]
    assert ended
    assert len(ended) < len(samples)
    for s in samples:
        assert s.text.startswith("abc")
        assert "<|endoftext|>" not in s.text
        assert EOT not in s.ids[:-1]
        assert s.text == Letters().decode(s.ids).removesuffix("<|endoftext|>")
        assert len(s.ids) == 18 or s in ended


def test_an_empty_prompt_starts_a_document(model):
    for s in write(model, prompt=""):
        assert s.ids[0] == EOT
        assert "<|endoftext|>" not in s.text
        assert len(s.text) == len([i for i in s.ids if i != EOT])


def test_samples_depend_on_the_seed_alone(model):
    assert write(model) == write(model)
    assert write(model) != write(model, seed=1)


def test_no_samples_is_a_usage_error(model):
    with pytest.raises(UsageError, match="number of samples is 0"):
        write(model, n=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_a_usage_error(model, seed):
    with pytest.raises(UsageError, match=f"seed is {seed}, must be between 0"):
        write(model, seed=seed)
    write(model, n=1, seed=2**64 - 1)


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(top_k=5)])
@pytest.mark.parametrize("length", [3, 24, 30])
def test_past_the_context_each_token_follows_from_the_last_that_the_model_reads(model, options, length):
    ids = prompts(2, length)
    found = generate(model, ids, 26, options=options, seed=3, slide=True)
    assert torch.equal(found, generate_uncached(model, ids, 26, options, seed=3))


def test_within_the_context_sliding_changes_nothing(model):
    text = [generate(model, prompts(2, 3), 21, options=GREEDY, seed=0, slide=s) for s in (False, True)]
    assert torch.equal(*text)


def test_a_streamed_text_is_the_sample_in_whole_characters():
    tokenizer = open_tokenizer("bytes")
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, max_seq_len=200)
    drawn = initialize(make_model(config), 3).eval()
    text = "é🎭\ufffd中"
    stream_of = [*tokenizer.encode(text), *tokenizer.encode("中")[:2]]  # ends in two of three bytes
    pieces = list(text_pieces(tokenizer, stream_of[:1], stream_of[1:]))
    assert pieces == ["é", "🎭", "\ufffd", "中", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(stream_of)
    assert list(text_pieces(tokenizer, [tokenizer.eot], [97, tokenizer.eot, 98])) == [tokenizer.decode([97])]
    for seed in range(5):
        given = {"max_new_tokens": 60, "options": SamplingOptions(top_k=0), "seed": seed}
        pieces = list(stream_sample(drawn, tokenizer, "é ", **given))
        assert "".join(pieces) == write_samples(drawn, tokenizer, "é ", n=1, **given)[0].text
        assert pieces[0] == "é "
        assert len(pieces) > 5
