"""A model for use from Python: text and numbers of what `regpt train` made, or of GPT-2."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from regpt.api.arguments import checked
from regpt.checkpoint.open import OpenModel, open_model
from regpt.data.batch import Batch
from regpt.engine.generate import encode_prompt, stream_sample, write_samples
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import check_length
from regpt.errors import UsageError, UserError
from regpt.hf.export import write_model
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import choose_device
from regpt.text.tokenizer import Tokenizer
from regpt.train.backend import make_loss_sum
from regpt.train.config import InferencePrecision
from regpt.train.precision import autocast, matmul_precision, parameter_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PastContext = Literal["refuse", "slide"]
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor


@checked
def load(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: InferencePrecision = "fp32",
    ema: bool = False,
) -> LanguageModel:
    """Read a model: a run (its newest intact checkpoint), a checkpoint, an address, a Hugging Face folder, a hub name.

    Args:
        device: `auto` (CUDA, then MPS, then CPU), `cuda`, `mps` or `cpu`.
        precision: number format of the computation: `fp32`, `tf32`, `bf16`, `fp16` or `fp64`.
        ema: the moving average of the weights, which `train.ema_decay` keeps, instead of the last ones.

    Raises:
        UsageError: `model` names nothing, or a device that this machine does not have.
        UserError: a damaged model, one of a kind that is not implemented, or one that cannot be downloaded.
    """
    return LanguageModel(open_model(os.fspath(model), choose_device(device), ema=ema), precision)


class LanguageModel:
    """A model with its tokenizer, in eval mode; methods keep torch's global state and may run in any thread.

    Attributes:
        module: the `torch.nn.Module` (docs/api.md); token ids (B, T) int64 → logits (B, T, vocab_size).
        config: its shape.
        tokenizer: `encode(text)`, `decode(ids)`, `n_vocab`, `eot`, `name`.
        step: updates made, for a checkpoint of ours, otherwise None.
        source: the folder or hub name it was read from.
        precision: number format of the computation.
    """

    def __init__(self, opened: OpenModel, precision: InferencePrecision = "fp32"):
        self.module: Transformer = opened.model.to(parameter_dtype(precision)).eval()
        self.config: ModelConfig = opened.model.config
        self.tokenizer: Tokenizer = opened.tokenizer
        self.step, self.source = opened.step, opened.source
        self.precision: InferencePrecision = precision

    @property
    def device(self) -> torch.device:
        return self.module.device

    @overload
    def generate(self, prompt: str, *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ..., past_context: PastContext = ..., stream: Literal[False] = ...) -> str: ...  # fmt: skip  # noqa: E501
    @overload
    def generate(self, prompt: str, *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ..., past_context: PastContext = ..., stream: Literal[True]) -> Iterator[str]: ...  # fmt: skip  # noqa: E501
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ..., past_context: PastContext = ..., stream: Literal[False] = ...) -> list[str]: ...  # fmt: skip  # noqa: E501
    @checked
    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 30,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 1337,
        past_context: PastContext = "refuse",
        stream: bool = False,
    ) -> str | list[str] | Iterator[str]:
        """`prompt` and its continuation; of several prompts a list. It ends before a token of `tokenizer.stop_ids`.

        A prompt that occurs n times gets n different continuations: those of `regpt sample --n n` with the same
        options and seed. What one prompt gets does not depend on the others.

        Args:
            prompt: text; an empty one starts a new document.
            max_new_tokens: at most so many; with the prompt's tokens at most `config.max_seq_len`, or see
                `past_context`.
            temperature, top_k, top_p: how a token is drawn; `top_k=1` takes the likeliest, 0 all.
            seed: of the draw.
            past_context: `slide` goes on beyond `config.max_seq_len`: from there on each token follows from the last
                ones that the model can read, which takes longer.
            stream: return an iterator over the text of one prompt in pieces as they are made, the prompt first: joined
                they are the text. No piece ends within a character.

        Raises:
            UsageError: a value that is not allowed, or `stream` with several prompts.
            UserError: prompt and new tokens are longer than the model, or its logits are not finite.
        """
        options = {
            "max_new_tokens": max_new_tokens,
            "options": SamplingOptions(temperature, top_k, top_p),
            "seed": seed,
            "slide": past_context == "slide",
        }
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if stream and not isinstance(prompt, str):
            raise UsageError("stream takes one prompt, a list was given; call generate once for each")
        for one in prompts if past_context == "refuse" else ():
            tokens = len(encode_prompt(self.tokenizer, one))
            check_length(tokens, max_new_tokens, self.config.max_seq_len, "max_new_tokens")
        if stream:
            return self.in_pieces(prompts[0], options)
        texts: dict[str, Iterator[str]] = {}
        for one in dict.fromkeys(prompts):
            with self.computing():
                found = write_samples(self.module, self.tokenizer, one, n=prompts.count(one), **options)
            texts[one] = iter([sample.text for sample in found])
        drawn = [next(texts[one]) for one in prompts]
        return drawn[0] if isinstance(prompt, str) else drawn

    def in_pieces(self, prompt: str, options: dict[str, Any]) -> Iterator[str]:
        """The pieces of one text; torch's global state is changed only while one is made."""
        with self.computing():
            pieces = stream_sample(self.module, self.tokenizer, prompt, **options)

        def next_piece() -> str | None:
            with self.computing():
                return next(pieces, None)

        return iter(next_piece, None)

    def logits(self, text: str | Ids) -> Tensor:
        """Logits of the token after each of `text`: (T, vocab_size), or (B, T, vocab_size) for ids (B, T); float32
        (float64 under fp64), on the model's device. Softmax over the last axis gives probabilities.

        Raises:
            UsageError: no token, more than `config.max_seq_len`, or ids that are not in the vocabulary.
        """
        ids = self.ids(self.tokenizer.encode_prompts([text])[0] if isinstance(text, str) else text)
        if ids.shape[-1] > self.config.max_seq_len:
            raise UsageError(
                f"{ids.shape[-1]} tokens were given, the model reads {self.config.max_seq_len}; give fewer"
            )
        with self.computing():
            found = self.module(ids.reshape(-1, ids.shape[-1]))  # (B, T, V)
        return found.to(parameter_dtype(self.precision)).reshape(*ids.shape, -1)

    def loss(self, text: str | Ids) -> float:
        """Mean cross-entropy in nats of the tokens after the first.

        A text is a document, as in training: `<|endoftext|>` comes first, so that every token of the text counts. What
        is longer than the model is cut into rows of `config.max_seq_len` tokens, each read without the one before, as
        in validation.

        Raises:
            UsageError: fewer than two tokens, or ids that are not in the vocabulary.
        """
        ids = self.ids(self.document(text) if isinstance(text, str) else text)
        ids = ids.reshape(-1, ids.shape[-1])  # (B, T)
        n = ids.shape[1] - 1
        if n < 1:
            raise UsageError("one token was given, a loss needs two: the first predicts the second")
        loss_sum = make_loss_sum(self.module, self.precision, self.device, compile=False)
        total = 0.0
        with self.computing():
            for row in ids:
                for begin in range(0, n, self.config.max_seq_len):
                    part = row[begin : min(begin + self.config.max_seq_len, n) + 1]
                    total += loss_sum(Batch(part[None, :-1], part[None, 1:])).item()
        return total / (len(ids) * n)

    def to_hf(self) -> PreTrainedModel:
        """The same model for `transformers`, on the CPU in float32: its logits are equal within rounding.

        Raises:
            UserError: transformers is not installed.
        """
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging as console
        except ImportError:
            raise UserError("transformers is not installed; install it with: pip install transformers") from None
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            if console.is_progress_bar_enabled():
                console.disable_progress_bar()
                stack.callback(console.enable_progress_bar)
            write_model(self.module, self.tokenizer, Path(folder))
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def document(self, text: str) -> list[int]:
        """Token ids of `text` after the one that starts every document."""
        ids, eot = self.tokenizer.encode_prompts([text])[0].tolist(), self.tokenizer.eot
        return ids if ids[:1] == [eot] else [eot, *ids]

    def ids(self, given: Any) -> Tensor:
        """Token ids, (T,) or (B, T), as int64 on the model's device."""
        try:
            ids = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        except (TypeError, ValueError):
            raise UsageError("rows of different lengths are no token ids (B, T); give rows of one length") from None
        how = "give a text that is not empty, or whole numbers (T,) or (B, T)"
        if ids.size == 0:
            raise UsageError(f"no token ids were given; {how}")
        if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
            raise UsageError(f"an array of {ids.dtype} in shape {ids.shape} is no token ids; {how}")
        for end in (ids.min(), ids.max()):
            if not 0 <= end < self.config.vocab_size:
                raise UsageError(f"token id {end} is not in the vocabulary, ids are 0 to {self.config.vocab_size - 1}")
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        with matmul_precision(self.precision), autocast(self.precision, self.device), torch.no_grad():
            yield

    def __repr__(self) -> str:
        shape = ", ".join(f"{name} {getattr(self.config, name)}" for name in ("n_layer", "n_head", "n_embd"))
        return f"<LanguageModel {self.source!r}: {shape}, {self.tokenizer.name}, on {self.device}>"
