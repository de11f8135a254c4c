"""The computed shuffle is an exact bijection and looks like a shuffle."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.corpus.shuffle import Permutation

GOLDEN_SMALL = [2, 7, 0, 3, 4, 5, 6, 1]
GOLDEN_LARGE = [561796968, 60608312, 181393083, 815107563]


def image(size: int, seed: int = 1, name: str = "web", epoch: int = 0) -> np.ndarray:
    return Permutation(size, seed, name, epoch)(np.arange(size))


@given(size=st.integers(0, 20_000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(image(size, seed, epoch=epoch)), np.arange(size))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 2**16 - 1, 2**16, 2**16 + 1, 1_000_003])
def test_is_a_bijection_at_the_edges_of_its_two_methods(size: int) -> None:
    assert np.bincount(image(size), minlength=size).tolist() == [1] * size


def test_any_part_can_be_asked_for_alone() -> None:
    permutation = Permutation(10_000_019, 3, "web", 2)
    whole = permutation(np.arange(5000))
    part = permutation(np.arange(4321, 4331).reshape(2, 5))
    assert np.array_equal(part.ravel(), whole[4321:4331])


def test_result_is_fixed_for_ever() -> None:
    """A resumed run continues an old one's order, so these numbers may never change."""
    assert image(8, seed=1234).tolist() == GOLDEN_SMALL
    assert Permutation(10**9, 1234, "web", 0)(np.arange(4)).tolist() == GOLDEN_LARGE


def test_seed_name_and_epoch_each_change_the_order() -> None:
    images = [image(9000), image(9000, seed=2), image(9000, name="code"), image(9000, epoch=1)]
    for one, other in itertools.combinations(images, 2):
        assert np.sum(one == other) < 12  # the expected number of agreements is 1


@pytest.mark.parametrize("bad", [[-1], [100], [5, 100]])
def test_index_outside_is_an_error(bad: list[int]) -> None:
    with pytest.raises(IndexError, match="from 0 to 99"):
        Permutation(100, 1, "web", 0)(np.array(bad))


def test_all_orders_of_a_few_elements_are_equally_likely() -> None:
    counts = Counter(tuple(image(4, seed=seed).tolist()) for seed in range(4800))
    assert len(counts) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 56  # 23 degrees of freedom: exceeded by chance once in 10,000


@pytest.mark.parametrize("size", [3000, 5000, 100_003])
def test_first_element_is_uniform_over_epochs(size: int) -> None:
    first = [int(Permutation(size, 7, "web", e)(np.zeros(1, int))[0]) for e in range(4000)]
    counts = np.bincount(np.array(first) * 40 // size, minlength=40)
    assert np.sum((counts - 100.0) ** 2 / 100) < 84  # 39 degrees of freedom, p = 3e-5


@pytest.mark.parametrize("size", [5000, 8192, 100_003, 2**17 + 1])
def test_neighbours_are_unrelated(size: int) -> None:
    positions, values = np.arange(size), image(size)
    noise = 4.5 / np.sqrt(size)  # 4.5 standard deviations
    assert abs(np.corrcoef(positions, values)[0, 1]) < noise
    for lag in (1, 2, 3, 64, 128):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < noise
    steps = np.diff(values) % size
    counts = np.bincount(steps * 50 // size, minlength=50)
    expected = (size - 1) / 50
    assert np.sum((counts - expected) ** 2 / expected) < 99  # 49 degrees of freedom, p = 3e-5


def test_two_dimensional_spread_is_even() -> None:
    """Pairs (position, value) fall evenly into a 16 x 16 grid, as a shuffle's do."""
    size = 2**16 + 7
    values = image(size)
    cells = (np.arange(size) * 16 // size) * 16 + values * 16 // size
    counts = np.bincount(cells, minlength=256)
    expected = size / 256
    assert np.sum((counts - expected) ** 2 / expected) < 320  # 225 degrees of freedom


def test_number_of_fixed_points_is_about_one() -> None:
    fixed = [int(np.sum(image(5000, epoch=epoch) == np.arange(5000))) for epoch in range(300)]
    assert 0.75 < np.mean(fixed) < 1.25  # Poisson with mean 1: 4.3 standard deviations
