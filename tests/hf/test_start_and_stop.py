"""A model whose texts start with a token and end with several, against transformers: a tiny Llama 3 in a folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import regpt
from regpt.checkpoint.open import OpenModel, open_model
from regpt.engine.generate import encode_prompt, stream_sample, write_samples
from regpt.engine.processing import SamplingOptions
from regpt.evals.choices import Choices, Question
from regpt.evals.core import CoreSettings, CoreTask, Example
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
from regpt.text.open import open_tokenizer
from tokenizer_files import write_family

BOS, EOS, EOT, V = 400, 401, 402, 403  # <|begin_of_text|>, <|end_of_text|>, <|eot_id|>
PROMPT = "The quick brown fox"
GREEDY = SamplingOptions(top_k=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its greedy text after `PROMPT` is "y", then <|eot_id|>, which only generation_config.json names."""
    folder = write_family("llama3", tmp_path_factory.mktemp("llama"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    last, then = (open_tokenizer(folder).encode(text)[-1] for text in (PROMPT, "y"))
    embedding = model.model.embed_tokens.weight.data
    model.lm_head.weight.data[then], model.lm_head.weight.data[EOT] = 30 * embedding[last], 30 * embedding[then]
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, EOT])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenModel:
    return open_model(str(folder))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", [PROMPT, "<|begin_of_text|>" + PROMPT, "", "  two spaces"])
def test_a_prompt_starts_once_with_the_token_that_starts_texts(opened: OpenModel, theirs: Any, prompt: str):
    expected = theirs[1](prompt.removeprefix("<|begin_of_text|>")).input_ids
    assert encode_prompt(opened.tokenizer, prompt) == expected
    assert expected.count(BOS) == 1


def test_samples_end_with_any_token_that_ends_texts_as_in_transformers(opened: OpenModel, theirs: Any, folder: Path):
    model, tokenizer = theirs
    expected = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=20, do_sample=False)[0].tolist()
    assert expected[-1] == EOT
    assert opened.tokenizer.stop_ids == (BOS, EOS, EOT)
    drawn = {"max_new_tokens": 20, "options": GREEDY, "seed": 0}
    found = write_samples(opened.model, opened.tokenizer, PROMPT, n=2, **drawn)
    assert [one.ids for one in found] == [expected] * 2
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert {one.text for one in found} == {text}
    assert "".join(stream_sample(opened.model, opened.tokenizer, PROMPT, **drawn)) == text
    assert regpt.load(folder).generate(PROMPT, max_new_tokens=20, top_k=1) == text


def test_rows_that_end_with_different_tokens_end_each_with_its_own(opened: OpenModel):
    options = SamplingOptions(temperature=50.0, top_k=0)
    found = write_samples(opened.model, opened.tokenizer, "", n=200, max_new_tokens=60, options=options, seed=0)
    ends = {one.ids[-1] for one in found if len(one.ids) < 61}
    assert ends == {BOS, EOS, EOT}
    assert not any(end in one.ids[1:-1] for one in found for end in (BOS, EOS, EOT))


def test_logits_and_loss_from_python_are_those_of_transformers(theirs: Any, folder: Path):
    model, tokenizer = theirs
    ids, ours = tokenizer(PROMPT, return_tensors="pt").input_ids, regpt.load(folder)
    torch.testing.assert_close(ours.logits(PROMPT), model(ids).logits[0].detach(), atol=1e-5, rtol=0)
    for text in (PROMPT, "<|begin_of_text|>" + PROMPT):
        assert ours.loss(text) == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def likelihood(theirs: Any, context: str, ending: str) -> float:
    """Log-likelihood of `ending` after `context`, as transformers tokenizes the context."""
    model, tokenizer = theirs
    before = tokenizer(context).input_ids
    after = tokenizer(ending, add_special_tokens=False).input_ids
    log_p = model(torch.tensor([before + after])).logits[0].detach().double().log_softmax(-1)
    return sum(log_p[len(before) + k - 1, token].item() for k, token in enumerate(after))


@pytest.mark.parametrize("context", [PROMPT, "<|begin_of_text|>" + PROMPT, ""])
def test_questions_are_scored_after_the_token_that_starts_texts(opened: OpenModel, theirs: Any, context: str):
    endings = (" jumps", " lazy dog")
    task = Choices("mc", [Question(context, endings, 0)], opened.tokenizer, opened.tokenizer.eot)
    found = Scorer(opened.model, Mesh(0, 1, torch.device("cpu")))(task.prompts([0])).log_likelihood
    expected = [likelihood(theirs, context.removeprefix("<|begin_of_text|>"), ending) for ending in endings]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_few_shot_prompts_start_once_with_the_token_that_starts_texts(opened: OpenModel):
    settings = CoreSettings("tiny", "multiple_choice", 2, ": ", 0.5)
    examples = [Example((f"fox {k}",), ("jumps", "dog"), 0) for k in range(4)]
    prompt = CoreTask(settings, examples, opened.tokenizer, opened.tokenizer.eot).prompt(0)
    assert prompt.context[0] == BOS
    assert not np.isin(prompt.context[1:], BOS).any()
    assert opened.tokenizer.decode(prompt.context[1:].tolist()).endswith("\nfox 0:")


def test_lm_eval_sees_the_starting_token_once_and_stops_at_every_ending(opened: OpenModel, theirs: Any):
    pytest.importorskip("lm_eval")
    from regpt.evals.harness import HarnessModel

    model = HarnessModel(Scorer(opened.model, Mesh(0, 1, torch.device("cpu"))), opened.tokenizer)
    for text in (PROMPT, "<|begin_of_text|>" + PROMPT):
        assert model.tok_encode(text) == theirs[1](PROMPT).input_ids
    assert model.tok_encode(PROMPT, add_special_tokens=False) == theirs[1](PROMPT).input_ids[1:]
    assert model.continuations([model.asked_of(PROMPT, {"max_gen_toks": 20})]) == ["y"]


def test_add_bos_token_without_a_post_processor_puts_it_before_texts(tmp_path: Path):
    options = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    tokenizer = open_tokenizer(write_family("smollm", tmp_path / "a", tokenizer_config=options))
    assert encode_prompt(tokenizer, "fox") == [tokenizer.eot, *tokenizer.encode("fox")]
    plain = open_tokenizer(write_family("smollm", tmp_path / "b"))
    assert encode_prompt(plain, "fox") == plain.encode("fox")
    assert encode_prompt(plain, "<|endoftext|>fox") == plain.encode("<|endoftext|>fox")
