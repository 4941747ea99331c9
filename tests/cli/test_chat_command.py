"""`regpt chat`: messages of standard input, answered one after the other."""

import io
import json
import sys
from dataclasses import replace

import pytest

import tiny
from regpt.cli import chat
from regpt.engine.generate import write_samples
from regpt.engine.processing import SamplingOptions
from regpt.engine.reference import generate_uncached
from regpt.hf.export import export_hf
from regpt.text.bpe import train_bpe
from regpt.text.chat import ChatTemplate

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["hello hello"], 257)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = replace(tiny.CONFIG, vocab_size=tokenizer.n_vocab, max_seq_len=96)
    return tiny.build_model(config=config, dtype=tiny.torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory, model, tokenizer) -> str:
    return str(export_hf(model, tokenizer, tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, model, tokenizer) -> str:
    folder = export_hf(model, tokenizer, tmp_path_factory.mktemp("tuned") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return str(folder)


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(*args: str, lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        assert chat.main([*args, "--device", "cpu", "--max-new-tokens", "5"]) == 0
        return tuple(capsys.readouterr())

    return run


def test_a_base_model_continues_the_text_and_is_said_to_be_untuned(talk, base, model, tokenizer):
    out, noted = talk(base, lines="Hello\n")
    expected = write_samples(model, tokenizer, "Hello", n=1, max_new_tokens=5, options=SamplingOptions())
    assert "Hello" + out.removesuffix("\n") == expected[0].text
    assert "no chat template: it was not trained to answer" in noted
    out, noted = talk(base, lines="/system be brief\nHello\n")
    assert "a system message needs a chat template" in noted
    assert out


def test_the_conversation_is_the_prompt_of_the_next_answer(talk, tuned, tmp_path):
    saved, again = tmp_path / "talk.json", tmp_path / "again.json"
    out, _ = talk(tuned, "--system", "brief", lines=f"Hi\nAnd?\n/save {saved}\n")
    said = json.loads(saved.read_text())["messages"]
    assert [one["role"] for one in said] == ["system", "user", "assistant", "user", "assistant"]
    assert out == said[2]["content"] + "\n" + said[4]["content"] + "\n"
    # Loaded without its last message, another process gives the same answer.
    saved.write_text(json.dumps({"messages": said[:3]}), encoding="utf-8")
    talk(tuned, lines=f"/load {saved}\nAnd?\n/save {again}\n")
    assert json.loads(again.read_text())["messages"] == said


def test_retry_writes_another_answer_with_the_next_seed(talk, tuned, tmp_path):
    saved = tmp_path / "talk.json"
    out, noted = talk(tuned, lines=f"Hi\n/retry\n/params seed\n/params\n/save {saved}\n")
    first, second = out.split("\n")[:2]
    assert first != second
    assert [one["content"] for one in json.loads(saved.read_text())["messages"]] == ["Hi", second]
    assert "seed 1338" in out
    assert "/params seed is not understood; give a name and a value, of temperature, top-k" in noted
    assert talk(tuned, "--seed", "1338", lines="Hi\n")[0] == second + "\n"


def test_parameters_are_changed_and_refused_by_the_next_line(talk, tuned):
    out, noted = talk(tuned, lines="/params temperature 0\nHi\n/reset\nHi\n/params top-p 7\n/params top-k x\n/no\n")
    first, second, _ = out.split("\n")
    assert first == second  # greedy, from the same beginning
    for said in ("top-p is 7.0, must be above 0", "top-k is 'x', must be a number", "/no is no command; /help lists"):
        assert said in noted


def test_a_message_of_several_lines_stands_between_quotation_marks(talk, tuned, tmp_path):
    saved = tmp_path / "talk.json"
    talk(tuned, lines=f'"""\none\n\ntwo\n"""\n/save {saved}\n')
    assert json.loads(saved.read_text())["messages"][0]["content"] == "one\n\ntwo"


def test_what_does_not_fit_is_refused_and_the_conversation_kept(talk, tuned, tmp_path):
    saved = tmp_path / "talk.json"
    _, noted = talk(tuned, lines=f"Hi\n{'long ' * 30}\n/save {saved}\n")
    assert "the model reads 96" in noted
    assert "/reset forgets the conversation" in noted
    assert len(json.loads(saved.read_text())["messages"]) == 2


def test_a_file_that_is_no_conversation_is_refused(talk, tuned, tmp_path):
    (tmp_path / "x.json").write_text('{"messages": [{"role": 1}]}')
    _, noted = talk(tuned, lines=f"/load {tmp_path / 'x.json'}\n/load nowhere\n/save\n")
    assert "holds no messages of a role and a content" in noted
    assert "there is no file 'nowhere'" in noted
    assert "/save needs a file name" in noted


def test_input_that_is_not_utf_8_ends_with_its_line(monkeypatch, tuned):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    with pytest.raises(chat.UserError, match="line 1 of standard input is not UTF-8"):
        chat.main([tuned, "--device", "cpu"])


def test_passages_are_put_before_the_message_and_named_after_the_answer(
    talk, tuned, base, tmp_path, monkeypatch, model, tokenizer
):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    notes, saved = tmp_path / "notes", tmp_path / "talk.json"
    notes.mkdir()
    (notes / "a.md").write_text("Zebras hide.")
    out, noted = talk(tuned, "--retrieve", str(notes), "--temperature", "0", lines=f"zebra?\nokapi?\n/save {saved}\n")
    said = json.loads(saved.read_text())["messages"]
    assert [one["content"] for one in said[::2]] == ["zebra?", "okapi?"]  # the passage is not of the conversation
    asked = [{"role": "user", "content": "[1] Zebras hide.\n\nzebra?"}]
    prompt = ChatTemplate(TEMPLATE, tokenizer).encode(asked)
    text = generate_uncached(model, tiny.torch.tensor([prompt]), 5, SamplingOptions(top_k=1), 0)[0, len(prompt) :]
    assert tokenizer.decode(text.tolist()) == said[1]["content"]
    assert "1 passage of 1 file in " in noted
    assert noted.index("from [1] a.md, line 1") < noted.index("no passage of ")
    out, noted = talk(base, "--retrieve", str(notes), lines="zebra\n")
    assert out
    assert "from [1] a.md, line 1" in noted
