"""The forward of each family."""

from regpt.model.config import FAMILIES, ModelConfig
from regpt.model.experts import LlamaOfExperts
from regpt.model.gemma import Gemma
from regpt.model.gpt2 import GPT2
from regpt.model.llama import Llama
from regpt.model.neox import NeoX
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import Transformer

FORWARDS: dict[str, type[Transformer]] = {"gpt2": GPT2, "gpt_neox": NeoX, "gemma3_text": Gemma}


def forward_of(config: ModelConfig) -> type[Transformer]:
    return FORWARDS.get(config.family, LlamaOfExperts if FAMILIES[config.family].experts else Llama)


def make_model(config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True) -> Transformer:
    """A model of `config`'s family; `pad_vocab`: pad the rows of embedding and head to a multiple of 128 with zeros."""
    return forward_of(config)(config, ops, pad_vocab=pad_vocab)
