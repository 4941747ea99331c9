"""Which of several algorithms is taken, with times made up, and how it is kept for the next process."""

import math
from ctypes import c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.kept import Kept
from regpt.kernels.cublaslt import ProductPlan, Products, Tuned, Unsupported, check_status, fastest
from regpt.train.memory import is_out_of_memory


def test_those_far_behind_run_once_and_the_others_in_turn():
    times, calls = [3.0, 1.0, 1.1, 2.0], []

    def time(i: int, runs: int) -> float:
        calls.append((i, runs))
        return times[i]

    assert fastest(4, time) == 1
    assert calls == [(0, 1), (1, 1), (2, 1), (3, 1), *[(1, 4), (2, 4)] * 3]


def test_the_sum_of_the_rounds_decides_and_not_the_first_glance():
    seen = {0: [1.0, 1.3, 1.3, 1.3], 1: [1.2, 1.1, 1.1, 1.4]}
    assert fastest(2, lambda i, runs: seen[i].pop(0)) == 1


def test_one_candidate_without_a_rival_is_not_timed_again():
    calls = []
    assert fastest(2, lambda i, runs: calls.append(i) or [9.0, 1.0][i]) == 1
    assert calls == [0, 1]


def test_one_that_the_library_does_not_support_after_all_is_left_out():
    calls = []
    assert fastest(3, lambda i, runs: calls.append((i, runs)) or [math.inf, 2.0, 2.1][i]) == 1
    assert calls == [(0, 1), (1, 1), (2, 1), *[(1, 2), (2, 2)] * 3]
    with pytest.raises(RuntimeError, match="supports none of the algorithms"):
        fastest(2, lambda i, runs: math.inf)


def test_a_status_says_what_it_means():
    check_status(0, "cublasLtMatmul")
    with pytest.raises(Unsupported, match="cublasLtMatmul failed with cuBLAS status 15"):
        check_status(15, "cublasLtMatmul")
    with pytest.raises(RuntimeError) as raised:
        check_status(3, "cublasLtMatmul")
    assert is_out_of_memory(raised.value)
    with pytest.raises(RuntimeError) as raised:
        check_status(13, "cublasLtMatmul")
    assert not is_out_of_memory(raised.value)


class Proposing(Products):
    """Whose library proposes algorithms and runs none: each trial adds 1 to the output."""

    def __init__(self, times: list[float | Exception]):
        def propose(*arguments) -> int:
            found, count = arguments[-2], arguments[-1]._obj
            for i in range(len(times)):
                found[i].state, found[i].algorithm.data[0] = 0, i
            count.value = len(times)
            return 0

        def done(*arguments) -> int:
            return 0

        self.lib = SimpleNamespace(
            cublasLtMatmulPreferenceCreate=done,
            cublasLtMatmulPreferenceSetAttribute=done,
            cublasLtMatmulPreferenceDestroy=done,
            cublasLtMatmulAlgoGetHeuristic=propose,
        )
        self.tune, self.handle, self.times, self.written = True, c_void_p(), times, []

    def time(self, plan, algorithm, runs, a, b, out, add, scale) -> float:
        self.written.append((out.data_ptr(), None if add is None else add.data_ptr()))
        out += 1
        found = self.times[algorithm.data[0]]
        if isinstance(found, Exception):
            raise found
        return found


def misaligned() -> torch.Tensor:
    """(8, 8), whose first number is 4 bytes into its memory."""
    return torch.zeros(65)[1:].view(8, 8)


@pytest.mark.parametrize("place", ["a", "b", "out", "aux", "add"])
@pytest.mark.parametrize("view", [lambda: torch.zeros(8, 24)[:, :8], lambda: torch.zeros(8, 8).t(), misaligned])
def test_an_operand_of_other_strides_or_alignment_than_a_plan_assumes_is_refused(place, view):
    given = {name: torch.zeros(8, 8) for name in ("a", "b", "out", "aux", "add")}
    with pytest.raises(AssertionError, match="contiguous, aligned"):
        Products.__call__(SimpleNamespace(), **given | {place: view()})  # type: ignore[arg-type]


@pytest.fixture
def without_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def chosen(products: Products, out: torch.Tensor, add: torch.Tensor | None) -> int:
    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    return products.choose(ProductPlan(c_void_p(), [c_void_p()] * 4), a, b, out, add, None).data[0]


@pytest.mark.usefixtures("without_device")
def test_trials_do_not_write_to_what_is_accumulated():
    products, out = Proposing([3.0, 1.0, math.inf]), torch.full((2, 4), 5.0)
    assert chosen(products, out, out) == 1
    assert torch.equal(out, torch.full((2, 4), 5.0))
    assert all(place == added != out.data_ptr() for place, added in products.written)
    residual = torch.zeros(2, 4)
    assert chosen(products, out, residual) == 1
    assert products.written[-1] == (out.data_ptr(), residual.data_ptr())
    assert not residual.any()


@pytest.mark.usefixtures("without_device")
def test_a_trial_that_loses_the_device_is_named():
    products = Proposing([1.0, torch.AcceleratorError("CUDA error: unspecified launch failure")])
    with pytest.raises(torch.AcceleratorError) as raised:
        chosen(products, torch.zeros(2, 4), None)
    assert raised.value.__notes__ == ["in a trial of cuBLASLt's algorithm 1 of 2 for (2, 3) by (3, 4), torch.float32"]


def test_bytes_are_kept_for_their_key_and_device_only(tmp_path: Path):
    key = ((3, 4), True, None)
    Tuned("one device", lambda name: Kept(tmp_path / name)).put(key, b"fast")
    again = Tuned("one device", lambda name: Kept(tmp_path / name))
    assert again.get(((3, 4), True, None)) == b"fast"
    assert again.get(((3, 5), True, None)) is None
    assert Tuned("another", lambda name: Kept(tmp_path / name)).get(key) is None
    again.put(key, b"faster")
    assert again.get(key) == b"faster"
    assert all(int(path.name, 16) >= 0 for path in tmp_path.iterdir())  # Triton wants hexadecimal names


def test_damaged_bytes_are_as_good_as_none(tmp_path: Path):
    tuned = Tuned("a device", lambda name: Kept(tmp_path / name))
    tuned.put(1, b"fast")
    (path,) = tmp_path.glob("*/*")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], bytes([*whole[:-1], whole[-1] ^ 1]), whole + b"x"):
        path.write_bytes(damaged)
        assert tuned.get(1) is None
    path.write_bytes(whole)
    assert tuned.get(1) == b"fast"
