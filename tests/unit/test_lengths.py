"""Length distributions: exact sums, and the facts that they are named after."""

import numpy as np
import pytest

from megascale.errors import UserError
from megascale.simulate.lengths import DISTRIBUTIONS, draw_lengths

MANY = 2_000_000
UNCUT = 1 << 40


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tokens", [1, 4097, 3_000_000])
def test_the_sum_is_exact_and_the_context_a_limit(name: str, num_tokens: int) -> None:
    lengths = draw_lengths(name, num_tokens, 32768, seed=3)
    assert lengths.dtype == np.int64
    assert lengths.sum() == num_tokens
    assert lengths.min() >= 1
    assert lengths.max() <= 32768


def test_longer_documents_are_cut_at_the_context() -> None:
    whole, cut = (draw_lengths("github", None, most, 1, 5000) for most in (UNCUT, 4096))
    assert np.array_equal(cut, np.minimum(whole, 4096))
    assert whole.max() > 4096


def test_a_seed_names_a_batch_and_more_tokens_only_add_documents() -> None:
    few, more = (draw_lengths("byted", tokens, 1 << 21, seed=5) for tokens in (10**6, 10**8))
    assert np.array_equal(few[:-1], more[: len(few) - 1])
    assert np.array_equal(few, draw_lengths("byted", 10**6, 1 << 21, seed=5))
    assert not np.array_equal(few[:9], draw_lengths("byted", 10**6, 1 << 21, seed=6)[:9])


def test_a_number_of_sequences_can_be_asked_for_instead() -> None:
    assert len(draw_lengths("github", None, 1 << 17, 0, num_sequences=5000)) == 5000


@pytest.mark.parametrize(
    ("name", "median", "sigma"), [("github", 1100, 1.75), ("commoncrawl", 900, 1.2)]
)
def test_lognormal_medians_and_widths(name: str, median: int, sigma: float) -> None:
    lengths = draw_lengths(name, None, UNCUT, 0, num_sequences=MANY)
    assert np.median(lengths) == pytest.approx(median, rel=0.01)
    upper = np.quantile(lengths, 0.8413)
    assert np.log(upper / median) == pytest.approx(sigma, rel=0.01)


def test_byted_has_its_share_of_giants() -> None:
    lengths = draw_lengths("byted", None, UNCUT, 0, num_sequences=MANY)
    github = draw_lengths("github", None, UNCUT, 0, num_sequences=MANY)
    extra = (lengths >= 500_000).mean() - (github >= 500_000).mean()
    assert extra == pytest.approx(0.0005, rel=0.12)
    assert lengths[lengths < 4_000_000].max() > 3_900_000


def share_of_tokens(lengths: np.ndarray, at_least: int) -> float:
    return float(lengths[lengths >= at_least].sum() / lengths.sum())


def test_the_github_fact_of_bytescale() -> None:
    """9.8 % of tokens in documents over 256K; the lognormal gives 8.4 %."""
    lengths = draw_lengths("github", None, UNCUT, 0, num_sequences=MANY)
    assert share_of_tokens(lengths, 256 << 10) == pytest.approx(0.098, abs=0.02)


def test_the_byted_facts_of_bytescale() -> None:
    lengths = draw_lengths("bytescale_byted", None, UNCUT, 0, num_sequences=MANY)
    assert (lengths <= 4096).mean() == pytest.approx(0.8, rel=0.01)
    assert (lengths >= 128 << 10).mean() == pytest.approx(0.01, rel=0.05)
    assert (lengths >= 2 << 20).mean() == pytest.approx(0.0005, rel=0.1)
    assert share_of_tokens(lengths, 128 << 10) == pytest.approx(0.443, rel=0.05)
    assert share_of_tokens(lengths, 256 << 10) == pytest.approx(0.37, rel=0.05)
    assert share_of_tokens(lengths, 2 << 20) == pytest.approx(0.121, rel=0.1)


def test_bad_input_is_one_line_that_lists_what_is_known() -> None:
    with pytest.raises(UserError, match="did you mean github.*commoncrawl, byted"):
        draw_lengths("gihub", 10, 10, 0)
    with pytest.raises(UserError, match="must be >= 1"):
        draw_lengths("github", 10, 0, 0)
    with pytest.raises(UserError, match="must be >= 1"):
        draw_lengths("github", None, 10, 0)
