"""A name that no file system takes is a name of nothing, wherever one is given."""

import pytest

NAMES = {"too long": "a" * 5000, "NUL": "a\0b/*.jsonl"}
PLACES = """
sample NAME --prompt x
sample NAME:/x --prompt x
export NAME --out e
export RUN --out NAME
inspect NAME
inspect RUN --out NAME/x.png
report NAME
report NAME RUN --out r.html
report RUN --out NAME
diff NAME NAME
diff RUN RUN2 --seeds NAME
diff RUN RUN2 --out NAME
scaling NAME NAME
scaling RUN --out NAME
replay NAME --step 1
checkpoint list NAME
checkpoint verify NAME
eval NAME --data DATA
eval RUN --data NAME
eval RUN --tasks mc:NAME
eval RUN --tasks text:NAME
eval RUN --tasks hellaswag:NAME
eval RUN --tasks core:NAME
eval RUN --data DATA --items NAME
eval RUN --data DATA --json NAME
train --resume NAME
train --fork-from NAME --out r
train NAME --out r
train NAME.toml --out r
train gpt2-tiny TINY --data NAME --out r
train gpt2-tiny TINY --data NAME=1 --data DATA=1 --out r
train gpt2-tiny TINY --out NAME
train gpt2-tiny TINY --init-from NAME --out r
train named.toml --out r
verify-resume gpt2-tiny TINY --out NAME
bench train gpt2-tiny TINY --json NAME
plan NAME
data info NAME
data verify NAME
data import NAME --out o
data import tokens.bin --val NAME --out o
data import tokens.bin --tokenizer NAME --out o
data import tokens.bin --out NAME
data prepare NAME --tokenizer TOKENIZER --out o
data prepare NAME*.txt --tokenizer TOKENIZER --out o
data prepare text.txt --tokenizer TOKENIZER --val NAME --out o
data prepare text.txt --tokenizer NAME --out o
data prepare text.txt --tokenizer TOKENIZER --decontaminate NAME --out o
data prepare text.txt --tokenizer TOKENIZER --out NAME
tokenizer train NAME --vocab-size 300 --out o
tokenizer train text.txt --vocab-size 300 --out NAME
""".strip().splitlines()


@pytest.fixture
def place(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 40, encoding="utf-8")
    (tmp_path / "tokens.bin").write_bytes(bytes(400))
    return tmp_path


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("typed", PLACES)
def test_a_name_that_no_file_system_takes_is_refused_in_one_sentence(
    typed, name, place, corpus, straight, tiny_flags, regpt
):
    (place / "named.toml").write_text(f'recipe = "gpt2-tiny"\n[data]\npath = "{name}"\n'.replace("\0", "\\u0000"))
    known = {"RUN": straight, "RUN2": straight.parent / "other", "DATA": corpus, "TOKENIZER": corpus}
    words = []
    for word in typed.split():
        words += tiny_flags[2:] if word == "TINY" else [str(known.get(word, word.replace("NAME", name)))]
    code, _out, err = regpt(*words)
    assert code in (1, 2)
    assert err.splitlines()[-1].startswith("regpt: ")  # some show their progress first
    assert "traceback in" not in err
