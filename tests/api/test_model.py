"""A model from Python: text, logits, loss, transformers."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import regpt
from regpt.__main__ import main


@pytest.fixture(scope="module")
def lm(straight: Path) -> regpt.LanguageModel:
    return regpt.load(straight, device="cpu")


def test_generate_writes_what_regpt_sample_does(lm, straight: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--device", "cpu", "--max-new-tokens", "5", "--seed", "7", "-n", "2", "--json"]
    assert main(["sample", str(straight), "--prompt", "ba do", *options]) == 0
    theirs = [sample["text"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert lm.generate(["ba do", "mi", "ba do"], max_new_tokens=5, seed=7)[::2] == theirs
    assert lm.generate("mi", max_new_tokens=5, seed=7) == lm.generate(["mi"], max_new_tokens=5, seed=7)[0]
    assert lm.generate([]) == []


def test_a_text_comes_in_pieces_that_joined_are_the_text(lm):
    options = {"max_new_tokens": 9, "seed": 7, "past_context": "slide"}  # 9 after 10: the model reads 16
    pieces = list(lm.generate("ba do mi é ru", stream=True, **options))
    assert "".join(pieces) == lm.generate("ba do mi é ru", **options)
    assert pieces[0] == "ba do mi é ru"
    assert len(pieces) > 4


def test_between_the_pieces_of_a_text_torch_is_as_it_was(straight: Path):
    torch.set_float32_matmul_precision("high")
    try:
        pieces = regpt.load(straight, device="cpu", precision="bf16").generate("ba", max_new_tokens=4, stream=True)
        for _ in pieces:
            assert torch.get_float32_matmul_precision() == "high"
            assert not torch.is_autocast_enabled("cpu")
            assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_past_the_context_is_refused_unless_sliding_is_asked_for(
    lm, straight: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(regpt.UserError, match="and max_new_tokens 40 exceed the model's length of 16"):
        lm.generate("ba do", max_new_tokens=40)
    with pytest.raises(regpt.UserError, match="and max_new_tokens 40 exceed the model's length of 16"):
        lm.generate("ba do", max_new_tokens=40, stream=True)  # with the call, not with the first piece
    options = ["-n", "2", "--max-new-tokens", "40", "--past-context", "slide", "--device", "cpu", "--json"]
    assert main(["sample", str(straight), "--prompt", "ba do", *options]) == 0
    theirs = [sample["text"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert lm.generate(["ba do"] * 2, max_new_tokens=40, past_context="slide") == theirs


def test_logits_are_those_of_the_module(lm):
    ids = lm.tokenizer.encode("ba do mi")
    expected = lm.module(torch.tensor([ids]))[0]
    for given in ("ba do mi", ids, np.array(ids, np.uint16), torch.tensor(ids)):
        assert torch.equal(lm.logits(given), expected)
    assert torch.allclose(lm.logits([ids, ids]), torch.stack([expected, expected]), atol=1e-6)
    assert not lm.logits(ids).requires_grad


def test_the_loss_is_the_mean_over_rows_that_start_afresh(lm):
    T = lm.config.max_seq_len
    ids = [lm.tokenizer.eot, *lm.tokenizer.encode("ba do mi ta ru ke " * 9)]
    assert T < len(ids) - 1 < 5 * T
    sums = []
    for begin in range(0, len(ids) - 1, T):
        row = torch.tensor(ids[begin : begin + T + 1])
        sums.append(torch.nn.functional.cross_entropy(lm.logits(row[:-1]), row[1:], reduction="sum").item())
    assert lm.loss("ba do mi ta ru ke " * 9) == pytest.approx(sum(sums) / (len(ids) - 1), rel=1e-5)
    assert lm.loss(ids) == lm.loss("ba do mi ta ru ke " * 9)
    assert lm.loss([ids[:9], ids[:9]]) == pytest.approx(lm.loss(ids[:9]), rel=1e-6)


def test_transformers_gets_a_model_of_the_same_logits_and_prints_nothing(lm, capfd):
    from transformers.utils import logging

    shown, ids = logging.is_progress_bar_enabled(), torch.tensor([lm.tokenizer.encode("ba do mi ta")])
    capfd.readouterr()
    theirs = lm.to_hf()
    assert "Loading" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled() is shown
    assert torch.allclose(theirs(ids).logits, lm.logits(ids), atol=1e-6)


def test_other_number_formats_stay_their_own_matter(straight: Path):
    torch.set_float32_matmul_precision("highest")
    double = regpt.load(straight, device="cpu", precision="fp64")
    assert double.logits("ba").dtype == torch.float64
    half = regpt.load(straight, device="cpu", precision="bf16")
    assert half.logits("ba").dtype == torch.float32
    assert half.generate("ba", max_new_tokens=2).startswith("ba")
    assert torch.get_float32_matmul_precision() == "highest"


def test_threads_may_share_a_model(lm):
    found: dict[int, str] = {}
    work = [
        threading.Thread(target=lambda seed=seed: found.update({seed: lm.generate("ba", max_new_tokens=4, seed=seed)}))
        for seed in range(3)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == {seed: lm.generate("ba", max_new_tokens=4, seed=seed) for seed in range(3)}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lm: lm.logits(""), "no token ids"),
        (lambda lm: lm.logits([[1, 2], [3]]), "no token ids"),
        (lambda lm: lm.logits([0.5]), "no token ids"),
        (lambda lm: lm.logits([10**30]), "no token ids"),
        (lambda lm: lm.logits([-1]), "token id -1"),
        (lambda lm: lm.logits([300]), "ids are 0 to 299"),
        (lambda lm: lm.logits([1] * 17), "the model reads 16"),
        (lambda lm: lm.loss([5]), "a loss needs two"),
        (lambda lm: lm.generate(3), "must be text"),
        (lambda lm: lm.generate([b"ba"]), "must be text"),
        (lambda lm: lm.generate("ba", temperature=-1), "temperature"),
        (lambda lm: lm.generate(["ba"], stream=True), "stream takes one prompt"),
        (lambda lm: lm.generate("ba", past_context="slid"), "did you mean 'slide'"),
        (lambda lm: lm.generate("ba", temperature="1"), "temperature is '1', must be a number"),
        (lambda lm: lm.generate("ba", top_k=2.5), "top_k is 2.5, must be a whole number"),
        (lambda lm: lm.generate("ba", max_new_tokens=True), "max_new_tokens is True, must be a whole number"),
        (lambda lm: lm.generate("ba", max_new_tokens=0), "max_new_tokens is 0, must be at least 1"),
        (lambda lm: lm.generate("ba", seed=None), "seed is None, must be a whole number"),
        (lambda lm: lm.generate("ba", temprature=1.0), "'temprature'; it takes prompt, max_new_tokens, temperature"),
        (lambda lm: regpt.load(None), "model is None, must be text or a path"),
        (lambda lm: regpt.evaluate(lm), "model is <LanguageModel"),
        (lambda lm: regpt.evaluate(lm.source, []), "no task"),
        (lambda lm: regpt.evaluate(lm.source, ["val", 5]), "must be text or a list of text"),
        (lambda lm: regpt.evaluate(lm.source, compile="maybe"), "compile is 'maybe', must be True or False"),
        (lambda lm: regpt.evaluate(lm.source, max_items=-1), "^max_items is -1"),
        (lambda lm: regpt.evaluate(lm.source, max_items=1), "^max_items would change nothing with tasks val,"),
        (lambda lm: lm.generate("ba", top_p=0), "^top_p is 0"),
        (lambda lm: regpt.evaluate(lm.source, val_token=1), "did you mean 'val_tokens'"),
        (lambda lm: regpt.read_run(5), "run is 5, must be text or a path"),
        (lambda lm: regpt.train(None, "run"), "recipe is None, must be text, a path or a RunConfig"),
        (lambda lm: regpt.load("no such model"), "does not exist"),
        (lambda lm: regpt.load(lm.source, precision="fp33"), "did you mean 'fp32'"),
        (lambda lm: regpt.load(lm.source, device="gpu"), "is not available"),
    ],
)
def test_what_cannot_be_computed_is_refused(lm, call, said: str):
    with pytest.raises(regpt.UsageError, match=said):
        call(lm)


def test_numbers_of_numpy_are_numbers(lm):
    options = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.int32(1)}
    assert lm.generate("ba", **options) == lm.generate("ba", max_new_tokens=3, temperature=0.5, seed=1)
