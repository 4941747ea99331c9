"""The page in a real browser: it writes, explains, forks, slides over checkpoints, compares; and text stays text."""

import json
from collections.abc import Iterator

import pytest
import torch
from serving import MODEL, TOKENIZER, Serving, loaded, serving
from test_serve_page import run  # noqa: F401

from chromium import CHROMIUM, Browser
from regpt.checkpoint.open import OpenModel
from regpt.engine.generate import encode_prompt
from regpt.serve.server import load_model

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
HOSTILE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
QUIET = """document.querySelector('#stop').disabled &&
  ![...document.querySelectorAll('.panel')].some((one) => one.textContent.endsWith('…'))"""
TEXT = """[...document.querySelectorAll('.panel')].map((one) =>
  [...one.querySelectorAll('.tok')].map((token) => token.textContent).join(''))"""
TIPS = """[...document.querySelectorAll('.track b')].map((one) =>
  [one.closest('tr').className, parseFloat(one.style.left)])"""
HEIGHTS = """[...document.querySelectorAll('button, select, textarea, input')]
  .filter((one) => one.checkVisibility()).map((one) => one.getBoundingClientRect().height)"""
ABOVE = """document.querySelector('.tok.on').getBoundingClientRect().bottom <
  document.querySelector('#why').getBoundingClientRect().top"""
SHADED = """[...document.querySelectorAll('.panel:nth-child(%d) .tok')].filter((one) =>
  one.matches('.here, .there') && one.style.getPropertyValue('--h') !== '0%%').length > 5"""
FAKE = """window.fetch = async (path) => {
  const bytes = [...new TextEncoder().encode(HOSTILE)], scores = { score: 0, probability: 0.6, noise: 1, rank: 1 };
  const one = { token: 5, bytes, text: HOSTILE, logit: 1, logprob: -0.5, adjusted: 1, dropped_by: null, ...scores };
  const found = { drawn: 5, kept: 2, temperature: 1, prompt_token_ids: [1], stop_token_ids: [], tokens: [one] };
  if (path.endsWith("explain")) return new Response(JSON.stringify(found));
  const logprobs = { token_ids: [5, 5], token_logprobs: [-0.5, -0.5], bytes: [bytes, bytes] };
  const chunk = { choices: [{ index: 0, text: HOSTILE, finish_reason: "length", logprobs }] };
  return new Response(`data: ${JSON.stringify(chunk)}\\n\\ndata: [DONE]\\n\\n`);
};"""


@pytest.fixture(scope="module")
def served(run) -> Iterator[Serving]:  # noqa: F811
    one = load_model("small", str(run), torch.device("cpu"), "fp32", 8, 0, "")
    with serving([one, loaded(), loaded("base", "")]) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tab(browser, served) -> Iterator[Browser]:
    """The page, opened; at the end it has asked nobody else, and said nothing to the console."""
    browser.console.clear()
    browser.asked.clear()
    browser.open(f"{served.url}/")
    browser.until("!document.querySelector('#work').hidden")
    yield browser
    assert not browser.console
    assert all(address.startswith((served.url, "data:,")) for address in browser.asked)


def put(tab: Browser, name: str, value: object) -> None:
    """A value into a control, as if it were chosen."""
    events = "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, { bubbles: true }))"
    tab.see(f"(() => {{ const one = document.getElementById('{name}'); one.value = {json.dumps(value)}; {events} }})()")


def write(tab: Browser, panels: int = 1) -> list[str]:
    tab.point("#write", press=True)
    tab.until(
        f"document.querySelectorAll('.panel').length === {panels} && document.querySelectorAll('.text .tok').length > 5"
    )
    tab.until(QUIET)
    return tab.see(TEXT)


def api(served: Serving, model: str, prompt: object, seed: int = 1337, most: int = 48) -> str:
    body = {"prompt": prompt, "seed": seed, "max_tokens": most, "top_k": 50, "logprobs": 0}
    found = served.complete(model=model, **body)["choices"][0]
    return TOKENIZER.decode(found["logprobs"]["token_ids"])


def letters(text: str) -> str:
    """What is the same however white space, parts of characters and control characters are shown."""
    return "".join(one for one in text if "!" <= one <= "~")


def test_samples_are_written_side_by_side_and_a_token_is_explained(tab, served, tmp_path):
    put(tab, "prompt", "ab")
    put(tab, "s-n", 3)
    texts = write(tab, panels=3)
    assert [letters(one) for one in texts] == [letters(api(served, "small", "ab", 1337 + k)) for k in range(3)]
    tab.point(".panel:nth-child(2) .tok[data-i='5']")
    tab.until("document.querySelector('#why .draw')")
    ids = served.complete(model="small", prompt="ab", seed=1338, max_tokens=48, top_k=50, logprobs=0)
    ids = ids["choices"][0]["logprobs"]["token_ids"]
    found = served.post("explain", model="small", prompt="ab", seed=1338, top_k=50, tokens=ids[:5]).json()
    names = tab.see("[...document.querySelectorAll('#why .draw tbody tr')].map((row) => row.className)")
    assert names.index("won") == [one["token"] for one in found["tokens"]].index(ids[5])
    assert "noise" in tab.see("document.querySelector('.path').textContent")
    tips = tab.see(TIPS)
    assert max(tips, key=lambda one: one[1])[0] == "won"
    tab.picture(tmp_path / "explained.png")


def test_a_fork_keeps_what_is_before_it_and_the_keyboard_reaches_everything(tab, served, tmp_path):
    put(tab, "prompt", "ab")
    (first,) = write(tab)
    tab.see("document.querySelector('.text .tok').focus()")
    for _ in range(4):
        tab.press("ArrowRight")
    assert tab.see("document.activeElement.dataset.i") == "4"
    tab.press("Enter")
    tab.until("document.activeElement.closest('.draw')")
    tab.press("Escape")
    tab.until("document.activeElement.dataset.i === '4'")
    tab.press("Enter")
    tab.until("document.activeElement.closest('.draw')")
    tab.press("Enter", text="\r")
    tab.until("document.querySelectorAll('.panel').length === 2")
    tab.until(QUIET)
    again, second = tab.see(TEXT)
    ids = served.complete(model="small", prompt="ab", seed=1337, max_tokens=48, top_k=50, logprobs=0)
    ids = ids["choices"][0]["logprobs"]["token_ids"][:4]
    found = served.post("explain", model="small", prompt="ab", seed=1337, top_k=50, tokens=ids).json()
    start = [*ids, next(one["token"] for one in found["tokens"] if one["token"] != found["drawn"])]
    rest = api(served, "small", [*encode_prompt(TOKENIZER, "ab"), *start], most=43)
    assert again == first
    assert letters(second) == letters(TOKENIZER.decode(start)) + letters(rest)
    assert tab.see("[...document.querySelectorAll('.forked')].map((one) => one.dataset.i)") == ["4"]
    tab.picture(tmp_path / "fork.png")


def test_the_slider_goes_over_the_checkpoints_with_the_same_noise(tab, served, tmp_path):
    tab.point("button[data-mode=learn]", press=True)
    put(tab, "prompt", "ab")
    (last,) = write(tab)
    assert letters(last) == letters(api(served, "small:6", "ab"))
    tab.point("button[aria-label='Earlier checkpoint']", press=True)
    tab.until("document.querySelector('.panel h3').textContent === 'small:4'")
    tab.until(QUIET)
    assert letters(tab.see(TEXT)[0]) == letters(api(served, "small:4", "ab"))
    put(tab, "colour", "d")
    tab.until(SHADED % 1)
    tab.picture(tmp_path / "learn.png")


def test_two_models_write_side_by_side_and_their_difference_is_a_colour(tab, served, tmp_path):
    tab.point("button[data-mode=two]", press=True)
    put(tab, "second", "small:2")
    put(tab, "prompt", "ab")
    put(tab, "colour", "d")
    texts = write(tab, panels=2)
    assert [letters(one) for one in texts] == [letters(api(served, name, "ab")) for name in ("small", "small:2")]
    for panel in (1, 2):
        tab.until(SHADED % panel)
    tab.picture(tmp_path / "two.png")


def test_a_conversation_is_written_and_a_base_model_is_said_to_be_untuned(tab, served, tmp_path):
    tab.point("button[data-mode=chat]", press=True)
    assert "untuned" in tab.see("document.querySelector('#about').textContent")
    assert tab.see("document.querySelector('#write').disabled")
    put(tab, "model", "tiny")
    put(tab, "prompt", "Hi")
    put(tab, "s-max_tokens", 8)
    (answer,) = write(tab)
    body = {"messages": [{"role": "user", "content": "Hi"}], "seed": 1337, "max_tokens": 8, "top_k": 50}
    said = served.post("chat/completions", **body).json()["choices"][0]["message"]["content"]
    assert letters(answer).removesuffix("<|endoftext|>") == letters(said)
    put(tab, "prompt", "And then?")
    write(tab, panels=2)
    assert tab.see("[...document.querySelectorAll('.said')].map((one) => one.textContent)") == ["Hi", "And then?"]
    tab.picture(tmp_path / "chat.png")


def test_it_fits_on_a_phone_and_is_dark_where_the_system_is(tab, tmp_path):
    for width, dark in ((390, True), (390, False), (800, False)):
        tab.size(width, 844, dark)
        put(tab, "prompt", "x" * 40)
        write(tab)
        tab.point(".text .tok[data-i='3']", press=True)
        tab.until("document.querySelector('.draw button:not(:disabled)')")
        assert tab.see("document.documentElement.scrollWidth - innerWidth") <= 0
        assert min(tab.see(HEIGHTS)) >= 24
        assert tab.see(ABOVE)
        assert (tab.see("getComputedStyle(document.body).backgroundColor") == "rgb(13, 16, 20)") is dark
        tab.picture(tmp_path / f"phone-{width}-{dark}.png")
        tab.press("Escape")


def test_what_a_model_or_a_user_writes_stays_text(tab):
    tab.see(f"const HOSTILE = {json.dumps(HOSTILE)};\n{FAKE}")
    put(tab, "prompt", HOSTILE)
    tab.point("#write", press=True)
    tab.until("document.querySelectorAll('.tok').length > 5")
    tab.point(".text .tok[data-i='1']", press=True)
    tab.until("document.querySelector('.draw')")
    assert tab.see("document.querySelectorAll('img, .text script, #why script').length") == 0
    assert tab.see("document.querySelector('.text').textContent") == 3 * HOSTILE
    assert HOSTILE.replace(" ", "␣") in tab.see("document.querySelector('#why h2').textContent")
    assert tab.see("typeof window.pwned") == "undefined"


def test_errors_of_the_server_are_its_sentences(tab):
    put(tab, "prompt", "x" * 200)
    tab.point("#write", press=True)
    tab.until("document.querySelector('.panel .bad')")
    assert "shorten the prompt" in tab.see("document.querySelector('.panel .bad').textContent")
    tab.console.clear()  # Chromium says that an answer was a 400


def test_a_server_with_a_token_asks_for_it(browser):
    with serving([loaded(opened=OpenModel(MODEL, TOKENIZER, None, "tiny"))], token="secret") as running:
        browser.open(f"{running.url}/")
        browser.until("!document.querySelector('#key').hidden")
        for token, there in (("wrong", False), ("secret", True)):
            browser.see(f"document.querySelector('#token').value = {json.dumps(token)}")
            browser.point("#key button", press=True)
            browser.until(
                "!document.querySelector('#alert').hidden" if not there else "!document.querySelector('#work').hidden"
            )
        assert browser.see("document.querySelector('#key').hidden && document.querySelector('#alert').hidden")
