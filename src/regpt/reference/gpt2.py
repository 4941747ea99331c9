"""GPT-2, forward and backward, written out in NumPy: what autograd does, on one page.

Every layer is a pair of functions. `layer(x, weights) -> (y, saved)` computes the layer and keeps what its derivative
needs; `layer_backward(dy, saved) -> (dx, dweights)` is the chain rule. `dy` means ∂loss/∂y and has the shape of y.
Read from top to bottom: the layers, then the block that is made of them, then the model.

Parameters are a dict from the names of `regpt.model` to arrays; results have the parameters' dtype, and float64 is
the one to use: rounding then hides no mistake. Shapes: B batch, T time, C n_embd, H heads, D head size, V vocabulary,
F = 4·C width of the MLP, L layers. Nothing is optimised and no torch is imported, so that it can be an oracle.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from regpt.errors import UserError

Array = np.ndarray
Params = Mapping[str, Array]
Saved = tuple[Any, ...]

IGNORE_INDEX = -100  # a target of this value carries no loss, as in torch.nn.functional.cross_entropy
NORM_EPS = 1e-5  # the value in OpenAI's code
GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715  # Hendrycks & Gimpel 2016, section 2


# ---- layers ----------------------------------------------------------------------------------------------------------


def linear(x: Array, w: Array, b: Array) -> tuple[Array, Saved]:
    """y = x·wᵀ + b; x (..., I), w (O, I), b (O,), y (..., O)."""
    return x @ w.T + b, (x, w)


def linear_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """y_no = Σ_i x_ni w_oi + b_o, so dx_ni = Σ_o dy_no w_oi, dw_oi = Σ_n dy_no x_ni, db_o = Σ_n dy_no."""
    x, w = saved
    rows_dy, rows_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, O), (N, I)
    return dy @ w, rows_dy.T @ rows_x, rows_dy.sum(0)


def layer_norm(x: Array, w: Array, b: Array) -> tuple[Array, Saved]:
    """y = n·w + b with n = (x - μ)/σ, σ² = mean((x - μ)²) + eps, over the last dimension (Ba et al. 2016, eq. 4)."""
    centred = x - x.mean(-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPS)  # (..., 1)
    n = centred / sigma
    return n * w + b, (n, sigma, w)


def layer_norm_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dw = Σ dy·n, db = Σ dy, and with dn = dy·w: dx = (dn - mean(dn) - n·mean(dn·n)) / σ.

    n is x without its mean and divided by its length. A change of x along either of these two directions is undone,
    so no gradient can flow there: the two subtractions remove the parts of dn along (1, …, 1) and along n.
    """
    n, sigma, w = saved
    dn = dy * w
    dx = (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / sigma
    rows = tuple(range(dy.ndim - 1))
    return dx, (dy * n).sum(rows), dy.sum(rows)


def gelu(x: Array) -> tuple[Array, Saved]:
    """y = x/2·(1 + t), t = tanh(u), u = √(2/π)·(x + 0.044715·x³): the tanh form that GPT-2 was trained with."""
    t = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
    return 0.5 * x * (1 + t), (x, t)


def gelu_backward(dy: Array, saved: Saved) -> Array:
    """Product rule with tanh' = 1 - tanh²: dy/dx = (1 + t)/2 + x/2·(1 - t²)·u', u' = √(2/π)·(1 + 3·0.044715·x²)."""
    x, t = saved
    du = GELU_SCALE * (1 + 3 * GELU_CUBIC * x**2)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du)


def softmax(x: Array) -> Array:
    """p_i = exp(x_i) / Σ_j exp(x_j) over the last dimension; subtracting the maximum changes nothing but overflow."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_attention(q: Array, k: Array, v: Array) -> tuple[Array, Saved]:
    """y = p·v with p = softmax(q·kᵀ/√D), where position t sees positions up to t (Vaswani et al. 2017, eq. 1).

    All arrays are (B, H, T, D), p is (B, H, T, T).
    """
    T, D = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)
    p = softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf))  # exp(-inf) = 0: no weight on the future
    return p @ v, (q, k, v, p)


def attention_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """y = p·v gives dv = pᵀ·dy and dp = dy·vᵀ; the scores s = q·kᵀ/√D give dq = ds·k/√D and dk = dsᵀ·q/√D.

    Between them the softmax: ∂p_i/∂s_j = p_i·(δ_ij - p_j), so ds_j = p_j·(dp_j - Σ_i dp_i·p_i). A masked score has
    p_j = 0 and gets no gradient, so the backward pass needs no mask.
    """
    q, k, v, p = saved
    dp = dy @ v.swapaxes(-1, -2)  # (B, H, T, T)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, C) to (B, H, T, D): head h is columns [h·D, (h + 1)·D). It only moves numbers; `merge_heads` undoes it."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) to (B, T, C)."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


def embedding(idx: Array, wte: Array, wpe: Array) -> tuple[Array, Saved]:
    """y_bt = wte[idx_bt] + wpe[t]; idx (B, T), wte (V, C), wpe (max_seq_len, C), y (B, T, C)."""
    return wte[idx] + wpe[: idx.shape[1]], (idx, wte, wpe)


def embedding_backward(dy: Array, saved: Saved) -> tuple[Array, Array]:
    """A row of wte gets the sum of dy over every place where its token stands, a row of wpe the sum over the batch."""
    idx, wte, wpe = saved
    dwte, dwpe = np.zeros_like(wte), np.zeros_like(wpe)
    np.add.at(dwte, idx, dy)  # not dwte[idx] += dy, which would count a repeated token once
    dwpe[: idx.shape[1]] = dy.sum(0)
    return dwte, dwpe


def head(x: Array, wte: Array) -> tuple[Array, Saved]:
    """logits = x·wteᵀ: the output projection is the token embedding again (Press & Wolf 2017), and has no bias."""
    return x @ wte.T, (x, wte)


def head_backward(dlogits: Array, saved: Saved) -> tuple[Array, Array]:
    """`linear_backward` without the bias; this dwte is added to the embedding's, because the matrix is the same one."""
    x, wte = saved
    return dlogits @ wte, dlogits.reshape(-1, wte.shape[0]).T @ x.reshape(-1, wte.shape[1])


def cross_entropy(logits: Array, targets: Array, scale: float) -> tuple[float, Saved]:
    """scale · Σ over the valid targets of -log softmax(logits)[target]; logits (B, T, V), targets (B, T).

    -log softmax(z)[j] = log Σ_i exp(z_i) - z_j. `scale` is 1/(number of valid targets in the whole step), so that the
    losses and gradients of micro-batches add up to those of the step, however it is split or masked.
    """
    valid = targets != IGNORE_INDEX  # (B, T)
    z, target = logits[valid], targets[valid]  # (N, V), (N,)
    z = z - z.max(-1, keepdims=True)
    losses = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), target]  # (N,)
    return float(scale * losses.sum()), (logits, targets, scale)


def cross_entropy_backward(saved: Saved) -> Array:
    """dz = scale·(softmax(z) - onehot(target)) where there is a target, else 0: probability moves to the target."""
    logits, targets, scale = saved
    valid = targets != IGNORE_INDEX
    dz = softmax(logits[valid])  # (N, V)
    dz[np.arange(len(dz)), targets[valid]] -= 1
    dlogits = np.zeros_like(logits)
    dlogits[valid] = scale * dz
    return dlogits


# ---- the block -------------------------------------------------------------------------------------------------------


def self_attention(x: Array, w: Params, n_head: int) -> tuple[Array, Saved]:
    """x (B, T, C) → q, k, v in one product → attention in each head → projection; `w` names as inside `attn.`."""
    qkv, saved_in = linear(x, w["c_attn.weight"], w["c_attn.bias"])  # (B, T, 3C)
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))  # each (B, H, T, D)
    y, saved_attention = causal_attention(q, k, v)
    y, saved_out = linear(merge_heads(y), w["c_proj.weight"], w["c_proj.bias"])  # (B, T, C)
    return y, (saved_in, saved_attention, saved_out, n_head)


def self_attention_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    """The steps of `self_attention`, last to first; splitting and merging heads are each other's backward."""
    saved_in, saved_attention, saved_out, n_head = saved
    grads: dict[str, Array] = {}
    dy, grads["c_proj.weight"], grads["c_proj.bias"] = linear_backward(dy, saved_out)
    dqkv = attention_backward(split_heads(dy, n_head), saved_attention)
    dy = np.concatenate([merge_heads(part) for part in dqkv], axis=-1)  # (B, T, 3C)
    dx, grads["c_attn.weight"], grads["c_attn.bias"] = linear_backward(dy, saved_in)
    return dx, grads


def mlp(x: Array, w: Params) -> tuple[Array, Saved]:
    """y = gelu(x·fcᵀ)·projᵀ, each with its bias; `w` names as inside `mlp.`."""
    y, saved_in = linear(x, w["c_fc.weight"], w["c_fc.bias"])  # (B, T, F)
    y, saved_gelu = gelu(y)
    y, saved_out = linear(y, w["c_proj.weight"], w["c_proj.bias"])  # (B, T, C)
    return y, (saved_in, saved_gelu, saved_out)


def mlp_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    """The steps of `mlp`, last to first."""
    saved_in, saved_gelu, saved_out = saved
    grads: dict[str, Array] = {}
    dy, grads["c_proj.weight"], grads["c_proj.bias"] = linear_backward(dy, saved_out)
    dx, grads["c_fc.weight"], grads["c_fc.bias"] = linear_backward(gelu_backward(dy, saved_gelu), saved_in)
    return dx, grads


def block(x: Array, w: Params, n_head: int) -> tuple[Array, Saved]:
    """x ← x + attn(ln_1(x)), x ← x + mlp(ln_2(x)) (Radford et al. 2019, section 2.3); `w` names as inside `h.0.`."""
    y, saved_ln_1 = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"])
    y, saved_attn = self_attention(y, inside("attn.", w), n_head)
    x = x + y
    y, saved_ln_2 = layer_norm(x, w["ln_2.weight"], w["ln_2.bias"])
    y, saved_mlp = mlp(y, inside("mlp.", w))
    return x + y, (saved_ln_1, saved_attn, saved_ln_2, saved_mlp)


def block_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    """z = x + f(x) gives dx = dz + (what f's backward makes of dz): the residual path adds the gradient unchanged."""
    saved_ln_1, saved_attn, saved_ln_2, saved_mlp = saved
    grads: dict[str, Array] = {}
    branch, mlp_grads = mlp_backward(dy, saved_mlp)
    branch, grads["ln_2.weight"], grads["ln_2.bias"] = layer_norm_backward(branch, saved_ln_2)
    dx = dy + branch
    branch, attn_grads = self_attention_backward(dx, saved_attn)
    branch, grads["ln_1.weight"], grads["ln_1.bias"] = layer_norm_backward(branch, saved_ln_1)
    return dx + branch, grads | named("attn.", attn_grads) | named("mlp.", mlp_grads)


def inside(prefix: str, params: Params) -> dict[str, Array]:
    """The parameters whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}


def named(prefix: str, params: Params) -> dict[str, Array]:
    """`params` with `prefix` before every name."""
    return {prefix + name: p for name, p in params.items()}


# ---- the model -------------------------------------------------------------------------------------------------------


def hidden(params: Params, idx: Array, n_head: int) -> tuple[Array, Saved]:
    """Final hidden states (B, T, C) of the tokens `idx` (B, T): embedding, the blocks, the final LayerNorm."""
    x, saved_embedding = embedding(idx, params["wte.weight"], params["wpe.weight"])
    saved_blocks = []
    for layer in range(count_layers(params)):
        x, saved = block(x, inside(f"h.{layer}.", params), n_head)
        saved_blocks.append(saved)
    x, saved_ln_f = layer_norm(x, params["ln_f.weight"], params["ln_f.bias"])
    return x, (saved_embedding, saved_blocks, saved_ln_f)


def hidden_backward(dx: Array, saved: Saved) -> dict[str, Array]:
    """Gradients of every parameter by name; that of `wte.weight` lacks the head's share."""
    saved_embedding, saved_blocks, saved_ln_f = saved
    grads: dict[str, Array] = {}
    dx, grads["ln_f.weight"], grads["ln_f.bias"] = layer_norm_backward(dx, saved_ln_f)
    for layer in reversed(range(len(saved_blocks))):
        dx, block_grads = block_backward(dx, saved_blocks[layer])
        grads |= named(f"h.{layer}.", block_grads)
    grads["wte.weight"], grads["wpe.weight"] = embedding_backward(dx, saved_embedding)
    return grads


def logits(params: Params, idx: Array, n_head: int) -> Array:
    """Logits (B, T, V) for the token after each of `idx` (B, T).

    Raises:
        UserError: parameters or tokens that do not make a GPT-2.
    """
    check_inputs(params, idx, None, n_head)
    x, _ = hidden(params, idx, n_head)
    return head(x, params["wte.weight"])[0]


def loss_and_gradients(
    params: Params, idx: Array, targets: Array, n_head: int, scale: float = 1.0
) -> tuple[float, int, dict[str, Array]]:
    """Loss of a batch, number of its valid targets, and the gradient of that loss for every parameter.

    Args:
        params: name → array, the names and shapes of `parameter_shapes`.
        idx: (B, T) token ids.
        targets: (B, T) token ids, `IGNORE_INDEX` where there is none.
        n_head: attention heads.
        scale: factor of the summed loss. 1 gives the sum; 1/count, with the count of the whole step, the step's mean.

    Raises:
        UserError: parameters, tokens or targets that do not make a GPT-2.
    """
    check_inputs(params, idx, targets, n_head)
    x, saved_hidden = hidden(params, idx, n_head)
    z, saved_head = head(x, params["wte.weight"])
    loss, saved_loss = cross_entropy(z, targets, scale)
    dx, dwte = head_backward(cross_entropy_backward(saved_loss), saved_head)
    grads = hidden_backward(dx, saved_hidden)
    grads["wte.weight"] += dwte  # one matrix, used twice: its gradient is the sum of both uses
    return loss, int((targets != IGNORE_INDEX).sum()), grads


# ---- parameters and checks -------------------------------------------------------------------------------------------


def count_layers(params: Params) -> int:
    return sum(name.startswith("h.") and name.endswith(".ln_1.weight") for name in params)


def parameter_shapes(n_layer: int, n_embd: int, vocab_size: int, max_seq_len: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter, in `torch.nn.Linear`'s layout (outputs, inputs); the head is `wte.weight`."""
    C, F = n_embd, 4 * n_embd
    block_shapes: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (F, C),
        "mlp.c_fc.bias": (F,),
        "mlp.c_proj.weight": (C, F),
        "mlp.c_proj.bias": (C,),
    }
    blocks = {f"h.{i}.{name}": shape for i in range(n_layer) for name, shape in block_shapes.items()}
    embeddings = {"wte.weight": (vocab_size, C), "wpe.weight": (max_seq_len, C)}
    return embeddings | blocks | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def check_inputs(params: Params, idx: Array, targets: Array | None, n_head: int) -> None:
    """NumPy would read token -1 as the last row, and broadcast a wrong shape: refuse both before any arithmetic.

    Raises:
        UserError: naming what is wrong and what is allowed.
    """
    check_parameters(params)
    vocab_size, n_embd = params["wte.weight"].shape
    if n_head < 1 or n_embd % n_head:
        raise UserError(f"n_head is {n_head}, must divide the model's width {n_embd}; pass the n_head of its config")
    check_tokens("idx", idx, vocab_size)
    max_seq_len = len(params["wpe.weight"])
    if idx.shape[1] > max_seq_len:
        raise UserError(f"idx has {idx.shape[1]} tokens a row, the model has {max_seq_len} positions; shorten the rows")
    if targets is None:
        return
    if targets.shape != idx.shape:
        raise UserError(f"targets have shape {targets.shape}, idx has {idx.shape}; give one target for each token")
    check_tokens("targets", np.where(targets == IGNORE_INDEX, 0, targets), vocab_size)


def check_tokens(what: str, tokens: Array, vocab_size: int) -> None:
    """Raise a UserError unless `tokens` is a (B, T) array of integers in [0, vocab_size)."""
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{what} is {tokens.dtype} {tokens.shape}, must be integers (B, T); reshape or convert it")
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise UserError(f"{what} holds {wrong[0]}, must lie in 0 … {vocab_size - 1}; use the model's own tokenizer")


def check_parameters(params: Params) -> None:
    """Raise a UserError for the first parameter that is missing, unknown, not an array, or of another shape."""
    for name in ("wte.weight", "wpe.weight"):
        if np.ndim(params.get(name, 0)) != 2:
            raise UserError(f"parameter {name!r} is missing or not a matrix; see parameter_shapes for all names")
    (vocab_size, n_embd), max_seq_len = params["wte.weight"].shape, len(params["wpe.weight"])
    shapes = parameter_shapes(count_layers(params), n_embd, vocab_size, max_seq_len)
    for name in sorted(shapes.keys() ^ params.keys()):
        state = "is missing" if name in shapes else "is unknown"
        raise UserError(f"parameter {name!r} {state}; see parameter_shapes for all names")
    for name, shape in shapes.items():
        if not isinstance(params[name], np.ndarray):
            raise UserError(f"parameter {name!r} is a {type(params[name]).__name__}, must be a NumPy array; convert it")
        if params[name].shape != shape:
            raise UserError(f"parameter {name!r} has shape {params[name].shape}, this model needs {shape}; reshape it")
