"""The silent bugs of supervised fine-tuning, each as a test that is also seen to fail on the bug itself.

The numbers are those of the table in docs/finetune.md, which names where each was met.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from torch import Tensor

import tiny
from conversation_files import invented, write_answers, write_conversations
from regpt.checkpoint.load import checkpoints
from regpt.checkpoint.open import open_model
from regpt.cli import finetune
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import Loader, row_batch
from regpt.data.packed import ConversationRows
from regpt.data.rows import open_rows
from regpt.engine.generate import engine_for
from regpt.engine.request import Request
from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.runs import pretrain as pretraining
from regpt.text.bpe import byte_tokenizer, train_bpe
from regpt.text.certificate import refuse_other_template, turns
from regpt.text.chat import CHATML, CONTEXT, FORMAT, PLAIN, ChatTemplate
from regpt.text.open import from_json
from regpt.text.rules import STARTS_DOCUMENTS
from regpt.text.spec import before_every_text

BYTES = byte_tokenizer()
TEMPLATE = ChatTemplate(PLAIN, BYTES)
SAID = turns(["user", "assistant", "user", "assistant"], ["a?", "bc", "and d?", "efg"])


def packed(folder: Path, documents=None, seq_len: int = 16) -> ConversationRows:
    documents = documents or invented([7, 5, 3, 16, 9, 2, 6, 12, 14, 4, 15, 11, 13, 16])
    rows = open_rows(folder, write_conversations(folder, documents), "train", "packed", 3, seq_len)
    assert isinstance(rows, ConversationRows)
    rows.eot = min(rows.eot, documents[0][0][0])  # the models here have 97 tokens, the bytes 257
    return rows


def of_conversations(folder: Path, messages) -> ConversationRows:
    rows = packed(folder, [TEMPLATE.encode_training(one)[:2] for one in messages], 128)
    assert rows.eot == BYTES.eot
    return rows


# ---- 1: the loss averaged over micro-batches, and only then over the step


def gradient_of(batches: list[Batch], divide: Callable[[Tensor, list[Batch], Batch], Tensor]) -> Tensor:
    model = tiny.build_model()
    for batch in batches:
        places = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}
        divide(tiny.loss_sum(model, batch.idx, batch.targets, **places), batches, batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def count(batches: list[Batch]) -> int:
    return sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)


def by_all_targets(loss: Tensor, batches: list[Batch], batch: Batch) -> Tensor:
    return loss / count(batches)


def by_own_targets(loss: Tensor, batches: list[Batch], batch: Batch) -> Tensor:
    return loss / count([batch]) / len(batches)


def accumulation_error(rows: ConversationRows, divide) -> float:
    loaders = [Loader(rows, batch_tokens=8 * 16, micro_batch_rows=n) for n in (8, 4, 1)]
    whole, *parts = [gradient_of(loader.step(0), divide) for loader in loaders]
    return max(((part - whole).norm() / whole.norm()).item() for part in parts)


def test_1_the_gradient_does_not_depend_on_accumulation(tmp_path):
    rows = packed(tmp_path)
    assert accumulation_error(rows, by_all_targets) < 1e-12
    assert accumulation_error(rows, by_own_targets) > 1e-3  # the bug
    steps = [
        tiny.step_gradients(
            tiny.build_trainer(tiny.build_model(), Loader(rows, batch_tokens=8 * 16, micro_batch_rows=n))
        )
        for n in (8, 1)
    ]
    assert tiny.largest_error(*steps) < 1e-12


# ---- 2 and 3: the end of an answer is not trained


def untrained_ends(rows: ConversationRows) -> int:
    """Answers of the rows whose end is no target."""
    idx, targets, parts, _ = rows.read_batch(0, rows.n_rows)
    ends = (parts == FORMAT) & (idx == TEMPLATE.end_of_turn)
    assert ends.sum() == 3
    return int((np.roll(targets, 1, axis=1)[ends] != TEMPLATE.end_of_turn).sum())


def test_2_the_end_of_every_answer_is_a_target(tmp_path):
    rows = of_conversations(tmp_path, [SAID, SAID[:2]])
    assert untrained_ends(rows) == 0
    kept = rows.parts
    rows.parts = np.where(kept == FORMAT, CONTEXT, kept)  # the bug: the text alone
    targets = rows.read_batch(0, rows.n_rows)[1]
    assert not (targets == TEMPLATE.end_of_turn).any()


def test_3_padding_is_found_by_place_not_by_value(tmp_path):
    """The token that fills rows up is the one that ends answers, as it is in GPT-2."""
    rows = of_conversations(tmp_path, [SAID, SAID[:2]])
    idx, targets, _, _ = rows.read_batch(0, 1)
    assert rows.eot == TEMPLATE.end_of_turn == idx[0, -1]
    assert (targets[0] == rows.eot).sum() == 3
    by_value = np.where(targets == rows.eot, IGNORE_INDEX, targets)  # the bug
    assert not (by_value == rows.eot).any()


# ---- 4: two tokens that begin a text


def llama_like() -> ChatTemplate:
    """A tokenizer that puts a token before every text, as Llama 3's, and a template that writes it, as Llama 3's."""
    library = Library.from_str(train_bpe(["user assistant the cat sat\n" * 40], 275).to_json())
    library.add_special_tokens([AddedToken(name, special=True) for name in ("<|bos|>", "<|eot_id|>")])
    content = json.loads(library.to_str())
    content["added_tokens"] = [
        token | ({STARTS_DOCUMENTS: True} if token["content"] == "<|bos|>" else {}) for token in content["added_tokens"]
    ]
    content["post_processor"] = before_every_text("<|bos|>", library.token_to_id("<|bos|>"))
    source = CHATML.replace("<|im_start|>", "# ").replace("<|im_end|>", "<|eot_id|>")
    return ChatTemplate("{{ bos_token }}" + source, from_json(json.dumps(content)))


def test_4_one_token_begins_a_text_in_training_and_in_use():
    template = llama_like()
    begin = template.tokenizer.eot
    for ids in (template.encode_training(SAID).ids.tolist(), template.encode(SAID[:1])):
        assert ids.count(begin) == 1
        assert ids[0] == begin
    text = template.render(SAID[:1])
    rendered_then_encoded = Library.from_str(template.tokenizer.to_json()).encode(text).ids  # the bug
    assert rendered_then_encoded.count(begin) == 2


# ---- 5: a token too much at the end


def test_5_a_conversation_is_the_text_that_the_template_writes_and_no_more():
    ids = TEMPLATE.encode_training(SAID).ids.tolist()
    text = TEMPLATE.render(SAID, answer_next=False)
    assert BYTES.decode(ids) == text
    assert BYTES.decode([*ids, BYTES.eot]) != text  # the bug


# ---- 6: what is trained on is searched for


def found_by_search(text: str, marker: str) -> list[str]:
    """The bug: answers are what follows a marker, up to the end of text."""
    return [part.partition("<|endoftext|>")[0] for part in text.split(marker)[1:]]


def test_6_answers_are_known_by_provenance_whatever_users_write(tmp_path):
    messages = turns(["user", "assistant"], ["say\n\nAssistant:\nno", "yes"])
    ids, parts, _ = TEMPLATE.encode_training(messages)
    assert BYTES.decode(ids[parts == 1].tolist()) == "yes"
    assert found_by_search(TEMPLATE.render(messages, answer_next=False), "Assistant:\n") != ["yes"]
    rows = of_conversations(tmp_path, [messages])
    assert rows.sentence().endswith(f"4 of {len(ids)} tokens are trained on ({4 / len(ids):.0%})")


# ---- 7: tokens that reach over the border of prompt and answer


@pytest.mark.parametrize("answer", ["\n\nsat", "\n", " the", "sat"])
def test_7_the_tokens_of_a_prompt_are_a_prefix_of_the_row(answer):
    """GPT-2's pattern takes line ends in a row as one piece, so an answer that begins with one reaches over."""
    tokenizer = train_bpe(["Assistant:\n\n\n\nsat the\n\n\n\n" * 40], 270)
    template = ChatTemplate(PLAIN, tokenizer)
    messages = turns(["user", "assistant"], ["cat?", answer])
    prompt, row = template.encode(messages[:1]), template.encode_training(messages).ids.tolist()
    assert row[: len(prompt)] == prompt
    if answer == "\n\nsat":  # the bug: the whole text at once
        text = template.render(messages, answer_next=False).removeprefix("<|endoftext|>")
        whole = [tokenizer.eot, *tokenizer.encode(text)]
        assert whole[: len(prompt)] != prompt


# ---- 8: conversations in one row read each other


def test_8_a_conversation_reads_nothing_of_the_others_in_its_row(tmp_path):
    rows, model = packed(tmp_path), tiny.build_model()
    batch = row_batch(rows, 0, rows.n_rows)
    documents, row, place = rows.layout(0, rows.n_rows)
    assert len(documents) > rows.n_rows

    def error(**places: Tensor | None) -> float:
        with torch.no_grad():
            logits, worst = model(batch.idx, **places), 0.0
            for k, r, at in zip(documents, row, place):
                begin, end = int(rows.starts[k]), int(rows.starts[k + 1])
                ids = rows.corpus.read(np.array([begin]), np.array([end])).astype(np.int64)
                alone = model(torch.from_numpy(ids)[None])[0]
                worst = max(worst, (logits[r, at : at + len(ids)] - alone).abs().max().item())
        return worst

    assert error(positions=batch.positions, cu_seqlens=batch.cu_seqlens) < 1e-13
    assert error() > 1e-3  # the bug


# ---- 9: targets shifted twice, or not at all


def test_9_the_loss_is_that_of_the_next_token_by_hand(tmp_path):
    ids, parts = [3, 14, 15, 9, 2], [0, 0, 1, 1, 2]
    rows, model = packed(tmp_path, [(ids, parts)], 5), tiny.build_model()
    batch = row_batch(rows, 0, 1)
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0, :, :97].log_softmax(-1)
        expected = -sum(log_p[i - 1, ids[i]].item() for i in (2, 3, 4))
        places = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}
        found, twice, never = (
            tiny.loss_sum(model, batch.idx, targets, **places).item()
            for targets in (batch.targets, batch.targets.roll(-1, 1), torch.where(batch.targets < 0, -100, batch.idx))
        )
    assert found == pytest.approx(expected, abs=1e-12)
    assert abs(twice - expected) > 1e-3  # the bug
    assert abs(never - expected) > 1e-3  # the other one


# ---- 11, 12, 13: what is saved is another model


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run with two added tokens, and the model as it was in memory at its end."""
    folder = tmp_path_factory.mktemp("tuned")
    model = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, max_seq_len=128))
    tiny.load_weights(model, tiny.InitialWeights(model, 5))
    base = tiny.save_model(folder / "base", model, BYTES)
    flags = ["--data.seq-len", "128", "--train.batch-tokens", "512", "--train.micro-batch-rows", "2", "--add-tokens"]
    flags += ["--train.steps", "4", "--train.device", "cpu", "--sample.every-steps", "0", "--eval.every-steps", "0"]
    flags += ["--optim.lr", "0.01", "--sample.max-new-tokens", "4", "--sample.prompt", "a"]
    live: list[torch.nn.Module] = []
    original = pretraining.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pretraining, "train", lambda run, *args, **kw: live.append(run.model) or original(run, *args, **kw)
        )
        where = [
            "--init-from",
            str(base),
            "--data",
            str(write_answers(folder / "a.jsonl")),
            "--out",
            str(folder / "run"),
        ]
        assert finetune.main(["sft-tiny", *where, *flags]) == 0
    return folder / "run", live[0], model


@torch.no_grad()
def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    idx = torch.tensor([[256, 257, 65, 66, 258, 10]])
    logits = [model(idx)[..., :259] for model in (one, other)]
    assert all(x.isfinite().all() for x in logits)
    return (logits[0] - logits[1]).abs().max().item()


def test_11_a_tied_head_is_saved_as_it_was_trained(tuned):
    run, live, before = tuned
    opened = open_model(str(run)).model
    assert difference(opened, live) == 0
    assert "lm_head.weight" not in dict(opened.named_parameters())
    table, old = (dict(one.named_parameters())["wte.weight"] for one in (opened, before))
    with torch.no_grad():
        hidden = opened.hidden(torch.tensor([[256, 65]]))
        untied = hidden @ old.detach().T[:, :257]  # the bug: the head that the base model had
        assert (untied - (hidden @ table.T)[..., :257]).abs().max() > 1e-3


def test_12_added_tokens_are_trained_saved_and_loaded(tuned):
    run, live, _before = tuned
    opened = open_model(str(run))
    assert (opened.tokenizer.n_vocab, opened.model.config.vocab_size) == (259, 259)
    assert difference(opened.model, live) == 0
    weights = tiny.state_tensors(opened.model)
    with pytest.raises(UserError, match="has shape"):  # the bug: a vocabulary without its new rows
        tiny.load_weights(tiny.make_model(opened.model.config), weights | {"wte.weight": weights["wte.weight"][:257]})
    moved = dict(live.named_parameters())["wte.weight"][257:259]
    assert moved.isfinite().all()


def test_13_a_template_that_was_not_trained_with_is_refused(tuned):
    run, _, _ = tuned
    companions = open_model(str(checkpoints(run)[-1])).companions
    assert companions["chat_template.jinja"] == CHATML
    refuse_other_template(companions["chat_template.jinja"], companions)
    with pytest.raises(UserError, match="--other-template"):  # the bug: one character
        refuse_other_template(CHATML.replace("'\\n'", "' '", 1), companions)


# ---- 16: padding on the left that positions count


def test_16_a_text_in_a_batch_is_the_text_alone():
    model = tiny.build_model().float().eval()
    prompts = [[5], [7, 8, 9, 1, 2, 3], [4, 4]]
    requests = [Request(prompt, 6, stop_ids=(), options=greedy()) for prompt in prompts]
    together = [new for (new,) in engine_for(model, requests).run(requests)]
    alone = [engine_for(model, [one]).run([one])[0][0] for one in requests]
    assert together == alone
    longest = max(map(len, prompts))
    with torch.no_grad():  # the bug: zeros on the left, read and counted
        padded = model(torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]))[:, -1, :97]
        right = torch.stack([model(torch.tensor([prompt]))[0, -1, :97] for prompt in prompts])
    assert F.mse_loss(padded, right) > 1e-4
    assert torch.allclose(padded[1], right[1], atol=1e-5)


def greedy():
    from regpt.engine.processing import SamplingOptions

    return replace(SamplingOptions(), top_k=1)
