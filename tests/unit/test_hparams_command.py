"""`megascale hparams`: what it prints is what the laws give, and bad input is one line."""

import json

import pytest

from megascale import cli
from megascale.optim import growth_law, steplaw


def hparams(words: str, capsys) -> str:
    assert cli.main(["hparams", *words.split()]) == 0
    return capsys.readouterr().out


def test_the_step_law(capsys) -> None:
    text = hparams("steplaw --params 1B --tokens 100B", capsys)
    assert "for 1,000,000,000 parameters without vocabulary, 100,000,000,000 tokens" in text
    assert "  optim.lr                  0.001632 = " in text
    assert "  optim.min_lr              1e-05 " in text
    assert f"  data.global_batch_tokens  {steplaw.batch_tokens(10**11):,} = " in text
    assert "  fitted on                 60M to 1.1B parameters and 2B to 100B tokens" in text
    assert "warning" not in text


def test_beyond_the_fit_is_a_warning(capsys) -> None:
    for words in ("--params 7B --tokens 100B", "--params 1B --tokens 2T"):
        assert "warning: outside of where" in hparams(f"steplaw {words}", capsys)
    text = hparams("steplaw --params 2150M --tokens 8B --moe", capsys)
    assert "of all experts" in text and "2.2B parameters" in text and "warning" not in text


def test_the_step_law_as_json(capsys) -> None:
    value = json.loads(hparams("steplaw --params 7B --tokens 1.4T --json", capsys))
    assert value == {
        "parameters": 7 * 10**9,
        "tokens": 14 * 10**11,
        "lr": steplaw.peak_lr(7 * 10**9, 14 * 10**11),
        "min_lr": 1e-5,
        "global_batch_tokens": steplaw.batch_tokens(14 * 10**11),
        "is_fitted": False,
    }


def test_growth(capsys) -> None:
    text = hparams("growth --target-params 7B --tokens 2T --layers 32", capsys)
    for line in (
        "growth factor         4, for all sizes (a fit that the paper calls weak gives 19.1)",
        "depth of the base     8 layers",
        "tokens for the base   11.11B",
        "which costs           2.778B tokens of the target, 0.14%",
        "compute               8.4e+22 FLOPs",
    ):
        assert f"  {line}" in text
    assert "1/4 of the target's layers" in hparams("growth --target-params 7B --tokens 2T", capsys)


def test_growth_as_json(capsys) -> None:
    value = json.loads(hparams("growth --target-params 8B --tokens 15T --layers 24 --json", capsys))
    assert value["base_tokens"] == growth_law.base_tokens(8 * 10**9, 15 * 10**12)
    assert (value["growth_factor"], value["base_layers"]) == (4, 6)
    assert value["compute_flops"] == 6 * 8e9 * 15e12


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("steplaw --params 0 --tokens 1B", "--params must be at least 1, not 0"),
        ("steplaw --params -5 --tokens 1B", "--params must be a whole number such as 4096"),
        ("steplaw --params 1B --tokens many", "--tokens must be a whole number"),
        ("steplaw --params 1B --tokens 99999999T", "--tokens must be at most"),
        ("steplaw --params 1000000T --tokens 1B", "no higher than its last rate 1e-05"),
        ("growth --target-params 7B --tokens 0", "--tokens must be at least 1, not 0"),
        ("growth --target-params -7 --tokens 2T", "--target-params must be a whole number"),
        ("growth --target-params 1 --tokens 1", "no fewer than the target"),
        ("growth --target-params 1M --tokens 1B", "such as --target-params 410M --tokens 100B"),
        ("growth --target-params 7B --tokens 2T --layers 30", "a multiple of 4; 32 is"),
        ("growth --target-params 7B --tokens 2T --layers 0", "--layers must be at least 1"),
    ],
)
def test_bad_input_is_one_line(words: str, hint: str, capsys) -> None:
    assert cli.main(["hparams", *words.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert hint in shown.err


def test_the_example_of_the_error_works(capsys) -> None:
    assert "7.018B" in hparams("growth --target-params 410M --tokens 100B", capsys)
