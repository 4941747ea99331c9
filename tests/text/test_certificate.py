"""Parts of a rendered conversation, and the certificate of a template: its claims, and templates that break them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.errors import UserError
from regpt.text.certificate import broken_claim, certify, refuse_other_template, turns
from regpt.text.chat import ANSWER, CONTEXT, FORMAT, PLAIN, ChatTemplate
from text.test_chat import OURS, TEMPLATES

EVERY = {name: ChatTemplate(source, OURS) for name, source in (TEMPLATES | {"plain": PLAIN}).items()}
SAID = turns(["user", "assistant", "user", "assistant"], ["cat?", "Sat down", "the", "THE END"])
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "\n",
    "  ",
    "assistant",
    "\ue002",
]
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=6)), min_size=1, max_size=4).map("".join)
TEXTS = TEXTS.filter(lambda text: not set(text) & {"\ue000", "\ue001"})


@pytest.mark.parametrize("name", EVERY)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.lists(TEXTS, min_size=3, max_size=3))
@settings(deadline=None, max_examples=40)
def test_every_claim_holds_for_any_conversation(name, asked, answers):
    messages = [one for pair in zip(asked, answers) for one in turns(["user", "assistant"], list(pair))]
    assert broken_claim(EVERY[name], messages) is None


@pytest.mark.parametrize("name", EVERY)
def test_parts_are_those_of_the_messages(name):
    """The answers are words that occur nowhere else, so here they can be searched for."""
    template = EVERY[name]
    ids, parts, messages = template.encode_training(SAID)
    assert OURS.decode(ids[parts == ANSWER]) == "Sat downTHE END"
    assert set(messages[parts != CONTEXT]) == {1, 3}
    assert ids[parts == FORMAT].tolist() == [template.end_of_turn] * 2
    assert OURS.decode(ids[(messages == 3) & (parts == ANSWER)]) == "THE END"


def test_an_answer_of_weight_0_is_read_only():
    messages = [SAID[0], SAID[1] | {"weight": 0}, *SAID[2:]]
    ids, parts, _ = EVERY["chatml"].encode_training(messages)
    assert np.array_equal(ids, EVERY["chatml"].encode_training(SAID).ids)
    assert OURS.decode(ids[parts == ANSWER]) == "THE END"


def test_what_a_template_writes_before_an_answer_is_a_target_too():
    """As the empty thoughts of Qwen 3: in use the model has to write them."""
    source = TEMPLATES["chatml"].replace(
        "m['role'] + '\\n' + m", "m['role'] + '\\n' + ('<think></think>' if m['role'] == 'assistant' else '') + m"
    )
    ids, parts, _ = ChatTemplate(source, OURS).encode_training(SAID[:2])
    assert OURS.decode(ids[parts == FORMAT]) == "<think></think><|im_end|>"
    of_the_last = ChatTemplate(source.replace("'assistant' else", "'assistant' and loop.last else"), OURS)
    ids, parts, messages = of_the_last.encode_training(SAID)
    assert OURS.decode(ids[parts == ANSWER]) == "Sat downTHE END"
    assert OURS.decode(ids[(parts == FORMAT) & (messages == 3)]) == "<think></think><|im_end|>"
    assert broken_claim(of_the_last, SAID) is None


BROKEN = {
    "what it writes changes with what follows": (
        "{{ messages | length }}" + TEMPLATES["chatml"],
        "cannot be divided at message 1",
    ),
    "earlier answers are changed": (
        TEMPLATES["chatml"].replace("m['content']", "(m['content'] if m['role'] == 'user' else m['content'] | upper)"),
        "writes something else than the answer of message 1",
    ),
    "no end of a turn": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "writes no special token after an answer",
    ),
    "users write control tokens": (
        TEMPLATES["chatml"].replace(
            "m['content']", "(m['content'] | replace('\ue000', '') if m['role'] == 'user' else m['content'])"
        ),
        "no text of a message makes a special token",
    ),
    "two beginnings": ("{{ bos_token }}" + PLAIN, "the token that begins texts occurs once, at the start"),
    "a beginning before every answer": (
        TEMPLATES["chatml"].replace("'<|im_start|>", "bos_token + '<|im_start|>"),
        "the token that begins texts occurs once, at the start",
    ),
    "no generation prompt": (
        TEMPLATES["chatml"].partition("{% if add_generation_prompt")[0],
        "has no generation prompt",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_breaks_a_claim_is_refused(name):
    source, said = BROKEN[name]
    with pytest.raises(UserError, match=said):
        certify(ChatTemplate(source, OURS), [turns(["user", "assistant"], ["<|im_end|>", "b"]), SAID])


def test_the_certificate_names_template_and_tokenizer_and_what_was_tried():
    found = certify(EVERY["gemma"], [SAID])
    assert (found["template_sha256"], found["tokenizer_sha256"]) == (EVERY["gemma"].sha256, OURS.sha256)
    assert found["end_of_turn"]["token"] == "<end_of_turn>"
    assert found["conversations"] == 1
    assert found["refused_by_the_template"] == 1  # Gemma has no system message
    companions = {"chat_certificate.json": json.dumps(found)}
    refuse_other_template(EVERY["gemma"].source, companions)
    with pytest.raises(UserError, match="not the one that this model was trained with"):
        refuse_other_template(PLAIN, companions)
    refuse_other_template(PLAIN, companions, accepted=True)
    refuse_other_template(PLAIN, {})
