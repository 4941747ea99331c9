"""Break every formula of `regpt.reference` in turn; what is caught: `python tests/reference/mutations.py`.

A mutation is a text of a file and what replaces it. Each runs in a fork of a process that has torch and pytest loaded:
the broken source is executed over the module, then its tests run until one fails.
"""

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src/regpt/reference"
HANGS = 120  # seconds after which a mutation counts as caught
SHOW = "SHOW"  # set in the environment, prints what the tests print
REWRITTEN = "ignore::pytest.PytestAssertRewriteWarning"  # hypothesis is loaded before the forks

AUTOGRAD, TRAINING, REST = "test_reference_autograd.py", "test_reference_training.py", "test_reference_rest.py"
TESTS = {  # of each module, those that fail first
    "gpt2": ("test_reference_layers.py", "test_reference_gpt2.py", AUTOGRAD),
    "llama": (AUTOGRAD, TRAINING),
    "adamw": ("test_reference_adamw.py",),
    "layers": (AUTOGRAD,),
    "char_model": (TRAINING,),
    "optimizers": (TRAINING,),
    "flash": (REST, AUTOGRAD),
}

MUTATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt2": (
        ("return x @ w.T + b, (x, w)", "return x @ w.T - b, (x, w)"),
        ("rows_dy.T @ rows_x, rows_dy.sum(0)", "rows_dy.T @ rows_x, rows_dy.mean(0)"),
        ("(centred**2).mean(-1, keepdims=True) + NORM_EPS", "(centred**2).mean(-1, keepdims=True)"),
        ("NORM_EPS = 1e-5", "NORM_EPS = 1e-6"),
        ("(dn - dn.mean(-1, keepdims=True) - n", "(dn - n"),
        (
            "n * (dn * n).mean(-1, keepdims=True)) / sigma\n    rows",
            "n * dn.mean(-1, keepdims=True)) / sigma\n    rows",
        ),
        ("return dx, (dy * n).sum(rows), dy.sum(rows)", "return dx, dy.sum(rows), dy.sum(rows)"),
        ("= math.sqrt(2 / math.pi), 0.044715", "= math.sqrt(2 / math.pi), 0.0447"),
        ("GELU_SCALE * (1 + 3 * GELU_CUBIC", "GELU_SCALE * (1 + 2 * GELU_CUBIC"),
        ("0.5 * x * (1 - t**2) * du", "0.5 * x * (1 - t) * du"),
        ("e = np.exp(x - x.max(-1, keepdims=True))", "e = np.exp(x)"),
        ("scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)", "scores = q @ k.swapaxes(-1, -2) / D"),
        ("np.tri(T, dtype=bool)", "np.tri(T, k=1, dtype=bool)"),
        ("ds = p * (dp - (dp * p).sum", "ds = p * (dp + (dp * p).sum"),
        ("return ds @ k, ds.swapaxes(-1, -2) @ q, p", "return ds @ q, ds.swapaxes(-1, -2) @ q, p"),
        ("p.swapaxes(-1, -2) @ dy", "p @ dy"),
        ("np.add.at(dwte, idx, dy)", "dwte[idx] += dy"),
        ("dwpe[: idx.shape[1]] = dy.sum(0)", "dwpe[: idx.shape[1]] = dy[0]"),
        ("dz[np.arange(len(dz)), targets[valid]] -= 1", "dz[np.arange(len(dz)), targets[valid]] += 1"),
        ("dlogits[valid] = scale * dz", "dlogits[valid] = dz"),
        ("    z = z - z.max(-1, keepdims=True)\n", ""),
        ("dx = dy + branch\n", "dx = branch\n"),
        ("return dx + branch, grads | named", "return branch, grads | named"),
    ),
    "llama": (
        ("(x**2).mean(-1, keepdims=True) + eps", "(x**2).sum(-1, keepdims=True) + eps"),
        ("return (dn - n * (dn * n).mean(-1, keepdims=True)) / r", "return dn / r"),
        ("theta ** (-np.arange(0, D, 2) / D)", "theta ** (-np.arange(0, D, 2) / (2 * D))"),
        ("return turned(dy, cos, -sin)", "return turned(dy, cos, sin)"),
        ("left * cos - right * sin", "left * cos + right * sin"),
        ("sigmoid * (1 + gate * (1 - sigmoid))", "sigmoid * (1 + (1 - sigmoid))"),
        ("dy * gate * sigmoid\n", "dy * sigmoid\n"),
        ("n_head // n_kv_head, T, D).sum(2)", "n_head // n_kv_head, T, D).mean(2)"),
        ("return dx_q + dx_k + dx_v, grads", "return dx_q + dx_k, grads"),
        ("grads[table] += dhead", "grads[table] = dhead"),
    ),
    "adamw": (
        ("beta1 * m + (1 - beta1) * g", "beta1 * m + g"),
        ("(1 - beta2) * g**2", "(1 - beta2) * g"),
        ("1 - beta1**step", "1 - beta1"),
        ("1 - beta2**step", "1"),
        ("np.sqrt(v_hat) + eps", "np.sqrt(v_hat + eps)"),
        ("p * (1 - lr * decay)", "p * (1 - decay)"),
        ("if p.ndim >= 2 else", "if p.ndim >= 1 else"),
        ("math.sqrt(sum(", "(sum("),
        ("min(1.0, max_norm", "(max_norm"),
        ("(1 + math.cos(math.pi * r)) / 2", "(1 - math.cos(math.pi * r)) / 2"),
        ("done = step - 1", "done = step"),
    ),
    "layers": (
        ("ERF(x / math.sqrt(2))", "ERF(x)"),
        ("np.exp(-(x**2) / 2)", "np.exp(-(x**2))"),
        ("return dy * 2 * saved[0]", "return dy * saved[0]"),
        ("dy - np.exp(saved[0]) * dy.sum(-1, keepdims=True)", "dy - np.exp(saved[0]) * dy"),
        ("shifted = x - x.max(-1, keepdims=True)\n    y", "shifted = x\n    y"),
        ("seen = s <= t", "seen = s < t + 2"),
        ("(s > t - window)", "(s >= t - window)"),
        ("documents[:, None, :, None] == documents", "documents[:, None, :, None] >= documents"),
        ("used = p if kept is None else p * kept\n    return", "used = p\n    return"),
        ("@ v.swapaxes(-1, -2) * (1 if kept is None else kept)", "@ v.swapaxes(-1, -2)"),
        ("dv = ds.swapaxes(-1, -2) @ q, used", "dv = ds.swapaxes(-1, -2) @ q, p"),
        ("repeat, T, D).sum(2) for", "repeat, T, D).mean(2) for"),
        ("return x * kept / (1 - rate)", "return x * kept"),
        ("return dy * kept / (1 - rate)", "return dy / (1 - rate)"),
        ("dpicked = (dweights - norm_topk *", "dpicked = (dweights + norm_topk *"),
        ("* weights).sum(-1, keepdims=True)) / total", "* weights).sum(-1, keepdims=True))"),
        ("dlogits = shares * (dshares - (dshares * shares)", "dlogits = shares * (dshares - 0 * (dshares * shares)"),
        ("return dx + dlogits @ router, grads", "return dx, grads"),
        ("weights[token, place, None] * dy[token]", "dy[token]"),
        ("scale * low @ b.T", "low @ b.T"),
        ("dlow = scale * dy @ b", "dlow = dy @ b"),
        ("return dy @ w + dlow @ a", "return dy @ w"),
        ("np.logaddexp(0, -beta * margin)", "np.logaddexp(0, beta * margin)"),
        ("dmargin = -beta / (1", "dmargin = -1 / (1"),
        ("(rejected - reference[1])", "rejected"),
    ),
    "char_model": (
        ('v["square"].sum(0, keepdims=True) / (B - 1)', 'v["square"].sum(0, keepdims=True) / B'),
        ("EPS = 1e-5", "EPS = 1e-4"),
        ('d["logprobs"] / v["probs"]', 'd["logprobs"] * v["probs"]'),
        ('v["total_inv"] + d["total"]', 'v["total_inv"]'),
        ('-(v["total"] ** -2)', '-(v["total"] ** -1)'),
        ('d["h"] * (1 - v["h"] ** 2)', 'd["h"] * (1 - v["h"])'),
        ("-0.5 * (v[", "0.5 * (v["),
        ('+ 2 * v["diff"] * d["square"]', '+ v["diff"] * d["square"]'),
        ('d["pre"] = d["diff"] + d["mean"] / B', 'd["pre"] = d["diff"] + d["mean"]'),
        ('np.add.at(grads["table"], v["idx"], d["emb"])', 'grads["table"][v["idx"]] += d["emb"]'),
        ("targets] -= 1\n    return d / len(d)", "targets] -= 1\n    return d"),
        ("norm * (dact * norm).sum(0) / (B - 1)", "norm * (dact * norm).sum(0) / B"),
    ),
    "optimizers": (
        ("return p - lr * g, state", "return p + lr * g, state"),
        ('mu * state.get("m", 0 * p) + g\n', 'mu * state.get("m", 0 * p) + (1 - mu) * g\n'),
        ("(g + mu * m if nesterov else m)", "(g + m if nesterov else m)"),
        ('state.get("v", 0 * p) + g**2', "g**2"),
        ("(1 - alpha) * g**2", "g**2"),
        ("beta1, beta2, eps, decay=0.0)", "beta1, beta2, eps, decay=0.1)"),
        ("np.sign(beta1 * m + (1 - beta1) * g)", "np.sign(g)"),
        ("beta2 * m + (1 - beta2) * g}", "beta1 * m + (1 - beta1) * g}"),
        ("4.7750", "4.7"),
        ("(b * gram + c * gram @ gram) @ x", "(b * gram - c * gram @ gram) @ x"),
        ("np.linalg.norm(x)", "np.abs(x).max()"),
        ("newton_schulz((1 - mu) * g + mu * m)", "newton_schulz(m)"),
        ("max(1.0, p.shape[0] / p.shape[1])", "max(1.0, p.shape[1] / p.shape[0])"),
        ("/ sum(counts)", "/ len(counts)"),
        ("(steps - step + 1)", "(steps - step)"),
        ("math.sqrt(warmup_steps / step)", "warmup_steps / step"),
        ("order[first : first + size]", "order[first : first + size - 1]"),
    ),
    "bpe": (
        ("(-pairs[pair], pair)", "(pairs[pair], pair)"),
        ("pairs[pair] += counts[word]", "pairs[pair] += 1"),
        ("            i += 2\n", "            i += 1\n"),
        ("[ W]+(?![LNO])|", ""),
        (" ?N+| ?O+", " ?N+|O+"),
        ('"\'re"', '"\'r"'),
        ('merges.get(pair, float("inf"))', "-merges.get(pair, -1)"),
        ("known[left] + known[right]", "known[right] + known[left]"),
        ('category if category in "LN"', 'category if category in "LNM"'),
    ),
    "flash": (
        ("shrink * total + e.sum", "total + e.sum"),
        ("shrink * out + e @ v", "out + e @ v"),
        ("m + np.log(total)", "np.log(total)"),
        ("np.arange(rows.stop)[None, :] > np", "np.arange(rows.stop)[None, :] >= np"),
        ("np.exp(s - lse[r])", "np.exp(s)"),
        ("- delta[r])", "+ delta[r])"),
        ("for col in range(0, row + tile, tile)", "for col in range(0, row + 1, 2 * tile)"),
        ("dk[c] += ds.T @ q[r]", "dk[c] = ds.T @ q[r]"),
        ("4 * T * D + 4 * T * T", "4 * T * D + 2 * T * T"),
    ),
    "rounding": (
        ("2 - 2 ** (self.exponent - 1)", "1 - 2 ** (self.exponent - 1)"),
        ("np.round(x / spacing)", "np.floor(x / spacing)"),
        ("np.frexp(x)[1] - 1", "np.frexp(x)[1]"),
        ("np.inf if form.infinite else np.nan", "form.largest"),
        ("FloatFormat(4, 3, 448.0", "FloatFormat(4, 3, 240.0"),
        (".max(1, keepdims=True) / 127", ".max(1, keepdims=True) / 128"),
        ("np.linspace(end, 0.5, 9)", "np.linspace(end, 0.5, 8)"),
        ("1 - (1 / 32 + 1 / 30) / 2", "1 - 1 / 32"),
        ("levels).argmin(-1)", "levels).argmax(-1)"),
        ("np.abs(w).mean()\n", "np.abs(w).max()\n"),
        ("np.clip(np.round(w", "np.clip(np.floor(w"),
        ("scale_bits / block", "scale_bits * block"),
    ),
    "decoding": (
        ("np.sort(logits)[-k]", "np.sort(logits)[k]"),
        ("before < p", "before + 0.2 < p"),
        ("softmax(logits / temperature)", "softmax(logits * temperature)"),
        ("keys @ q / math.sqrt(len(q))", "keys @ q"),
        ("np.maximum(p - q, 0)", "np.abs(p - q)"),
        ("min(1.0, p[draft] / q[draft])", "min(1.0, q[draft] / p[draft])"),
        ("residual(p, q), 1e-300", "p, 1e-300"),
        ("np.minimum(p, q).sum()", "np.maximum(p, q).sum()"),
    ),
    "collectives": (
        ("(r - 1 - round_) % n", "(r - round_) % n"),
        ("parts[(r + 1) % n][number] + part", "part"),
        ("(r - round_) % n, known[r][(r - round_) % n]", "r, known[r][r]"),
        ("range(n - 1):\n        # All", "range(n - 2):\n        # All"),
        ("scattered.sent + gathered.sent)\n\n\n#", "scattered.sent)\n\n\n#"),
        ("value / total for", "value / len(sums) for"),
        ("terms.append(dpre @ up)", "terms.append(dpre @ up / len(saved))"),
        ("ddowns.append(dy.T @ hidden)", "ddowns.append((dy.T @ hidden) * 2)"),
        ("ahead = min(stages - stage, micro_batches)", "ahead = micro_batches"),
        ('before = stage - 1 if task[0] == "F" else stage + 1', "before = stage - 1"),
        ("backward: float = 2.0", "backward: float = 1.0"),
    ),
}


def survives(module: str, old: str, new: str) -> bool:
    """Whether the tests of this folder pass with the module broken.

    Raises:
        ValueError: `old` is not in the file, or more than once.
    """
    path = SOURCE / f"{module}.py"
    source = path.read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"{module}.py holds {old!r} {source.count(old)} times, must be once")
    child = os.fork()
    if not child:
        signal.alarm(HANGS)
        os._exit(tests_of(module, lambda: exec(compile(source.replace(old, new), str(path), "exec"), loaded(module))))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def loaded(module: str) -> dict[str, object]:
    return importlib.import_module(f"regpt.reference.{module}").__dict__


def tests_of(module: str, first: Callable[[], object]) -> int:
    """Exit code of the tests of a module, silent, after `first`."""
    import pytest

    code, out = 1, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            first()
            for name in [name for name in sys.modules if name.rpartition(".")[2].startswith("test_reference")]:
                del sys.modules[name]  # they hold functions from before
            tests = [str(HERE / name) for name in TESTS.get(module, (REST,))]
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", REWRITTEN, *tests]))
        except BaseException as error:
            print(error)
    if SHOW in os.environ:
        print(out.getvalue(), file=sys.stderr)
    return code


def main(only: list[str]) -> int:
    import torch

    torch.set_num_threads(1)  # a pool of threads would not be in the forks
    sys.path.insert(0, str(HERE.parents[1]))
    for module in only or MUTATIONS:
        loaded(module)
        if tests_of(module, lambda: None):  # loads all that they import, once for all forks
            print(f"{module}: the tests fail on a source that is not broken")
            return 1
    survivors = 0
    for module, mutations in MUTATIONS.items():
        if only and module not in only:
            continue
        alive = [(old, new) for old, new in mutations if survives(module, old, new)]
        survivors += len(alive)
        print(f"{module}: {len(mutations) - len(alive)} of {len(mutations)} caught", flush=True)
        for old, new in alive:
            print(f"  survives: {old!r} → {new!r}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
