"""Our trainer beside a plain PyTorch loop around Hugging Face's GPT-2, update by update."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from regpt.hf.weights import WeightsFromHF
from regpt.model.families import make_model
from regpt.model.weights import load_weights
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.schedule import make_schedule

transformers = pytest.importorskip("transformers")

STEPS = 20


class TwoBatches(tiny.Rows):
    """Two batches in turn, so that there is something to learn."""

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        return super().rows(step % 2)


def test_twenty_updates_are_those_of_a_plain_loop_around_hugging_faces_model():
    """Same weights and rows; ours in micro-batches of two rows and with a padded vocabulary, theirs whole."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=3,
        n_embd=24,
        vocab_size=97,
        n_positions=16,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(config).train()
    weights = {name: w for name, w in theirs.state_dict().items() if name != "lm_head.weight"}
    ours = load_weights(make_model(tiny.CONFIG), WeightsFromHF(weights))
    optim = OptimConfig(lr=1e-2, warmup_steps=4, decay_steps=STEPS)
    loader = TwoBatches(micro_batch_rows=2)
    trainer = tiny.build_trainer(ours, loader, train=TrainConfig(steps=STEPS, precision="fp32"), optim=optim)

    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    factor = make_schedule(optim, STEPS)
    losses = []
    for step in range(STEPS):
        idx, targets = loader.rows(step)
        loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * factor(step + 1)
        optimizer.step()
        optimizer.zero_grad()

        row = tiny.update(trainer)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4), f"step {step + 1}"
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), f"step {step + 1}"
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5  # the updates mattered
