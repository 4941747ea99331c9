"""Scaling laws: what is fitted to losses of a known law is that law, and the uncertainty is honest."""

import json
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from run_files import CONFIG, ENV, train_row, val_row
from scipy.optimize import approx_fprime, minimize

from regpt.cli.scaling import main
from regpt.errors import UsageError, UserError
from regpt.report.read import read_run
from regpt.report.scaling import HUBER, Point, ScalingLaw, doubts_about, errors, fit, jacobian, points_of

CHINCHILLA = ScalingLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, equation 10
SIZES, LENGTHS = (1e7, 4e7, 1.2e8, 3.5e8), (3e8, 1e9, 3e9, 1e10)


def points(law=CHINCHILLA, noise=0.0, seed=0, sizes=SIZES, lengths=LENGTHS):
    draw = np.random.default_rng(seed)
    return [Point("", n, d, 6 * n * d, law.loss(n, d) * exp(draw.normal(0, noise))) for n in sizes for d in lengths]


def test_a_law_is_found_again_in_its_own_losses():
    found = fit(points(), bootstrap=0)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(CHINCHILLA, name), rel=1e-4)
    assert found.residual < 1e-8
    assert not found.warnings


def logs(given):
    return [np.log([getattr(point, key) for point in given]) for key in ("parameters", "tokens", "loss")]


def summed_huber(law: ScalingLaw, given) -> float:
    """What the fit minimises, by hand."""
    total = 0.0
    for point in given:
        error = abs(log(law.loss(point.parameters, point.tokens)) - log(point.loss))
        total += error**2 / 2 if error <= HUBER else HUBER * (error - HUBER / 2)
    return total


@pytest.mark.parametrize("noise", [0.0005, 0.005])
def test_no_other_method_finds_a_lower_minimum(noise):
    """Nelder and Mead's simplex, from the fit and from the true law, on the objective written by hand."""
    given = points(noise=noise)

    def objective(theta):
        return 1e6 * summed_huber(ScalingLaw(exp(theta[2]), exp(theta[0]), exp(theta[1]), theta[3], theta[4]), given)

    law = fit(given, bootstrap=0).law
    for start in (law, CHINCHILLA):
        theta = [log(start.A), log(start.B), log(start.E), start.alpha, start.beta]
        other = minimize(objective, theta, method="Nelder-Mead", options={"maxiter": 4000, "maxfev": 4000})
        assert 1e6 * summed_huber(law, given) <= other.fun * (1 + 1e-4)


def test_one_wrong_loss_hardly_moves_the_law():
    given = points(noise=0.0005)
    given[5] = replace(given[5], loss=given[5].loss * 1.2)
    found = fit(given, bootstrap=0)
    assert found.law.loss(1e9, 2e10) == pytest.approx(CHINCHILLA.loss(1e9, 2e10), rel=0.01)


def test_the_derivatives_are_those_of_the_errors():
    n, d, y = logs(points(noise=0.01))
    for theta in ([5.0, 6.0, 0.5, 0.3, 0.3], [10.0, 0.0, -1.0, 1.0, 0.1]):
        numeric = approx_fprime(theta, lambda x: errors(x, n, d, y))
        np.testing.assert_allclose(jacobian(np.array(theta), n, d, y), numeric, atol=1e-5)


@pytest.mark.slow
def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    """Predictions of ten fits at a point beyond their data; by chance two of ten would miss once in twelve."""
    hits = 0
    for seed in range(10):
        found = fit(points(noise=0.003, seed=seed, sizes=SIZES[:3], lengths=LENGTHS[:3]), bootstrap=60)
        _, interval = found.predict(1e9, 3e10)
        assert interval is not None
        hits += interval[0] <= CHINCHILLA.loss(1e9, 3e10) <= interval[1]
    assert hits >= 8


def test_noise_widens_the_interval():
    widths = []
    for noise in (0.001, 0.01):
        interval = fit(points(noise=noise), bootstrap=40).interval("E")
        assert interval is not None
        widths.append(interval[1] - interval[0])
    assert widths[1] > 3 * widths[0]


def test_the_optimum_is_the_lowest_loss_for_its_flops():
    flops = 1e20
    parameters, tokens = CHINCHILLA.optimum(flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    best = CHINCHILLA.loss(parameters, tokens)
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert CHINCHILLA.loss(parameters * factor, tokens / factor) > best


@pytest.mark.parametrize(
    ("sizes", "lengths"), [(SIZES[:2], LENGTHS), (SIZES, LENGTHS[:2]), (SIZES[:1], LENGTHS[:1])], ids=str
)
def test_too_few_sizes_or_lengths_are_refused(sizes, lengths):
    with pytest.raises(UserError, match=r"do not determine; give at least 6, of 3 sizes and 3 numbers of tokens"):
        fit(points(sizes=sizes, lengths=lengths))


@pytest.mark.parametrize(("sizes", "lengths", "helps"), [(SIZES, LENGTHS[:2], True), (SIZES[:2], LENGTHS, False)])
def test_more_validations_are_advised_only_where_numbers_of_tokens_are_missing(sizes, lengths, helps):
    with pytest.raises(UserError) as refused:
        fit(points(sizes=sizes, lengths=lengths), more=", or --points all")
    assert ("--points all" in str(refused.value)) is helps


def test_what_the_points_do_not_determine_is_a_warning():
    narrow = fit(points(noise=0.001, sizes=(1e8, 1.2e8, 1.5e8)), bootstrap=0)
    assert "the model sizes differ by less than a factor of four" in narrow.warnings
    flat = ScalingLaw(E=2.0, A=1e-9, B=400.0, alpha=0.3, beta=0.3)  # a loss that does not depend on the size
    assert any("do not determine" in warning for warning in fit(points(flat), bootstrap=0).warnings)
    noisy = fit(points(noise=0.03, sizes=SIZES[:3], lengths=LENGTHS[:3]), bootstrap=20)
    assert any("do not determine" in warning for warning in noisy.warnings)


# ---- runs


def scaling_run(make_run, n_embd: int, steps: int, law=CHINCHILLA, name="", **env):
    """A run whose validation losses lie on the law: after half its steps, and at its end."""
    parameters = 1000 * n_embd**2
    batch_tokens = 1_000_000

    def loss(step):
        return law.loss(parameters, batch_tokens * step)

    rows = [train_row(step, tokens=batch_tokens * step, flops=1e15 * step) for step in (1, steps // 2, steps)]
    rows += [val_row(0, 11.0), val_row(steps // 2, loss(steps // 2)), val_row(steps, loss(steps))]
    config = CONFIG.replace("n_embd = 64", f"n_embd = {n_embd}\nvocab_size = 1000\nmax_seq_len = 24")
    return make_run(
        rows=rows, config=config, env=ENV | {"parameters": parameters} | env, name=name or f"w{n_embd}-s{steps}"
    )


@pytest.fixture
def grid(make_run):
    return [str(scaling_run(make_run, n_embd, steps)) for n_embd in (64, 256, 1024) for steps in (100, 1000, 10000)]


def test_a_run_is_one_point_at_its_last_validation(make_run):
    run = read_run(scaling_run(make_run, 64, 100))
    (point,), unit = points_of([run])
    assert (point.parameters, point.tokens, point.flops, unit) == (4_096_000, 1e8, 1e17, "nats per token")
    assert point.loss == CHINCHILLA.loss(4_096_000, 1e8)
    assert [one.tokens for one in points_of([run], "all")[0]] == [5e7, 1e8]
    run.config["optim"] = {"warmup_steps": 50}
    assert [one.tokens for one in points_of([run], "all")[0]] == [1e8]


def test_a_run_validated_only_in_its_warmup_is_said_to_be(make_run):
    config = CONFIG + "[optim]\nwarmup_steps = 50\n"
    run = read_run(make_run(rows=[train_row(20, tokens=1e6), val_row(20, 3.0)], config=config, name="a"))
    assert len(points_of([run])[0]) == 1
    with pytest.raises(UserError, match="run 'a' has no validation loss after its warmup of 50 steps; leave it out"):
        points_of([run], "all")


def test_embeddings_can_be_left_out(make_run):
    (point,), _ = points_of([read_run(scaling_run(make_run, 64, 100))], count="non-embedding")
    assert point.parameters == 4_096_000 - (1000 + 24) * 64


def test_runs_of_different_tokenizers_are_fitted_in_bits_per_byte(make_run):
    runs = [read_run(scaling_run(make_run, 64, 100, name=name, data={"tokenizer": name})) for name in "ab"]
    found, unit = points_of(runs)
    assert unit == "bits per byte"
    assert found[0].loss == CHINCHILLA.loss(4_096_000, 1e8) / 4


def test_a_run_that_lacks_what_a_point_needs_is_named(make_run):
    with pytest.raises(UserError, match=r"run 'a' has no validation loss after its first step"):
        points_of([read_run(make_run(rows=[train_row(1), val_row(0, 8.0)], name="a"))])
    with pytest.raises(UserError, match=r"run 'b' does not say how many parameters"):
        points_of([read_run(make_run(env={}, name="b"))])
    with pytest.raises(UserError, match=r"run 'c' does not say how many tokens it read"):
        points_of(
            [
                read_run(
                    make_run(rows=[train_row(1, tokens=None), val_row(1, 8.0)], env=ENV | {"parameters": 9}, name="c")
                )
            ]
        )


def test_the_command_writes_the_law_and_the_picture(grid, tmp_path, capsys):
    law, picture = tmp_path / "law.json", tmp_path / "law.png"
    args = [*grid, "--json", str(law), "--out", str(picture), "--bootstrap", "3"]
    assert main([*args, "--parameters", "1e9", "--tokens", "2e10"]) == 0
    said = capsys.readouterr().out
    expected = CHINCHILLA.loss(1e9, 2e10)
    assert f"a run of 1.00B parameters on 20.0B tokens: {expected:.4f} nats per token" in said
    found = json.loads(law.read_text(encoding="utf-8"))
    assert found["form"] == "chinchilla"
    for name in ("E", "A", "B", "alpha", "beta"):
        assert found[name] == pytest.approx(getattr(CHINCHILLA, name), rel=1e-3)
    assert found["prediction"]["loss"] == pytest.approx(expected)
    assert len(found["points"]) == 9
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_alone_goes_to_the_terminal(grid, tmp_path, capsys):
    assert main([*grid, "--json", "-", "--bootstrap", "0", "--out", str(tmp_path / "law.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prediction"] is None
    assert found["intervals"]["E"] is None
    assert "<svg" in (tmp_path / "law.svg").read_text(encoding="utf-8")


def test_an_unfinished_run_is_said_to_be(grid, make_run, capsys):
    short = scaling_run(make_run, 128, 20)  # of 40
    assert main([*grid, str(short), "--json", "-", "--bootstrap", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"][0].startswith(
        "run 'w128-s20' is unfinished (20 of 40 steps): where the learning rate decays"
    )
    assert doubts_about([read_run(short)], "all") == []


@pytest.mark.parametrize(
    ("env", "origin"),
    [
        ({"init_from": "gpt2"}, "--init-from gpt2"),
        ({"parent": {"checkpoint": "a/checkpoints/step-00000002"}}, "--fork-from a/checkpoints/step-00000002"),
    ],
)
def test_a_run_that_began_with_trained_weights_is_doubted(make_run, env, origin):
    run = read_run(scaling_run(make_run, 64, 40, **env))
    for points in ("final", "all"):
        (doubt,) = doubts_about([run], points)
        assert f"began with trained weights ({origin})" in doubt


def test_a_recipe_can_be_predicted(grid, capsys):
    assert main([*grid, "--predict", "gpt2-124m", "--bootstrap", "0", "--json", "-"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert (prediction["parameters"], prediction["tokens"]) == (124_439_808, 19073 * 524_288)
    assert main([*grid, "--predict", "gpt2-124m", "--tokens", "1e9", "--bootstrap", "0", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["tokens"] == 1e9


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--parameters", "1e9"], "needs --parameters and --tokens"),
        (["--parameters", "0", "--tokens", "1"], "must be above 0"),
        (["--parameters", "1", "--tokens", "nan"], "--tokens is nan, must be above 0"),
        (["--predict", "gpt2-124m", "--parameters", "1"], "give one of them"),
        (["--bootstrap", "-1"], "must be 0 or more"),
        (["--out", "law.pdf"], r"\.png or \.svg"),
    ],
)
def test_bad_arguments_are_one_sentence(grid, args, words):
    with pytest.raises(UsageError, match=words):
        main([*grid, *args])


def test_one_run_is_not_enough(make_run):
    with pytest.raises(UsageError, match="several runs"):
        main([str(make_run())])


def test_the_published_law():
    """Chinchilla, 70 billion parameters and 1.4 trillion tokens: about 1.94 nats by their own fit."""
    assert CHINCHILLA.loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)
