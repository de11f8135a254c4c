"""The recipes fit the devices they are for, and their comments are what plan prints."""

import re

import pytest
import write_recipes
import yaml
from test_guides import check_overrides, commands_in, parsed
from write_recipes import GUIDE, ROOT, SUMMARY

from megascale.installation import given_or_example

PATHS = write_recipes.paths()
MISSING = "warning: start.checkpoint = {} is not there"


@pytest.fixture(scope="module")
def recipes():
    """All of them, planned without any corpus."""
    return {path: write_recipes.read(path) for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_fits_and_no_option_is_without_effect(recipes, path):
    recipe = recipes[path]
    config = yaml.safe_load(recipe.text)
    assert "-0.0%" not in recipe.plan
    verdicts = re.findall(r"^memory on \S+ +(.*?):", recipe.plan, re.MULTILINE)
    assert set(verdicts) == {"fits"} and len(verdicts) == 1 + ("growth" in config)
    warnings = [line for line in recipe.plan.splitlines() if line.startswith("warning")]
    starts = [config["start"]["checkpoint"]] if "start" in config else []
    assert len(warnings) == len(starts)
    for warning, start in zip(warnings, starts, strict=True):
        assert warning.startswith(MISSING.format(start)) and "# Plan warns where" in recipe.text


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_comment_has_what_plan_prints(recipes, path):
    recipe = recipes[path]
    assert recipe.text == recipe.should_be, "run python tools/write_recipes.py"
    assert recipe.text.count(f"{SUMMARY}memory on") == 1 + ("growth:" in recipe.text)
    for label in ("  step  ", "  MFU  ", "  days to "):
        assert f"\n{SUMMARY}{label}" in recipe.text


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_commands_in_the_comment_are_parsed(path, monkeypatch):
    text = path.read_text()
    comment = "\n".join(
        line.lstrip("# ") for line in text.splitlines() if re.match(r"# +megascale ", line)
    )
    commands = list(commands_in(comment))
    assert len(commands) >= 2
    for words in commands:
        check_overrides(parsed(words, monkeypatch))
    named = {word for words in commands for word in words if word.startswith("configs/")}
    assert named == {path.relative_to(ROOT).as_posix()}


def test_a_start_is_what_another_recipe_or_an_import_makes():
    trees = {path: yaml.safe_load(path.read_text()) for path in PATHS}
    made = {tree["run_dir"] for tree in trees.values()}
    assert len(made) == len(PATHS)
    for path, tree in trees.items():
        start = tree.get("start", {}).get("checkpoint")
        imports = re.findall(r"^# +megascale import \S+ (\S+)$", path.read_text(), re.MULTILINE)
        assert start is None or start in {*made, *imports}


def test_the_table_of_the_guide_has_the_recipes(recipes):
    assert GUIDE.read_text() == write_recipes.guide(list(recipes.values()))
    assert GUIDE.read_text().count("](recipes/") == len(PATHS)


def test_figures_that_differ_from_the_plan_are_seen(recipes):
    recipe = recipes[PATHS[0]]
    changed = recipe._replace(text=re.sub(r"(#  +MFU +)\d", r"\g<1>9", recipe.text))
    assert changed.text != changed.should_be == recipe.text


def test_a_recipe_is_found_where_only_the_package_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = PATHS[0].relative_to(ROOT)
    assert given_or_example(name) == PATHS[0]
    assert f"{name} is not here" in capsys.readouterr().err
