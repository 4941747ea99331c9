"""Hugging Face's weights and ours: the same numbers under other names, both ways; nothing here touches a disk.

Linear layers of their GPT-2 are `Conv1D`, OpenAI's name for a linear layer whose weight is (in, out); ours are
`nn.Linear`, (out, in). Experts are stored one by one; ours are one tensor. All other weights are the same under the
same names, but for a prefix.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.hf.experts import StackedExperts, divided_experts
from regpt.hf.families import SPELLINGS

READ = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those of 8 bits need scales
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
GPT2_BIASED = re.compile(CONV1D.pattern + r"|h\.\d+\.ln_[12]\.weight|ln_f\.weight")
# Constants that older files store next to the weights: causal masks, and frequencies of the rotation.
BUFFER = re.compile(r"(h|layers)\.\d+\.(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


class WeightsFromHF(Mapping[str, Tensor]):
    """Hugging Face's tensors under our names and in our layout, each read from `tensors` only when it is asked for.

    A tied weight may be stored as the embedding, as the head, or as both.

    Args:
        rows: of embedding and head as they are stored; with `n_vocab`, those from there on are padding and left out.

    Raises:
        UserError: a tensor that is there with and without prefix, or a head that differs from the token embedding
            though the two are tied.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        rows: int | None = None,
        n_vocab: int | None = None,
        *,
        family: str = "gpt2",
        tied: bool = True,
    ):
        self.tensors, self.rows, self.n_vocab = tensors, rows, n_vocab
        self.spelling = spelling = SPELLINGS[family]
        prefix = spelling.prefix
        if spelling.experts:
            self.tensors = tensors = StackedExperts(tensors, spelling.experts)
        kept = [name for name in tensors if not is_buffer(name.removeprefix(prefix))]
        self.theirs = {name.removeprefix(prefix): name for name in kept}
        if len(self.theirs) < len(kept):
            twice = next(name for name in kept if self.theirs[name.removeprefix(prefix)] != name)
            raise UserError(f"the weights hold {twice!r} with and without {prefix!r}; remove one of them")
        if not tied:
            return
        head = self.theirs.pop(spelling.head, None)
        embedding = self.theirs.setdefault(spelling.embedding, head) if head else None
        if head and embedding and head != embedding and not torch.equal(tensors[head], tensors[embedding]):
            raise UserError(
                f"the weights hold an {spelling.head} that differs from {spelling.embedding}, config.json has "
                "tie_word_embeddings = true; set it to false or choose another model"
            )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[self.theirs[name]]
        if tensor.dtype not in READ:
            raise UserError(
                f"weight {name!r} is stored as {tensor.dtype}, regpt reads floating point of 16 bits and more; "
                "choose a model that is not quantised"
            )
        if name in (self.spelling.embedding, self.spelling.head) and self.rows is not None:
            if tensor.shape[:1] != (self.rows,):
                raise UserError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, config.json has vocab_size {self.rows}; restore "
                    "the folder or choose another model"
                )
            tensor = tensor[: self.n_vocab]
        if not tensor.isfinite().all():
            raise UserError(f"weight {name!r} holds numbers that are not finite; choose another model")
        return transposed(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.theirs)

    def __len__(self) -> int:
        return len(self.theirs)


def weights_to_hf(weights: Mapping[str, Tensor], family: str = "gpt2") -> dict[str, Tensor]:
    """Our `weights` under transformers' names and in its layout, contiguous; a tied head is left out.

    Their GPT-2 has all biases: those that ours lacks are zeros.
    """
    prefix, head, experts = SPELLINGS[family].prefix, SPELLINGS[family].head, SPELLINGS[family].experts
    if family == "gpt2":
        biased = {name.removesuffix("weight") + "bias": w for name, w in weights.items() if GPT2_BIASED.fullmatch(name)}
        weights = {name: w.new_zeros(len(w)) for name, w in biased.items()} | {**weights}
    if experts:
        weights = divided_experts(weights, experts)
    return {
        name if name == head else prefix + name: transposed(name, tensor).contiguous()
        for name, tensor in weights.items()
    }


def transposed(name: str, tensor: Tensor) -> Tensor:
    """`tensor` between `Conv1D` (in, out) and `nn.Linear` (out, in), either way; others as they are. A view."""
    return tensor.t() if CONV1D.fullmatch(name) and tensor.dim() == 2 else tensor


def is_buffer(name: str) -> bool:
    """Whether `name`, without prefix, is a constant that older files store next to the weights."""
    return BUFFER.fullmatch(name) is not None
