"""The guides: links, pictures, commands, options and paths in them are those of the project."""

import gzip
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import picture
import pytest
import quick
import write_guides
import yaml
from tiny_corpus import tiny_config

from megascale import cli
from megascale.config import RunConfig
from megascale.config.load import build_as, options_called, parse_config, read_tree
from megascale.corpus import inputs
from megascale.corpus.recipe import RECIPE_KEYS, Recipe
from megascale.monitor.metric_fields import FIELDS, SCORES
from megascale.planner import PLANNERS

ROOT = Path(__file__).parents[2]
NO_GUIDES = ("CHANGELOG.md", "tests/data/README.md")
"""Files that speak of earlier versions."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:srun .*? )?megascale (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECTIONS = [field.name for field in fields(RunConfig)]
DOTTED = re.compile(r"([a-z_]+(?:\.[a-z0-9_]+)+)(?:[=:] ?(.+))?", re.DOTALL)
ANY_RECIPE = "{name: any, inputs: [{kind: python_stdlib}]}"
FILES = (".py", ".json", ".sbatch")


def tracked_markdown():
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    names = listed.stdout.splitlines()
    if listed.returncode != 0:  # not a git checkout
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
        names = sorted(p.as_posix() for p in found if not p.parts[0].startswith((".venv", "runs")))
    return [name for name in names if (ROOT / name).is_file()]


MARKDOWN = tracked_markdown()
GUIDES = [name for name in MARKDOWN if name not in NO_GUIDES]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name):
    """(language, content) of the fenced code blocks."""
    return FENCE.findall(text_of(name))


def inline_code_of(name):
    return re.findall(r"`([^`]+)`", FENCE.sub("", text_of(name)))


def anchors_of(name):
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(name)), re.MULTILINE)
    return {write_guides.anchor(heading) for heading in headings}


def commands_in(text):
    """Words of the command lines of a block that begin with megascale, or with srun of it."""
    for rest in COMMAND.findall(text.replace("\\\n", " ")):
        yield shlex.split(rest, comments=True)


class Parsed(NamedTuple):
    verb: str
    args: object


def parsed(words, monkeypatch):
    """A command line as the parser of its verb reads it; the verb itself does not run."""
    verb = next((v for v in (" ".join(words[:2]), words[0]) if v in cli.VERBS), None)
    assert verb is not None, words
    taken = []
    module, name = cli.VERBS[verb][0].split(":")
    monkeypatch.setattr(
        importlib.import_module(module), f"run_{name}", lambda args: taken.append(args) or 0
    )
    assert cli.main(words) == 0, " ".join(words)
    return Parsed(verb, taken[0])


def check_overrides(line):
    """The options of a command line are those of the schema of the file that it names."""
    is_recipe = line.verb == "prepare" or getattr(line.args, "job", None) == "prepare"
    kind, example = (Recipe, ANY_RECIPE) if is_recipe else (RunConfig, "")
    file = getattr(line.args, "recipe", None) or getattr(line.args, "config", None)
    words = getattr(line.args, "words", None) or getattr(line.args, "overrides", None) or []
    more = [word for word in words if is_recipe and "=" not in word]
    for name in (file, *more):
        text = text_of(name) if name and (ROOT / name).is_file() else example
        build_as(kind, read_tree(text, "guide"), [word for word in words if word not in more])


def test_the_front_page_is_short():
    assert 150 <= len(text_of("README.md").splitlines()) <= 200


def test_every_guide_of_the_tree_is_there():
    rooms = "planner model growth optim run infowindow convert launch config".split()
    expected = ["README.md", "megascale/README.md", ".github/CONTRIBUTING.md"]
    expected += [f"megascale/{room}/README.md" for room in rooms]
    expected += [f"{n}/README.md" for n in "data configs configs/results slurm tools tests".split()]
    assert set(expected) <= set(MARKDOWN)


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_and_pictures_lead_somewhere(name):
    for target in LINK.findall(FENCE.sub("", text_of(name))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert place.exists(), f"{name}: {target}"
        if anchor:
            inside = place.relative_to(ROOT).as_posix()
            assert anchor in anchors_of(inside), f"{name}: {target}"


@pytest.mark.parametrize("name", GUIDES)
def test_commands_in_blocks_are_parsed(name, monkeypatch):
    for _, block in blocks_of(name):
        for words in commands_in(block):
            check_overrides(parsed(words, monkeypatch))


@pytest.mark.parametrize("name", GUIDES)
def test_verbs_and_flags_in_the_text_exist(name):
    for code in inline_code_of(name):
        words = code.split()
        if words[:1] != ["megascale"] or len(words) < 2 or words[1] == "VERB":
            continue
        verb = next((v for v in (" ".join(words[1:3]), words[1]) if v in cli.VERBS), None)
        assert verb, f"{name}: {code}"
        flags = options_of(verb)
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in flags, f"{name}: {code}"


def options_of(verb):
    """The flags of a verb."""
    module, name = cli.VERBS[verb][0].split(":")
    parser = cli._Parser()
    getattr(importlib.import_module(module), f"add_{name}_arguments")(parser)
    return parser._option_string_actions


@pytest.mark.parametrize("name", GUIDES)
def test_yaml_in_blocks_is_a_config(name):
    for language, block in blocks_of(name):
        if language == "yaml":
            tree = yaml.safe_load(block)
            kind = Recipe if RECIPE_KEYS & tree.keys() else RunConfig
            assert is_dataclass(build_as(kind, read_tree(block, name), where=name))


@pytest.mark.parametrize("name", GUIDES)
def test_dotted_options_in_the_text_exist(name):
    for code in inline_code_of(name):
        for word in [code] if ":" in code else code.split():
            found = DOTTED.fullmatch(word)
            if found is None:
                continue
            option, value = found.groups()
            if option.split(".")[0] == "tokenizer":
                assert option in options_called(Recipe, option), f"{name}: {code}"
            elif option.split(".")[0] in SECTIONS and Path(option).suffix not in FILES:
                first, last = option.split(".")[0], option.rsplit(".", 1)[1]
                inside = option in options_called(RunConfig, last)
                assert inside or first == "data" and ".NAME" in option, f"{name}: {code}"
                if value is not None and name != "megascale/config/README.md":
                    parse_config("", [f"{option}={value}"])


def test_the_checks_refuse_what_does_not_exist(monkeypatch):
    config = "configs/quickstart.yaml"
    with pytest.raises(AssertionError):
        parsed(["train", config, "--no-such-flag"], monkeypatch)
    line = parsed(["train", config, "train.no_such_option=1"], monkeypatch)
    with pytest.raises(cli.UserError, match=r"train\.no_such_option"):
        check_overrides(line)
    assert options_called(RunConfig, "no_such_option") == []
    assert [*commands_in("megascale plan a # b\nls\nsrun -n 8 megascale doctor --nodes")] == [
        ["plan", "a"],
        ["doctor", "--nodes"],
    ]


@pytest.mark.parametrize("name", GUIDES)
def test_paths_of_tools_and_tests_exist(name):
    text = text_of(name)
    for path in re.findall(r"(?<![\w/.-])((?:tools|tests|configs|data|slurm)/[\w/.-]*\w)", text):
        around = (ROOT, (ROOT / name).parent)
        assert any((folder / path).exists() for folder in around), f"{name}: {path}"
    for bench in re.findall(r"tools/bench\.py (\w+)", text):
        assert bench == "NAME" or bench in known_benchmarks(), f"{name}: {bench}"


def known_benchmarks():
    bench = importlib.import_module("bench")
    return {**bench.BENCHMARKS, **bench.WITH_OPTIONS}


def test_generated_parts_are_those_of_the_code():
    for path, text in write_guides.texts().items():
        assert path.read_text() == text, "run python tools/write_guides.py"


def test_the_guide_of_runs_has_every_field_of_metrics():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text_of("megascale/run/README.md"), re.MULTILINE)
    assert ("tokens_per_s", "tokens/s") in rows and ("set_tokens", "tokens") in rows
    assert {name for name, _ in rows} >= {one.name for one in (*FIELDS, *SCORES)}


def test_the_reference_has_every_option():
    text = text_of("megascale/config/README.md")
    assert "**`model.moe.num_experts`** (whole number; default: `8`)" in text
    assert "**`data.sources.NAME.path`** (text; required)" in text
    assert text.count("\n- **`") == sum(
        len(fields(kind)) for kind in write_guides.sections(RunConfig).values()
    )


def test_hooks_before_a_commit_fetch_nothing():
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    assert {hook["language"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"system"}


def test_the_quick_part_names_tests_that_exist():
    for test in (*quick.SLOW_TESTS, *quick.MULTI, *(f"tests/unit/{n}" for n in quick.SLOW_FILES)):
        path, _, name = test.partition("::")
        function = name.partition("[")[0]
        assert not name or f"def {function}(" in text_of(path), test
        assert (ROOT / path).is_file(), test
    assert "tests/unit/test_guides.py" in quick.arguments()


def test_the_ratio_of_the_front_page_is_that_of_its_picture():
    problem = picture.front_page_batch()
    ratio = picture.step_ratio({name: PLANNERS[name](problem) for name in picture.TITLES})
    page = " ".join(text_of("README.md").split())
    assert f"takes **{ratio:.2f}x** as long" in page
    assert f"{len(problem.lengths)} sequences" in page
    assert f"from {problem.lengths.min()} token to {problem.lengths.max():,}" in page


def run_python_of(name, folder, *more):
    """What the Python blocks of a guide print, one after the other, in a process of their own."""
    blocks = [content for language, content in blocks_of(name) if language == "python"]
    assert blocks
    script = "\n".join([*blocks, *more]).replace("train.tokens=20M", "train.tokens=2000")
    (folder / "mine.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_front_page_runs(tmp_path):
    assert "on ranks (0, 1)" in run_python_of("README.md", tmp_path)


def test_the_python_of_the_planner_runs(tmp_path):
    own = [
        "if __name__ == '__main__':",
        "    own = dict(num_ranks=4, capacity_tokens=8, planner='mine:first_ranks')",
        "    plan = megascale.plan([5, 20, 3], **own)",
        "    print(sorted(len(ring.ranks) for ring in plan.rings if ring.sequences))",
    ]
    said = run_python_of("megascale/planner/README.md", tmp_path, *own)
    assert said.splitlines()[-1] == "[1, 1, 3]"


def test_the_python_of_data_runs(tmp_path):
    tiny_config(tmp_path).rename(tmp_path / "run.yaml")
    own = "print(cursor.tokens_seen == int(batch.length.sum()) == sum(plan.lengths))"
    said = run_python_of("data/README.md", tmp_path, own)
    assert said.splitlines()[-1] == "True" and "torch.Size" in said


def test_the_python_of_runs_runs(tmp_path):
    tiny_config(tmp_path).rename(tmp_path / "run.yaml")
    own = "print(stopped, rows[-1]['step'], config.train.tokens)"
    said = run_python_of("megascale/run/README.md", tmp_path, own)
    assert said.splitlines()[-1] == "False 2.0 2000"


def test_the_commands_for_several_corpora_run(tmp_path, monkeypatch, capsys):
    text = text_of("data/README.md")
    section = text[text.index("## Several corpora") : text.index("## Check a corpus")]
    blocks = FENCE.findall(section)
    (commands,) = (content for language, content in blocks if not language)
    config = [content for language, content in blocks if language == "yaml"][-1]
    rows = [
        {"text": f"def page {i} " * 9, "meta": {"source": ("web", "code")[i % 2]}}
        for i in range(600)
    ]
    first, second = ("".join(json.dumps(row) + "\n" for row in rows[i::2]) for i in (0, 1))
    (tmp_path / "texts/more").mkdir(parents=True)
    (tmp_path / "texts/a.jsonl").write_text(first)
    (tmp_path / "texts/more/b.jsonl.gz").write_bytes(gzip.compress(second.encode()))
    (tmp_path / "few.py").write_text("print(1)\n")
    (tmp_path / "run.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    few = SimpleNamespace(get_paths=lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(inputs, "sysconfig", few)
    for words in commands_in(commands):
        assert cli.main(words) == 0, words
    said = capsys.readouterr().out
    assert "corpora/mixed/code prepared" in said and "corpora/more/python_stdlib prepared" in said
    assert "web" in said and "80.00%" in said and said.endswith("verdict: good\n")
