"""What reproductions say of their runs: means over seeds, and who used which expert."""

import numpy as np
import pytest
from reproduce import BALANCES, _row, plot, report

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
    assert all("4.0000 (2.0000-7.0000)" in line for line in lines[2:])


def test_the_picture_is_drawn(tmp_path):
    shares = {name: np.full((2, 3, 8), 1 / 8) for name in BALANCES}
    plot(["code", "prose"], shares, tmp_path / "moe.png")
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")
