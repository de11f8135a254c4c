"""Fitting a cost model: known coefficients come back, and what cannot be told is named."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import tiny_config

from megascale import cli
from megascale.planner import CostModel
from megascale.planner.fit import (
    Measurement,
    _solve,
    _Table,
    fit_cost,
    fit_table,
    least_squares_not_negative,
    write_cost,
)

TRUE = CostModel(
    a=3e-8,
    b=4e-5,
    fixed=5e-3,
    latency=6e-3,
    transfer_intra=4e-6,
    transfer_inter=9e-5,
    prefix_intra=4e-6,  # what passes again takes what it takes the first time
    prefix_inter=9e-5,
    node_size=2,
)
LENGTHS = (128, 256, 512, 1024, 2048)


def measured(cost, lengths, size, one_node=True, noise=()):
    tokens = np.array(lengths, dtype=float)
    seconds = float(cost.seconds((tokens**2).sum(), tokens.sum(), size, one_node))
    return Measurement(
        tuple(lengths), size, one_node, tuple(seconds * (1 + one) for one in noise or (0.0,))
    )


def measured_grid(cost, sizes=(1, 2, 3, 4), lengths=LENGTHS, across=(), noise=None):
    """Single sequences and packs; `noise()` gives the relative errors of the repeats."""
    found = [measured(cost, (), 1, noise=noise and noise())] if 1 in sizes else []
    for size, length in itertools.product(sizes, lengths):
        packs = [(length,), (length,) * (2048 * size // length)]
        for pack in dict.fromkeys(packs):
            found.append(measured(cost, pack, size, size not in across, noise and noise()))
    return found


def coefficients(cost):
    return {name: getattr(cost, name) for name in CostModel.__dataclass_fields__}


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), columns=st.integers(1, 5), rows=st.integers(1, 12))
def test_no_set_of_columns_gives_a_better_solution(seed, columns, rows):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(rows, columns)) * 10.0 ** generator.integers(-6, 6, columns)
    target = generator.normal(size=rows)
    found = least_squares_not_negative(matrix, target)
    assert (found >= 0).all()
    best = np.linalg.norm(target)
    for chosen in itertools.product([False, True], repeat=columns):
        part = matrix[:, chosen] / np.linalg.norm(matrix[:, chosen], axis=0)
        solution = np.linalg.lstsq(part, target, rcond=None)[0]
        if (solution >= 0).all():
            best = min(best, np.linalg.norm(part @ solution - target))
    assert np.linalg.norm(matrix @ found - target) <= best * (1 + 1e-9) + 1e-12


def test_exact_times_give_exact_coefficients():
    fit = fit_cost(measured_grid(TRUE, across=(3, 4)), node_size=2)
    for name, value in coefficients(TRUE).items():
        assert getattr(fit.cost, name) == pytest.approx(value, rel=1e-6), name
    assert np.abs(fit.errors).max() < 1e-6 and np.abs(fit.left_out_errors).max() < 1e-5
    assert fit.unidentified == fit.copied == () and fit.is_good


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    scale=st.lists(st.floats(0.3, 3.0), min_size=4, max_size=4),
)
def test_noisy_times_give_nearly_the_coefficients(seed, scale):
    """3 % of noise; a, b and what starting takes stand out in some of the grid."""
    true = replace(
        TRUE,
        a=TRUE.a * scale[0],
        b=TRUE.b * scale[1],
        fixed=TRUE.fixed * scale[2],
        latency=TRUE.latency * scale[3],
    )
    generator = np.random.default_rng(seed)
    grid = measured_grid(true, noise=lambda: tuple(generator.normal(0, 0.03, 5)))
    fit = fit_cost(grid, node_size=4)
    for name in ("a", "b", "fixed", "latency"):
        assert getattr(fit.cost, name) == pytest.approx(getattr(true, name), rel=0.25), name
    assert np.median(np.abs(fit.left_out_errors)) < 0.04 and fit.is_good


def test_a_single_disturbed_measurement_changes_little():
    grid = measured_grid(TRUE)
    grid[7] = replace(grid[7], seconds=tuple(3 * one for one in grid[7].seconds))
    fit = fit_cost(grid, node_size=4)
    for name in ("a", "b", "fixed", "latency"):
        assert getattr(fit.cost, name) == pytest.approx(getattr(TRUE, name), rel=0.03), name
    assert fit.errors[7] == pytest.approx(1 / 3 - 1, abs=0.02)


def test_on_a_busy_machine_the_fastest_repeats_tell():
    generator = np.random.default_rng(0)
    grid = measured_grid(TRUE, noise=lambda: (0.0, *generator.exponential(1.0, 4)))
    fit = fit_cost(grid, node_size=4, quantile=0.0)
    assert fit.cost.a == pytest.approx(TRUE.a, rel=1e-6) and np.abs(fit.errors).max() < 1e-6
    assert np.abs(fit_cost(grid, node_size=4).errors).max() > 0.1


def noisy(true, noise, seed, **grid):
    """Fit of a grid with normal noise, five repeats of each measurement."""
    generator = np.random.default_rng(seed)
    draw = lambda: tuple(generator.normal(0, noise, 5))  # noqa: E731
    return fit_cost(measured_grid(true, noise=draw, **grid), node_size=4).cost


@pytest.mark.parametrize("noise", [0.005, 0.01, 0.03])
def test_noise_alone_is_no_passing(noise):
    """True pass 0: at most 1 fit of 100 may find one; here 1 of 16, of 8 within a node and 8 with
    rings across nodes too."""
    found = [noisy(TRUE, noise, seed) for seed in range(8)]
    found += [noisy(TRUE, noise, seed, across=(3, 4)) for seed in range(8)]
    assert sum(cost.pass_intra > 0 or cost.pass_inter > 0 for cost in found) <= 1
    assert fit_cost(measured_grid(TRUE), node_size=4).cost.pass_intra == 0.0


@pytest.mark.parametrize("noise, exact", [(0.0, 0.01), (0.01, 0.1), (0.03, 0.25)])
@pytest.mark.parametrize("passing", [5e-6, 2e-5])
def test_passing_that_attention_does_not_hide_is_found(passing, noise, exact):
    """A term that takes up to 10 % and 40 % of the time of a ring; all terms come back."""
    true = replace(TRUE, transfer_intra=0.0, pass_intra=passing)
    for seed in range(4 if noise else 1):
        cost = noisy(true, noise, seed)
        assert cost.pass_intra == pytest.approx(passing, rel=exact)
        for name in ("a", "b", "fixed", "latency"):
            assert getattr(cost, name) == pytest.approx(getattr(true, name), rel=exact), name
        assert cost.transfer_intra < exact * true.b


def test_few_measurements_are_no_evidence_of_passing():
    """As many terms as measurements: whatever fits best could be noise."""
    true = replace(TRUE, transfer_intra=0.0, pass_intra=2e-5)
    grid = measured_grid(true, sizes=(1, 2), lengths=(128, 2048))[:5]
    assert fit_cost(grid, node_size=4).cost.pass_intra == 0.0


def test_the_loss_is_hubers():
    """Squares of small errors, the tangent from the bend on; never below 0."""
    grid = measured_grid(TRUE, noise=lambda: (0.01,))
    grid[3] = measured(TRUE, grid[3].lengths, grid[3].size, noise=(1.0,))
    table = _Table.of(grid, 0.5)
    solved = _solve(table, (0.0, 0.0), bend=0.05)
    error = np.abs(table.columns((0.0, 0.0)) @ solved.found / table.seconds - 1)
    by_hand = sum(e * e if e < 0.05 else 0.05 * (2 * e - 0.05) for e in error.tolist())
    assert solved.loss == pytest.approx(by_hand) and 0 < by_hand < (error**2).sum()


def test_what_no_ring_measured_across_nodes_is_copied():
    fit = fit_cost(measured_grid(TRUE), node_size=4)
    assert fit.cost.transfer_inter == fit.cost.transfer_intra > 0
    assert fit.copied == ("transfer_inter", "pass_inter") and fit.unidentified == ()
    assert fit.cost.node_size == 4


@pytest.mark.parametrize(
    "grid, unidentified",
    [
        (
            [measured(TRUE, (512,), 1)],
            {"a", "fixed", "latency", "transfer_intra"},
        ),
        (measured_grid(TRUE, sizes=(1,)), {"latency", "transfer_intra"}),
        (
            [measured(TRUE, (512,), size) for size in (2, 2, 2)],
            {"a", "fixed", "latency", "transfer_intra"},
        ),
        ([measured(TRUE, (), 1)], {"a", "b", "latency", "transfer_intra"}),
    ],
    ids=["one-length", "one-rank", "one-ring-size", "empty"],
)
def test_a_poor_grid_names_what_it_cannot_tell(grid, unidentified):
    fit = fit_cost(grid, node_size=1)
    assert set(fit.unidentified) == unidentified
    values = coefficients(fit.cost)
    assert all(np.isfinite(value) and value >= 0 for value in values.values())
    assert all(values[name] == 0 for name in unidentified)
    assert np.abs(fit.errors).max() < 1e-6
    assert len(fit_table(grid, fit)) == len(grid) + 1


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 5000), max_size=4),
            st.integers(1, 5),
            st.booleans(),
            st.floats(1e-6, 1e3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_measurements_give_finite_coefficients(grid):
    measurements = [Measurement(tuple(one[0]), *one[1:3], (one[3],)) for one in grid]
    fit = fit_cost(measurements, node_size=3)
    assert all(np.isfinite(v) and v >= 0 for v in coefficients(fit.cost).values())
    assert np.isfinite(fit.predicted_s).all() and np.isfinite(fit.left_out_s).all()


def test_times_must_be_above_0():
    for bad in ([], [Measurement((5,), 1, True, (0.0,))]):
        with pytest.raises(ValueError, match="more than 0 s"):
            fit_cost(bad, node_size=1)


def test_the_file_is_read_back(tmp_path):
    path = tmp_path / "COST.json"
    write_cost(TRUE, path)
    assert CostModel.load(path) == TRUE
    assert set(json.loads(path.read_text())) == set(coefficients(TRUE)) - {"calibrated"}


CONFIG = """
run_dir: run
model: {num_layers: 2, hidden_size: 32, num_heads: 4, vocab_size: 64}
data: {sources: {none: {path: none}}, context_tokens: 256}
train: {precision: fp32, tokens: 10000}
"""


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--lengths", "12,x"], "--lengths 12,x: give whole numbers"),
        (["--lengths", "0"], "--lengths 0: give whole numbers"),
        (["--lengths", "64,512"], "--lengths: 512 tokens"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--minutes", "-1"], "--minutes -1: must be above 0"),
        (["--minutes", "nan"], "argument --minutes: nan is no finite number"),
        (
            ["--out", "missing/COST.json"],
            "COST.json: cannot be made: no folder missing",
        ),
        (["--plot", "fit.txt"], "--plot fit.txt: must end in"),
        (["model.vocab_size=null"], "set model.vocab_size, which needs no corpus"),
    ],
)
def test_bad_input_of_calibrate_is_one_line(words, problem, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert cli.main(["calibrate", "run.yaml", *words]) == 2
    shown = capfd.readouterr().err
    assert problem in shown and shown.count("\n") == 1
    assert not (tmp_path / "COST.json").exists()


def test_a_run_is_planned_with_measured_costs(tmp_path, capsys):
    config, cost = str(tiny_config(tmp_path)), tmp_path / "COST.json"
    slow, out = replace(TRUE, b=1.0), tmp_path / "plan.json"
    write_cost(slow, cost)
    words = ["plan", config, f"planner.cost={cost}", "planner.name=static", "--json", str(out)]
    assert cli.main(words) == 0
    seconds = json.loads(out.read_text())["predicted_s"]
    assert seconds > 1024 * slow.b
    assert f"({seconds:.4g} s, calibrated cost)" in capsys.readouterr().out
    assert cli.main([*words[:2], *words[3:]]) == 0
    assert "(uncalibrated cost)" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", '{"a": 1}'])
def test_a_bad_cost_file_of_a_run_is_one_line(text, tmp_path, capsys):
    config, cost = str(tiny_config(tmp_path)), tmp_path / "COST.json"
    if text is not None:
        cost.write_text(text)
    assert cli.main(["plan", config, f"planner.cost={cost}"]) == 2
    shown = capsys.readouterr().err
    assert f"planner.cost: cost file {cost}" in shown and shown.count("\n") == 1
    assert "megascale calibrate writes one" in shown
