"""Which of several algorithms is taken, with times made up."""

from regpt.kernels.cublaslt import fastest


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
