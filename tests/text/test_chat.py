"""Messages to tokens by a chat template: transformers' tokens, and no special token from what a user writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from regpt.errors import UserError
from regpt.text.bpe import train_bpe
from regpt.text.chat import ChatTemplate
from regpt.text.open import from_json

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>"]
LIBRARY = Library.from_str(train_bpe(["user assistant system the cat sat\n" * 40], 280).to_json())
LIBRARY.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
OURS = from_json(LIBRARY.to_str())
THEIRS = PreTrainedTokenizerFast(tokenizer_object=LIBRARY, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
TEMPLATES = {  # as their models have them
    "chatml": """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama3": """{% set loop_messages = messages %}{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim
        + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
SAID = [
    {"role": "user", "content": " the cat\n"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "日本?"},
]


@pytest.mark.parametrize("answer_next", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_transformers(name, answer_next):
    template = ChatTemplate(TEMPLATES[name], OURS)
    expected = THEIRS.apply_chat_template(SAID, chat_template=TEMPLATES[name], add_generation_prompt=answer_next)
    expected = expected if isinstance(expected, list) else expected["input_ids"]
    assert template.encode(SAID, answer_next=answer_next) == list(expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_ends_an_answer_is_read_off_the_template(name):
    template = ChatTemplate(TEMPLATES[name], OURS)
    assert template.end_of_turn == LIBRARY.token_to_id(ENDS[name])
    assert template.stop_ids == (template.end_of_turn, OURS.eot)


@given(st.text(), st.lists(st.sampled_from([*MARKS, "<|endoftext|>", "<|im_", "end|>", " "]), max_size=6))
@settings(deadline=None, max_examples=100)
def test_no_message_writes_a_special_token(before, marks):
    text = before + "".join(marks)
    template = ChatTemplate(TEMPLATES["chatml"], OURS)
    ids = template.encode([{"role": "user", "content": text}])
    special = [token for token in ids if token in template.special.values()]
    assert [OURS.token_bytes(token).decode() for token in special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert text.replace("\ue000", "") in OURS.decode(ids)


def test_a_template_that_refuses_says_why():
    template = ChatTemplate(TEMPLATES["gemma"], OURS)
    with pytest.raises(UserError, match="cannot render these messages: System role not supported"):
        template.encode([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ messages.__class__.__mro__ }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render these messages: division by zero"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "cannot render"),
    ],
)
def test_a_template_is_data_not_a_program(source, said):
    with pytest.raises(UserError, match=said):
        ChatTemplate(source, OURS).encode(SAID)


def test_a_broken_template_is_refused_with_its_line():
    with pytest.raises(UserError, match=r"chat template is not valid: .* \(line 2\)"):
        ChatTemplate("a\n{% for %}", OURS)
