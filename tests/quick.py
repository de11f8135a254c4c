"""The part of the tests that `bash tools/test.sh --quick` runs; prints it as arguments of pytest.

Most of it are unit tests: all files of `tests/unit` without SLOW_FILES and SLOW_TESTS. MULTI are
tests of several ranks: attention over a ring, the model, a whole run, a signal and a resume.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW_FILES = (
    "test_bench_infowindow.py",
    "test_fit.py",
    "test_fuzz.py",
    "test_growth_memory.py",
    "test_infowindow_codebook.py",
    "test_infowindow_tokenizer.py",
)
"""Files of `tests/unit` that need more than 12 s of processor time each."""
SLOW_TESTS = (
    "tests/unit/test_house_style.py::test_linters_are_content[words2]",  # mypy without its cache
    "tests/unit/test_hybrid.py::"
    "test_every_plan_is_valid_deterministic_and_no_better_than_the_bound",
)
"""Tests of other files that need as much."""
MULTI = (
    "tests/multi/test_model.py",
    "tests/multi/test_ring.py::test_a_ring_equals_dense_attention[2-float64-None-1e-10]",
    "tests/multi/test_ring.py::test_rings_on_some_of_the_ranks",
    "tests/multi/test_train.py::test_the_saved_config_rebuilds_the_run",
    "tests/multi/test_train.py::test_a_signal_saves_and_says_how_to_go_on",
)
"""Tests of several ranks."""


def arguments() -> list[str]:
    """What pytest is called with."""
    paths = sorted((ROOT / "tests" / "unit").glob("test_*.py"))
    unit = [path.relative_to(ROOT).as_posix() for path in paths if path.name not in SLOW_FILES]
    slow = [word for test in SLOW_TESTS for word in ("--deselect", test)]
    return ["-m", "not slow", *slow, *unit, *MULTI]


if __name__ == "__main__":
    print("\n".join(arguments()))
