"""The character model of the classic exercise in backpropagation by hand: every intermediate gradient, in NumPy.

Three characters predict the next one (Bengio et al. 2003): embeddings side by side, a hidden layer with batch
normalisation and tanh, logits. The exercise is Karpathy's ("Building makemore, part 4: becoming a backprop ninja");
the text and code here are this project's. Names are those of the variables; d… is the loss's derivative by one.
Shapes: B batch, S characters of context, E embedding size (10), K = S·E, F hidden size (64), V vocabulary.
"""

import numpy as np

from regpt.reference.gpt2 import Array, Params, softmax

EPS = 1e-5  # Ioffe & Szegedy 2015, algorithm 1


def char_parameters(rng: np.random.Generator, V: int = 27, S: int = 3, E: int = 10, F: int = 64) -> dict[str, Array]:
    """Weights drawn so that the hidden layer's inputs have variance 1 or so, and the first logits are small."""
    K = S * E
    return {
        "table": rng.normal(size=(V, E)),
        "w1": rng.normal(size=(K, F)) * (5 / 3) / K**0.5,  # 5/3 makes up for what tanh takes (He et al. 2015)
        "b1": rng.normal(size=F) * 0.1,
        "gain": np.ones(F) + rng.normal(size=F) * 0.1,
        "bias": rng.normal(size=F) * 0.1,
        "w2": rng.normal(size=(F, V)) * 0.1,
        "b2": rng.normal(size=V) * 0.1,
    }


def char_forward(p: Params, idx: Array, targets: Array) -> dict[str, Array]:
    """Every intermediate value under its name, `loss` last; idx (B, S), targets (B,). One operation a line."""
    v: dict[str, Array] = {"idx": idx, "targets": targets}
    B = len(idx)
    v["emb"] = p["table"][idx]  # (B, S, E)
    v["x"] = v["emb"].reshape(B, -1)  # (B, K)
    v["pre"] = v["x"] @ p["w1"] + p["b1"]  # (B, F)
    v["mean"] = v["pre"].sum(0, keepdims=True) / B  # (1, F)
    v["diff"] = v["pre"] - v["mean"]
    v["square"] = v["diff"] ** 2
    v["var"] = v["square"].sum(0, keepdims=True) / (B - 1)  # Bessel's correction, as torch has it for running values
    v["inv"] = (v["var"] + EPS) ** -0.5
    v["norm"] = v["diff"] * v["inv"]
    v["act"] = p["gain"] * v["norm"] + p["bias"]
    v["h"] = np.tanh(v["act"])
    v["logits"] = v["h"] @ p["w2"] + p["b2"]  # (B, V)
    v["top"] = v["logits"].max(1, keepdims=True)
    v["shifted"] = v["logits"] - v["top"]
    v["counts"] = np.exp(v["shifted"])
    v["total"] = v["counts"].sum(1, keepdims=True)
    v["total_inv"] = v["total"] ** -1
    v["probs"] = v["counts"] * v["total_inv"]
    v["logprobs"] = np.log(v["probs"])
    v["loss"] = -v["logprobs"][np.arange(B), targets].mean()
    return v


def char_backward(p: Params, v: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Gradients of all parameters and of all intermediate values: each line undoes one of `char_forward`, last first.

    Three rules do it: a factor's gradient is the other factor times what comes in; what was broadcast forward is summed
    backward; what was used twice gets both parts (`counts`, `diff`, `pre`, `logits`).
    """
    B, rows = len(v["idx"]), np.arange(len(v["idx"]))
    d: dict[str, Array] = {"logprobs": np.zeros_like(v["logprobs"])}
    d["logprobs"][rows, v["targets"]] = -1 / B
    d["probs"] = d["logprobs"] / v["probs"]
    d["total_inv"] = (d["probs"] * v["counts"]).sum(1, keepdims=True)
    d["total"] = -(v["total"] ** -2) * d["total_inv"]
    d["counts"] = d["probs"] * v["total_inv"] + d["total"]
    d["shifted"] = d["counts"] * v["counts"]
    d["top"] = -d["shifted"].sum(1, keepdims=True)  # 0 but for rounding: the maximum changes nothing
    d["logits"] = d["shifted"].copy()
    d["logits"][rows, v["logits"].argmax(1)] += d["top"][:, 0]
    d["h"] = d["logits"] @ p["w2"].T
    d["act"] = d["h"] * (1 - v["h"] ** 2)
    d["norm"] = d["act"] * p["gain"]
    d["inv"] = (d["norm"] * v["diff"]).sum(0, keepdims=True)
    d["var"] = -0.5 * (v["var"] + EPS) ** -1.5 * d["inv"]
    d["square"] = d["var"] / (B - 1) * np.ones_like(v["square"])
    d["diff"] = d["norm"] * v["inv"] + 2 * v["diff"] * d["square"]
    d["mean"] = -d["diff"].sum(0, keepdims=True)
    d["pre"] = d["diff"] + d["mean"] / B
    d["x"] = d["pre"] @ p["w1"].T
    d["emb"] = d["x"].reshape(v["emb"].shape)
    grads = {
        "w2": v["h"].T @ d["logits"],
        "b2": d["logits"].sum(0),
        "gain": (d["act"] * v["norm"]).sum(0),
        "bias": d["act"].sum(0),
        "w1": v["x"].T @ d["pre"],
        "b1": d["pre"].sum(0),  # 0 but for rounding: batch normalisation subtracts what b1 adds, so b1 is useless
        "table": np.zeros_like(p["table"]),
    }
    np.add.at(grads["table"], v["idx"], d["emb"])
    return grads, d


def cross_entropy_at_once(logits: Array, targets: Array) -> Array:
    """dlogits of the seven lines from `top` to `loss` in one formula: (softmax(logits) - onehot(targets))/B. Each row
    adds up to 0: probability is pulled to the target and pushed from the rest in proportion to what they hold."""
    d = softmax(logits)
    d[np.arange(len(d)), targets] -= 1
    return d / len(d)


def batch_norm_at_once(dact: Array, norm: Array, inv: Array, gain: Array) -> Array:
    """dpre of the six lines from `mean` to `act` in one formula:
    dpre = gain·inv·(dact - mean(dact) - norm·Σ(dact·norm)/(B - 1)), means and sums over the batch.

    As for LayerNorm, a shift of a column or a change of its length is undone, so no gradient flows along them.
    """
    B = len(dact)
    return gain * inv * (dact - dact.mean(0) - norm * (dact * norm).sum(0) / (B - 1))
