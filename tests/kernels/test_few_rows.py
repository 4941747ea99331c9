"""Products of a few rows on a CPU: the numbers, whatever the threads, and what happens without a compiler."""

import os
import subprocess
import sys

import pytest
import torch

import tiny
from regpt.kernels import few_rows
from regpt.kernels.few_rows import MOST, load_few_rows, with_few_rows
from regpt.model.ops import attention, linear

KERNEL = load_few_rows()
compiled = pytest.mark.skipif(KERNEL is None, reason="no C compiler")


def q8_0(n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8), torch.rand(n_out, n_in // 32).half()


@compiled
@torch.no_grad()
@pytest.mark.parametrize("n_in", [1, 31, 32, 100, 768])
def test_products_are_those_of_float64_to_rounding_for_every_number_of_rows(n_in):
    assert KERNEL is not None
    weight, bias = torch.randn(1000, n_in), torch.randn(1000)
    for rows in range(1, MOST + 1):
        x = torch.randn(1, rows, n_in)
        expected = linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(KERNEL.linear(x, weight, bias).double(), expected, rtol=0, atol=2e-6 * n_in**0.5)
        if n_in % 32 == 0:
            whole, scales = q8_0(1000, n_in)
            expected = linear(x.double(), whole.double() * scales.double().repeat_interleave(32, 1), None)
            found = KERNEL.product(x, whole, scales, None).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@compiled
@torch.no_grad()
def test_the_bits_of_a_row_depend_neither_on_the_other_rows_nor_on_the_threads():
    assert KERNEL is not None
    weight, x = torch.randn(2000, 200), torch.randn(MOST, 200)
    expected = torch.cat([KERNEL.linear(row[None], weight, None) for row in x])
    threads = KERNEL.threads
    try:
        for KERNEL.threads in (1, 2, 5):
            for rows in range(1, MOST + 1):
                assert torch.equal(KERNEL.linear(x[:rows], weight, None), expected[:rows])
    finally:
        KERNEL.threads = threads


@compiled
@torch.no_grad()
@pytest.mark.parametrize(("H", "G", "D"), [(12, 12, 64), (8, 2, 128), (3, 1, 16), (2, 1, 256), (2, 2, 48)])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_attention_of_one_query_is_that_of_float64_to_rounding(H, G, D, scale):
    """Up to where one position has all the weight; keys and values are part of a longer cache."""
    assert KERNEL is not None
    q, cache = scale * torch.randn(H, 1, D), torch.randn(2, G, 300, D)
    for S in (1, 2, 63, 64, 65, 200):
        k, v = cache[:, :, 7 : 7 + S]
        repeated = [y.double().repeat_interleave(H // G, 0) for y in (k, v)]
        expected = attention(q.double()[None], repeated[0][None], repeated[1][None])[0]
        assert KERNEL.attends(k, v)
        found = KERNEL.attend_one(q, k, v)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * scale)
        threads = KERNEL.threads
        for KERNEL.threads in (1, 2, 5):
            assert torch.equal(KERNEL.attend_one(q, k, v), found)
        KERNEL.threads = threads
    v[:, 3] = float("nan")  # a value that is not seen is not read
    assert KERNEL.attend_one(q, k[:, :3], v[:, :3]).isfinite().all()
    assert not KERNEL.attends(k.double(), v.double())
    assert not KERNEL.attends(k[:, ::2], v[:, ::2])


@compiled
def test_several_callers_at_once_and_children_of_a_fork_get_their_own_products():
    script = """
import os, threading, torch
from regpt.kernels.few_rows import load_few_rows
kernel, wrong = load_few_rows(), []
weights = [torch.randn(3000, 64 + i) for i in range(4)]
def call(i):
    with torch.no_grad():
        x = torch.randn(1, 64 + i)
        expected = x @ weights[i].T
        for _ in range(200):
            if not torch.allclose(kernel.linear(x, weights[i], None), expected, atol=1e-3):
                wrong.append(i)
kernel.threads = 3
callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
[one.start() for one in callers]
child = os.fork()
if child == 0:
    kernel.threads = 2
    with torch.no_grad():  # PyTorch's own threads do not survive a fork
        one = kernel.linear(torch.ones(1, 64), torch.ones(3000, 64), None)
    os._exit(0 if bool((one == 64).all()) else 1)
[one.join() for one in callers]
assert not wrong and os.waitpid(child, 0)[1] == 0
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=env)


@compiled
@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILY_CONFIGS)
def test_a_model_with_these_products_shares_its_weights_and_computes_the_same(family):
    assert KERNEL is not None
    model = tiny.build_model(config=tiny.FAMILY_CONFIGS[family], dtype=torch.float32).eval()
    other = with_few_rows(model, KERNEL)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))
    idx = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(other(idx), model(idx), rtol=1e-4, atol=1e-5)


def test_without_a_compiler_or_with_one_that_fails_there_is_no_kernel(tmp_path, monkeypatch):
    load = load_few_rows.__wrapped__
    monkeypatch.setattr(few_rows, "COMPILERS", ("no-such-compiler",))
    assert load() is None
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(few_rows, "COMPILERS", (str(broken),))
    assert load() is None


@compiled
def test_the_compiled_file_is_kept_and_a_home_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    load = load_few_rows.__wrapped__
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load() is not None
    (kept,) = (tmp_path / "home").rglob("*.so")
    changed = kept.stat().st_mtime_ns
    assert load() is not None
    assert kept.stat().st_mtime_ns == changed
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert load() is not None
