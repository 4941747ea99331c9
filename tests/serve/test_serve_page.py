"""The page and what it asks the server for: its files, explanations, checkpoints of a run."""

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving import ALL, CONFIG, MODEL, TOKENIZER, Serving, loaded, serving, written
from test_complaints import until

import tiny
from regpt.checkpoint.open import open_model
from regpt.engine.generate import encode_prompt
from regpt.serve.page import POLICY, page_files
from regpt.serve.server import load_model
from regpt.serve.worker import Limits

STEPS = (0, 2, 4, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints have different weights."""
    folder = tmp_path_factory.mktemp("page") / "small"
    for step in STEPS:
        torch.manual_seed(step)
        model = tiny.build_model(config=CONFIG, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        tiny.save_model(folder / "checkpoints" / f"step-{step:08d}", model, TOKENIZER, step)
    return folder


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Serving]:
    one = load_model("small", str(run), torch.device("cpu"), "fp32", 4, 0, "")
    with serving([loaded(), loaded("base", ""), one], checkpoints=2) as running:
        yield running


def explained(running: Serving, **body: object) -> dict:
    answer = running.post("explain", **{"seed": 1, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---- its files


def test_the_page_is_three_files_of_at_most_60_kb_and_a_strict_policy(served):
    found = {path: served.http.get(path) for path in ("/", "/page.css", "/page.js")}
    assert found.keys() == page_files().keys()
    for answer in found.values():
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
        assert answer.headers.get_list("content-security-policy") == [POLICY]
    assert sum(len(answer.content) for answer in found.values()) <= 60_000
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'; script-src 'self'; ")
    assert {served.http.head(path).status_code for path in (*found, "/health")} == {200}
    other = served.http.get("/health").headers["content-security-policy"]
    assert other == "default-src 'none'; frame-ancestors 'none'"


def test_the_page_makes_no_html_of_text_and_knows_no_other_address():
    for content in (content for _, content in page_files().values()):
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "eval(",
            "Function(",
            "document.write",
            "://",
            "srcdoc",
        ):
            assert word not in content, word
        assert not re.search(r"<[^>]*\s(on\w+|style)\s*=", content)  # inline handlers and styles
        assert not re.search(r"""(src|href)="//""", content)


def test_other_files_of_the_package_are_not_served(served):
    for path in (
        "/page.html",
        "/tokens.js",
        "/page.py",
        "/page.js/x",
        "/..%2fpage.py",
        "/%2e%2e/page.py",
        "/static/page.js",
    ):
        assert served.http.get(path).status_code == 404, path


def test_with_a_token_the_page_opens_and_everything_else_asks_for_it():
    with serving([loaded()], token="secret") as running:
        assert [running.http.get(path).status_code for path in page_files()] == [200, 200, 200]
        assert running.http.get("/v1/models").status_code == 401
        assert running.post("explain", prompt="a", seed=1).status_code == 401


# ---- explanations


def test_each_token_of_a_text_is_explained_as_it_was_drawn(served):
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "seed": 5}
    whole = served.complete(prompt="ab", max_tokens=12, logprobs=3, **options)["choices"][0]["logprobs"]
    for i, token in enumerate(whole["token_ids"]):
        found = explained(served, prompt="ab", tokens=whole["token_ids"][:i], **options)
        own = next(one for one in found["tokens"] if one["token"] == token)
        assert found["drawn"] == token
        assert own["logprob"] == pytest.approx(whole["token_logprobs"][i], abs=1e-5)
        assert found["tokens"][0]["logprob"] == pytest.approx(max(whole["top_logprobs"][i].values()), abs=1e-5)
        assert (found["position"], found["prompt_token_ids"]) == (2 + i, encode_prompt(TOKENIZER, "ab"))
        assert own["bytes"] == whole["bytes"][i]


def test_a_fork_goes_on_with_the_same_noise(served):
    """The rest after a text's own token is the text; after another it is what the engine writes after that."""
    whole = served.complete(prompt="ab", max_tokens=10, logprobs=0, seed=9, logit_bias={"256": -100})
    tokens = whole["choices"][0]["logprobs"]["token_ids"]
    start = explained(served, prompt="ab", seed=9)["prompt_token_ids"] + tokens[:4]
    bias = {"256": -100}
    rest = served.complete(prompt=start, max_tokens=6, logprobs=0, seed=9, logit_bias=bias)["choices"][0]
    assert rest["logprobs"]["token_ids"] == tokens[4:]
    other = served.complete(prompt=[*start, 65], max_tokens=5, logprobs=0, seed=9)["choices"][0]
    assert other["logprobs"]["token_ids"] == written([*start, 65], max_new_tokens=5, seed=9, options=ALL)[0]


def test_a_conversation_is_explained_after_its_template(served):
    messages = [{"role": "user", "content": "Hi"}]
    chat = served.post("chat/completions", messages=messages, max_tokens=3, seed=4, logprobs=True).json()
    first = chat["choices"][0]["logprobs"]["content"][0]
    found = explained(served, messages=messages, seed=4)
    assert found["drawn"] == first["token_id"]
    assert found["stop_token_ids"] == list(loaded().chat.stop_ids)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a"}, "seed"),
        ({"seed": 1}, "prompt"),
        ({"seed": 1, "prompt": "a", "messages": []}, "prompt"),
        ({"seed": 1, "messages": []}, "messages"),
        ({"seed": 1, "prompt": "a", "tokens": [257]}, "tokens"),
        ({"seed": 1, "prompt": "a", "tokens": [True]}, "tokens"),
        ({"seed": 1, "prompt": "a", "tokens": [-1]}, "tokens"),
        ({"seed": 1, "prompt": "a", "tokens": [0] * 95}, "tokens"),
        ({"seed": 1, "prompt": ["a", "b"]}, "prompt"),
        ({"seed": 1, "prompt": "a", "top": 51}, "top"),
        ({"seed": 1, "prompt": "a", "temperature": -1}, "temperature"),
        ({"seed": 1, "prompt": "a", "n": 2}, "n"),
    ],
)
def test_a_wrong_question_is_a_400_that_names_its_field(served, body, param):
    assert served.refused("explain", **body)["param"] == param


def test_a_model_without_a_template_explains_no_conversation(served):
    answer = served.http.post(
        "/v1/explain", json={"model": "base", "seed": 1, "messages": [{"role": "user", "content": "a"}]}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_logits_that_are_not_finite_are_said(served, monkeypatch):
    monkeypatch.setattr(type(MODEL), "logits", lambda self, hidden: torch.full((len(hidden), 257), torch.nan))
    answer = served.post("explain", prompt="a", seed=1)
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]["message"]


def test_a_question_that_fails_is_answered_and_the_engine_goes_on(served, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("regpt.serve.explain.explain_draw", broken)
        answer = served.post("explain", prompt="a", seed=1)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "RuntimeError: out of memory")
    assert explained(served, prompt="a")["position"] == 1


def test_explanations_count_as_texts_of_the_queue():
    with serving([loaded(rows=1)], Limits(queue=0)) as running:
        worker = running.server.config.app.workers[0]
        worker.open_texts += 1
        assert running.post("explain", prompt="a", seed=1).status_code == 429
        worker.open_texts -= 1
        assert running.post("explain", prompt="a", seed=1).status_code == 200
        assert worker.open_texts == 0


# ---- checkpoints


def text_by(running: Serving, model: str) -> str:
    answer = running.post("completions", model=model, prompt="ab", max_tokens=8, seed=3, logit_bias={"256": -100})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def held(running: Serving) -> list[str]:
    return list(running.server.config.app.checkpoints.held)


def test_checkpoints_are_listed_opened_when_asked_for_and_the_least_recently_used_goes(served, run):
    models = {one["id"]: one for one in served.http.get("/v1/models").json()["data"]}
    assert models["small"]["checkpoints"] == list(STEPS)
    assert "checkpoints" not in models["tiny"]
    first, second = text_by(served, "small:0"), text_by(served, "small:2")
    assert first != second
    assert text_by(served, "small:6") == text_by(served, "small")  # the newest
    assert held(served) == ["small:2", "small:6"]
    assert text_by(served, "small:2") == second
    assert text_by(served, "small:0") == first
    assert held(served) == ["small:2", "small:0"]
    with torch.no_grad():
        model = open_model(str(run / "checkpoints" / "step-00000000")).model
        logits = model(torch.tensor([encode_prompt(TOKENIZER, "ab")]))[0, -1]
    found = explained(served, model="small:0", prompt="ab", seed=3)
    assert found["tokens"][0]["logit"] == pytest.approx(float(logits.max()), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    ["small:1", "small:", "small:00", "small:-2", "small:２", "small:2:2", "tiny:0", "other:0", "small:../../x",
     "../small:0",     "small:step-00000002", "small:9" + "9" * 40],
)  # fmt: skip
def test_a_name_that_was_not_listed_is_a_404(served, name):
    answer = served.post("completions", model=name, prompt="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    if name.rpartition(":")[0] == "small":
        listed = ", ".join(f"small:{step}" for step in STEPS)
        assert answer.json()["error"]["message"].endswith(f", and of small the checkpoints {listed}")


def test_a_damaged_checkpoint_is_said_without_its_path_and_a_new_one_is_found(served, run, capsys):
    new = run / "checkpoints" / "step-00000008"
    shutil.copytree(run / "checkpoints" / "step-00000004", new)
    assert served.http.get("/v1/models/small").json()["checkpoints"] == [*STEPS, 8]
    answer = served.post("completions", model="small:8", prompt="a")  # of step 4: its state says another step
    assert answer.status_code == 404
    assert str(run) not in answer.text
    assert "cannot be read" in answer.json()["error"]["message"]
    shutil.rmtree(new)
    assert served.post("completions", model="small:8", prompt="a").status_code == 404


def test_a_checkpoint_that_writes_is_not_put_out_of_memory(run):
    one = load_model("small", str(run), torch.device("cpu"), "fp32", 4, 0, "")
    with serving([one], checkpoints=1) as running:
        text_by(running, "small:0")
        worker = running.server.config.app.checkpoints.held["small:0"].worker
        worker.open_texts += 1
        answer = running.post("completions", model="small:2", prompt="a")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        worker.open_texts -= 1
        text_by(running, "small:2")
        until(lambda: not worker.thread.is_alive())
        with pytest.raises(Exception, match="room for another"):
            asyncio.run(worker.ask(lambda engine: None))


def test_without_checkpoints_in_memory_a_run_has_only_its_newest(run):
    one = load_model("small", str(run), torch.device("cpu"), "fp32", 4, 0, "")
    with serving([one], checkpoints=0) as running:
        assert "checkpoints" not in running.http.get("/v1/models/small").json()
        assert running.post("completions", model="small:0", prompt="a").status_code == 404


def test_a_draft_proposes_the_tokens_of_a_served_model_and_changes_none(run):
    """Of its checkpoints, too; `regpt serve --draft` gives the engines these options."""
    from regpt.cli.chat import open_draft

    asked = []

    def options(opened):
        asked.append(opened.step)
        return {"draft": open_draft("ngram", opened, "fp32"), "draft_tokens": 3, "narrow_cache": False}

    cpu = torch.device("cpu")
    plain, drafting = (load_model("small", str(run), cpu, "fp32", 4, 0, "", False, *more) for more in ((), (options,)))
    texts = []
    for one in (plain, drafting):
        with serving([one], checkpoints=1) as running:
            given = {"prompt": "abababab", "max_tokens": 24, "temperature": 0}
            texts.append([running.post("completions", model=name, **given).json() for name in ("small", "small:0")])
    assert [[one["choices"] for one in each] for each in texts[:1]] == [[one["choices"] for one in texts[1]]]
    assert drafting.engine.proposed > 0 == plain.engine.proposed
    assert len(asked) == 2
