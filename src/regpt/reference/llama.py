"""Llama's block, forward and backward, written out in NumPy: what differs from `reference.gpt2`, on half a page.

RMSNorm, rotary positions, grouped queries and the gated MLP, each as a pair of functions; attention, softmax and loss
are GPT-2's, and its `head`, x·wᵀ, is every product here: none has a bias. Parameters have the names of
`regpt.model.llama`. Shapes: H heads of queries, G of keys and values.
"""

import numpy as np

from regpt.reference.gpt2 import (
    IGNORE_INDEX,
    Array,
    Params,
    Saved,
    attention_backward,
    causal_attention,
    cross_entropy,
    cross_entropy_backward,
    head,
    head_backward,
    inside,
    merge_heads,
    named,
    split_heads,
)

# ---- layers ----------------------------------------------------------------------------------------------------------


def rms_norm(x: Array, w: Array, eps: float) -> tuple[Array, Saved]:
    """y = n·w with n = x/r, r² = mean(x²) + eps, over the last dimension (Zhang & Sennrich 2019, eq. 4)."""
    r = np.sqrt((x**2).mean(-1, keepdims=True) + eps)  # (..., 1)
    return x / r * w, (x / r, r, w)


def rms_norm_backward(dy: Array, saved: Saved) -> tuple[Array, Array]:
    """dw = Σ dy·n, and with dn = dy·w: dx = (dn - n·mean(dn·n)) / r. LayerNorm's backward without the mean's share:
    only a change of x along n, which changes its length, is undone."""
    n, r, w = saved
    dn = dy * w
    return (dn - n * (dn * n).mean(-1, keepdims=True)) / r, (dy * n).sum(tuple(range(dy.ndim - 1)))


def rotation(T: int, D: int, theta: float = 10_000.0) -> tuple[Array, Array]:
    """Cosine and sine (T, D/2) of the angles t·θ^(-2i/D) of pair i at position t (Su et al. 2021, eq. 15)."""
    angles = np.arange(T)[:, None] * theta ** (-np.arange(0, D, 2) / D)
    return np.cos(angles), np.sin(angles)


def rotate(x: Array, by: tuple[Array, Array]) -> tuple[Array, Saved]:
    """Turn the pair (i, i + D/2) of every head by its position's angle; x (B, H, T, D), `by` from `rotation`."""
    return turned(x, *by), by


def turned(x: Array, cos: Array, sin: Array) -> Array:
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def rotate_backward(dy: Array, saved: Saved) -> Array:
    """A rotation's derivative is its transpose: the turn by the opposite angle."""
    cos, sin = saved
    return turned(dy, cos, -sin)


def swiglu(gate: Array, up: Array) -> tuple[Array, Saved]:
    """y = gate·σ(gate)·up, σ the logistic function (Shazeer 2020, eq. 5 and 6)."""
    sigmoid = 1 / (1 + np.exp(-gate))
    return gate * sigmoid * up, (gate, sigmoid, up)


def swiglu_backward(dy: Array, saved: Saved) -> tuple[Array, Array]:
    """With σ' = σ·(1 - σ): dgate = dy·up·σ·(1 + gate·(1 - σ)), dup = dy·gate·σ."""
    gate, sigmoid, up = saved
    return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


# ---- the block -------------------------------------------------------------------------------------------------------


def self_attention(x: Array, w: Params, n_head: int, n_kv_head: int, by: tuple[Array, Array]) -> tuple[Array, Saved]:
    """x (B, T, C) → rotated q (B, H, T, D) and k (B, G, T, D), v → attention, where query head h sees key head
    h·G // H → projection; `w` names as inside `self_attn.`."""
    q, saved_q = head(x, w["q_proj.weight"])
    k, saved_k = head(x, w["k_proj.weight"])
    v, saved_v = head(x, w["v_proj.weight"])
    q, saved_turn = rotate(split_heads(q, n_head), by)
    k, _ = rotate(split_heads(k, n_kv_head), by)
    k, v = (np.repeat(y, n_head // n_kv_head, axis=1) for y in (k, split_heads(v, n_kv_head)))  # (B, H, T, D)
    y, saved_attention = causal_attention(q, k, v)
    y, saved_out = head(merge_heads(y), w["o_proj.weight"])
    return y, (saved_q, saved_k, saved_v, saved_turn, saved_attention, saved_out, n_head, n_kv_head)


def self_attention_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    """The steps of `self_attention`, last to first; a key head gets the sum over the queries that share it."""
    saved_q, saved_k, saved_v, saved_turn, saved_attention, saved_out, n_head, n_kv_head = saved
    grads: dict[str, Array] = {}
    dy, grads["o_proj.weight"] = head_backward(dy, saved_out)
    dq, dk, dv = attention_backward(split_heads(dy, n_head), saved_attention)
    B, _, T, D = dk.shape
    dk, dv = (y.reshape(B, n_kv_head, n_head // n_kv_head, T, D).sum(2) for y in (dk, dv))  # (B, G, T, D)
    dq, dk = rotate_backward(dq, saved_turn), rotate_backward(dk, saved_turn)
    dx_q, grads["q_proj.weight"] = head_backward(merge_heads(dq), saved_q)
    dx_k, grads["k_proj.weight"] = head_backward(merge_heads(dk), saved_k)
    dx_v, grads["v_proj.weight"] = head_backward(merge_heads(dv), saved_v)
    return dx_q + dx_k + dx_v, grads


def mlp(x: Array, w: Params) -> tuple[Array, Saved]:
    """y = (silu(x·gateᵀ)·(x·upᵀ))·downᵀ; `w` names as inside `mlp.`."""
    gate, saved_gate = head(x, w["gate_proj.weight"])
    up, saved_up = head(x, w["up_proj.weight"])
    y, saved_swiglu = swiglu(gate, up)
    y, saved_out = head(y, w["down_proj.weight"])
    return y, (saved_gate, saved_up, saved_swiglu, saved_out)


def mlp_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    saved_gate, saved_up, saved_swiglu, saved_out = saved
    grads: dict[str, Array] = {}
    dy, grads["down_proj.weight"] = head_backward(dy, saved_out)
    dgate, dup = swiglu_backward(dy, saved_swiglu)
    dx_gate, grads["gate_proj.weight"] = head_backward(dgate, saved_gate)
    dx_up, grads["up_proj.weight"] = head_backward(dup, saved_up)
    return dx_gate + dx_up, grads


def block(x: Array, w: Params, n_head: int, n_kv_head: int, by: tuple[Array, Array], eps: float) -> tuple[Array, Saved]:
    """x ← x + attention(norm(x)), x ← x + mlp(norm(x)); `w` names as inside `layers.0.`."""
    y, saved_norm_1 = rms_norm(x, w["input_layernorm.weight"], eps)
    y, saved_attn = self_attention(y, inside("self_attn.", w), n_head, n_kv_head, by)
    x = x + y
    y, saved_norm_2 = rms_norm(x, w["post_attention_layernorm.weight"], eps)
    y, saved_mlp = mlp(y, inside("mlp.", w))
    return x + y, (saved_norm_1, saved_attn, saved_norm_2, saved_mlp)


def block_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    saved_norm_1, saved_attn, saved_norm_2, saved_mlp = saved
    grads: dict[str, Array] = {}
    branch, mlp_grads = mlp_backward(dy, saved_mlp)
    branch, grads["post_attention_layernorm.weight"] = rms_norm_backward(branch, saved_norm_2)
    dx = dy + branch
    branch, attn_grads = self_attention_backward(dx, saved_attn)
    branch, grads["input_layernorm.weight"] = rms_norm_backward(branch, saved_norm_1)
    return dx + branch, grads | named("self_attn.", attn_grads) | named("mlp.", mlp_grads)


# ---- the model -------------------------------------------------------------------------------------------------------


def loss_and_gradients(
    params: Params,
    idx: Array,
    targets: Array,
    n_head: int,
    n_kv_head: int,
    scale: float = 1.0,
    *,
    by: tuple[Array, Array] | None = None,
    eps: float = 1e-5,
) -> tuple[float, int, dict[str, Array]]:
    """Loss of a batch, number of its valid targets, and the gradient of that loss for every parameter.

    Args:
        params: name → array, float64; without `lm_head.weight` the head is the token embedding.
        idx, targets: (B, T) token ids; a target is `IGNORE_INDEX` where there is none.
        n_head, n_kv_head: heads of queries, heads of keys and values.
        scale: factor of the summed loss, as in `reference.gpt2`.
        by: cosine and sine of the angles, (T, D/2); default: `rotation` at the base 10,000. The model's are float32 in
            every precision, as transformers' are: give those to compare beyond that.
        eps: of the norms.
    """
    table = "embed_tokens.weight"
    tied = "lm_head.weight" not in params
    x, saved_blocks = params[table][idx], []
    by = rotation(idx.shape[1], len(params["layers.0.self_attn.q_proj.weight"]) // n_head) if by is None else by
    n_layer = len({name.split(".")[1] for name in params if name.startswith("layers.")})
    for layer in range(n_layer):
        x, saved = block(x, inside(f"layers.{layer}.", params), n_head, n_kv_head, by, eps)
        saved_blocks.append(saved)
    x, saved_norm = rms_norm(x, params["norm.weight"], eps)
    z, saved_head = head(x, params[table if tied else "lm_head.weight"])
    loss, saved_loss = cross_entropy(z, targets, scale)

    dx, dhead = head_backward(cross_entropy_backward(saved_loss), saved_head)
    grads: dict[str, Array] = {}
    dx, grads["norm.weight"] = rms_norm_backward(dx, saved_norm)
    for layer in reversed(range(n_layer)):
        dx, block_grads = block_backward(dx, saved_blocks[layer])
        grads |= named(f"layers.{layer}.", block_grads)
    grads[table] = np.zeros_like(params[table])
    np.add.at(grads[table], idx, dx)
    if tied:
        grads[table] += dhead  # one matrix, used twice: its gradient is the sum of both uses
    else:
        grads["lm_head.weight"] = dhead
    return loss, int((targets != IGNORE_INDEX).sum()), grads
