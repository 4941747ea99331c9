"""A model's sizes, counted on the model itself (built without memory), so that they cannot differ from it."""

import math
from dataclasses import dataclass

from torch import nn

from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, real_shape, without_memory
from regpt.train.peak import flops_per_token


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on.

    Attributes:
        parameters: without vocabulary padding, the tied head once.
        embeddings: of `parameters`, those of tokens (the tied head with them) and positions.
        padded: what is in memory.
        matrices: weights of matrix products, the padded head included: those that bfloat16 copies are made of.
        vocab_rows: rows of the head, padded.
        flops_per_token: forward and backward, at the real vocabulary (`train.peak`).
        attention_flops: of them, those of attention's products.
    """

    parameters: int
    embeddings: int
    padded: int
    matrices: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_rows: int
    seq_len: int
    flops_per_token: int
    attention_flops: int

    @property
    def product_flops(self) -> int:
        """FLOPs of matrix products for one token, forward and backward, as they are computed: padding included."""
        return 6 * self.matrices

    @property
    def block_weights(self) -> int:
        """Weights of the matrix products in blocks, without the head."""
        return self.matrices - self.vocab_rows * self.n_embd

    @property
    def block_flops(self) -> int:
        """FLOPs of those products for one token, forward and backward."""
        return 6 * self.block_weights


def shape_of(config: ModelConfig, seq_len: int, *, pad_vocab: bool) -> Shape:
    """Count a model of this shape."""
    with without_memory():
        model = Transformer(config, pad_vocab=pad_vocab)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return Shape(
        parameters=count_parameters(model),
        embeddings=sum(math.prod(real_shape(model, name, p)) for name, p in model.named_parameters() if name in tables),
        padded=sum(p.numel() for p in model.parameters()),
        matrices=model.matmul_parameters(padded=True),
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        vocab_rows=model.head_weight.size(0),
        seq_len=seq_len,
        flops_per_token=flops_per_token(model, seq_len),
        attention_flops=model.attention_flops(seq_len),
    )
