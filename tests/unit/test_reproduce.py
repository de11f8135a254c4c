"""What reproductions say of their runs: means over seeds, and who used which expert."""

import numpy as np
import pytest
from reproduce_continual import UNION, both, ways
from reproduce_growth import LAYERS, flops, speed_up
from reproduce_moe import BALANCES, _row, plot, report
from small_runs import in_parallel

SEEDS = [
    {
        "heldout": {"code": 1.0 + seed, "prose": 3.0 + seed},
        "max_violation": 0.5,
        "balance_loss": 1.1,
        "early_balance_loss": 1.2,
        "divergence_bits": 0.1 * seed,
    }
    for seed in (0, 1, 5)
]


def test_scores_are_means_over_domains_then_seeds():
    row = _row("micro", SEEDS)
    assert row["bits_per_byte"] == {"mean": pytest.approx(4.0), "least": 2.0, "most": 7.0}
    assert row["by_domain"]["code"]["mean"] == pytest.approx(3.0)
    assert row["divergence_bits"]["most"] == pytest.approx(0.5)


def test_the_table_has_a_line_for_each_balance():
    rows = [_row(name, SEEDS) for name in BALANCES]
    results = {"tokens": "1M", "seeds": 3, "domains": ["code", "prose"], "balances": rows}
    lines = list(report(results))
    assert [line.split("  ")[0] for line in lines[2:]] == list(BALANCES)
    assert all("4.0000 (2.0000 to 7.0000)" in line for line in lines[2:])


def test_speed_up_is_of_operations():
    scratch = np.array([[100.0, 3.0], [200.0, 2.5], [300.0, 2.0]])
    grown = np.array([[97.0, 2.6], [145.5, 2.2], [242.5, 1.8]])
    assert speed_up(grown, scratch) == pytest.approx(300 / 194 - 1)  # 54.6 %, as in the paper
    assert speed_up(scratch + 0.1, scratch) is None
    dips = np.array([[100.0, 1.9], [200.0, 2.1], [300.0, 1.9]])  # better for good from 250 on
    assert speed_up(dips, scratch) == pytest.approx(300 / 250 - 1)
    assert speed_up(np.array([[150.0, 1.0], [300.0, 0.9]]), scratch) == pytest.approx(1.0)


def test_a_small_model_costs_its_share_of_a_large_one():
    layer = flops(2) - flops(1)
    assert flops(LAYERS) == pytest.approx(flops(1) + (LAYERS - 1) * layer)
    assert flops(LAYERS) < LAYERS / 2 * flops(2)  # the head is paid once


def test_ways_to_go_on_replay_what_they_say():
    for shift, share in (("weak shift", 0.05), ("strong shift", 0.25)):
        parts = {way: part for way, (_, _, part) in ways(shift).items()}
        assert parts["re-warmed, 1 % replay"] == 0.01 and parts[UNION] == 0
        [infinite] = [part for way, part in parts.items() if way.startswith("infinite")]
        assert infinite == share
    assert both({"replay/python_stdlib": 1.0, "new": 2.0}, "new") == (1.0, 2.0)
    assert both({"python_stdlib": 1.0, "new": 2.0}, "new") == (1.0, 2.0)


def test_jobs_run_together_and_fail_at_the_first():
    assert in_parallel([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]

    def fails():
        raise SystemExit("no")

    with pytest.raises(SystemExit, match="no"):
        in_parallel([fails, lambda: 2])


def test_the_picture_is_drawn(tmp_path):
    shares = {name: np.full((2, 3, 8), 1 / 8) for name in BALANCES}
    plot(["code", "prose"], shares, tmp_path / "moe.png")
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")
