"""`regpt report --timelapse`: a run's checkpoints write the same prompts with the same noise, into one offline file."""

import base64
import hashlib
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from chromium import CHROMIUM, Browser
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.open import open_model
from regpt.engine.processing import SamplingOptions
from regpt.engine.reference import generate_uncached
from regpt.ranges import evenly
from regpt.runs.timelapse import timelapse_page, write_timelapse

HOSTILE = "ba </script><img src=x onerror='window.pwned=1'>"


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return json.loads(found[1])


def test_each_checkpoint_writes_what_the_uncached_loop_writes(straight, tmp_path, capsys):
    out = tmp_path / "lapse.html"
    assert (
        main(
            ["report", str(straight), "--timelapse", "--out", str(out), "--prompts", "ba bo", "da", "--new-tokens", "6"]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{out}\n"
    data = data_of(out)
    assert data["prompts"] == ["ba bo", "da"]
    assert [one["step"] for one in data["steps"]] == [2, 4, 6, 8]
    assert [one["loss"] and one["loss"]["step"] for one in data["steps"]] == [0, 3, 6, 8]
    for one in data["steps"]:
        opened = open_model(str(checkpoint_folder(straight, one["step"])))
        for prompt, tokens in zip(data["prompts"], one["texts"]):
            ids = opened.tokenizer.encode(prompt)
            text = generate_uncached(opened.model, torch.tensor([ids]), 6, SamplingOptions(top_k=50), 1337)[0].tolist()
            new = [token[0] for token in tokens]
            assert new == text[len(ids) : len(ids) + len(new)]
            assert len(new) == 6 or new[-1] in opened.tokenizer.stop_ids
            with torch.no_grad():
                logprobs = opened.model(torch.tensor([text]))[0, len(ids) - 1 :].log_softmax(-1)
            for i, (token, logprob, top) in enumerate(tokens):
                assert logprob == pytest.approx(float(logprobs[i, token]), abs=1e-3)
                assert top[0][1] == pytest.approx(float(logprobs[i].max()), abs=1e-3)
                assert data["tokens"][str(token)].encode("latin-1") == opened.tokenizer.token_bytes(token)


def test_the_file_needs_nothing_else_and_its_policy_names_its_own_script_and_style(straight, tmp_path):
    first, second = (
        write_timelapse(straight, tmp_path / name).read_text(encoding="utf-8") for name in ("a.html", "b.html")
    )
    assert first == second
    first = timelapse_page(HOSTILE, HOSTILE, {"prompts": [HOSTILE]})
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', first)
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", first, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} &#x27;sha256-{digest}&#x27;" in policy or f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for word in ("innerHTML", "://", "<img", "eval("):
        assert word not in first


def test_by_default_it_lies_in_the_run_with_the_prompts_of_its_configuration(cut):
    page = write_timelapse(cut, None)
    assert page == cut / "timelapse.html"
    data = data_of(page)
    assert data["prompts"] == ["ba bo"]
    assert all(len(one["texts"][0]) <= 16 for one in data["steps"])


def test_a_damaged_checkpoint_is_left_out_and_one_alone_is_refused(cut, capsys):
    whole = shutil.copytree(checkpoint_folder(cut, 4), checkpoint_folder(cut, 6))  # its state says step 4
    page = write_timelapse(cut, None)
    assert [one["step"] for one in data_of(page)["steps"]] == [2, 4]
    assert "left out step-00000006" in capsys.readouterr().err
    shutil.rmtree(whole)
    shutil.rmtree(checkpoint_folder(cut, 4))
    assert main(["report", str(cut), "--timelapse"]) == 1
    said = capsys.readouterr().err
    assert "has 1 checkpoint that can be read, a time lapse needs two" in said
    assert "--checkpoint.keep-last 0" in said


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        (["RUN", "--prompts", "a"], 2, "add --timelapse"),
        (["RUN", "RUN", "--timelapse"], 2, "one run folder"),
        (["s3://bucket/run", "--timelapse"], 2, "one run folder"),
        (["RUN/none", "--timelapse"], 1, "does not exist"),
        (["RUN", "--timelapse", "--out", "a.txt"], 2, "no name of an HTML file"),
        (["RUN", "--timelapse", "--new-tokens", "100"], 1, "and new-tokens 100 exceed the model's length of 16"),
        (["RUN", "--timelapse", "--prompts", "ba " * 40], 1, "shorten the prompt"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(straight, capsys, flags, code, part):
    assert main(["report", *(flag.replace("RUN", str(straight)) for flag in flags)]) == code
    said = capsys.readouterr().err
    assert part in said
    assert said.count("\n") == 1


def test_of_many_checkpoints_the_first_the_last_and_even_steps_are_taken():
    folders = [Path(str(i)) for i in range(1000)]
    found = [int(one.name) for one in evenly(folders, 100)]
    assert (len(found), found[0], found[-1]) == (100, 0, 999)
    assert {b - a for a, b in pairwise(found)} <= {10, 11}
    assert evenly(folders[:3], 100) == folders[:3]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_the_slider_shows_each_checkpoints_text_and_text_stays_text(tmp_path):
    tokens = [[[0, -0.5, [[0, -0.5], [1, -1.5]]], [1, -9.0, []], [0, 0.0, []]], [[1, -0.1, []]]]
    steps = [{"step": 10 * i, "loss": None, "texts": [one]} for i, one in enumerate(tokens)]
    data = {"prompts": [HOSTILE], "steps": steps, "tokens": {"0": HOSTILE, "1": "\u00e3"}}
    page = tmp_path / "lapse.html"
    page.write_text(timelapse_page("run", "said", data), encoding="utf-8")
    tab = Browser(tmp_path / "profile")
    try:
        tab.open(page.as_uri(), 390, 800)
        assert tab.see("document.querySelector('.prompt').textContent") == HOSTILE
        for i, one in reversed(list(enumerate(steps))):
            moved = f"s.value = {i}; s.dispatchEvent(new Event('input'))"
            tab.see(f"(() => {{ const s = document.querySelector('input'); {moved}; }})()")
            assert tab.see("document.querySelector('b.step').textContent") == f"step {one['step']}"
            assert tab.see("document.querySelectorAll('.text .tok').length") == len(one["texts"][0])
        assert tab.see("document.querySelector('.text .tok').textContent") == HOSTILE
        tab.point(".text .tok[data-i='0']")
        assert "61\u00a0%" in tab.see("document.querySelector('#why b').textContent")
        assert tab.see("document.documentElement.scrollWidth - innerWidth") <= 0
        assert tab.see("document.querySelectorAll('img').length") == 0
        assert tab.see("typeof window.pwned") == "undefined"
        assert not tab.console
        assert {one for one in tab.asked if not one.startswith("data:")} == {page.as_uri()}
        tab.picture(tmp_path / "lapse.png")
    finally:
        tab.close()
