"""Bounds of JSON and YAML, and what fuzzing of their readers found."""

import ast
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processor_time import processor_s

from megascale.config import dump_config, finalize, load_config, parse_config
from megascale.config.limits import AT_MOST
from megascale.errors import MOST_MESSAGE, UserError
from megascale.parsing import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_YAML_BYTES,
    dump_yaml,
    is_path,
    json_rows,
    parse_json,
    parse_text,
    parse_yaml,
    read_json,
)

PACKAGE = Path(__file__).parents[2] / "megascale"
MAY_PARSE = {
    "parsing.py": "the reader itself",
    "corpus/special_tokens.py": "what the tokenizers library has parsed and written again",
    "corpus/tokenizer_mark.py": "the same",
    "convert/huggingface/tokenizer_folder.py": "the same",
    "infowindow/tokenization_infowindow.py": "it is copied into exported models",
    "planner/plan.py": "between processes of one run",
    "runtime/nodes.py": "the same",
    "checkpoint/save.py": "the same",
    "checkpoint/load.py": "the same",
    "training/sample.py": "the same",
    "installation.py": "what pip wrote, also where PyYAML is missing",
    "launch/channel.py": "signed messages with a limit of their own",
}


def test_there_is_one_reader_of_json_and_yaml():
    parsers = {("json", "load"), ("json", "loads"), ("yaml", "load"), ("yaml", "safe_load")}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in parsers:
                    found.add(str(path.relative_to(PACKAGE)))
    assert found == set(MAY_PARSE)


@pytest.mark.parametrize(
    "text, problem",
    [
        (b"", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[1, NaN]", "NaN: no finite number"),
        (b"-Infinity", "no finite number"),
        (b"1e999", "1e999: no finite number"),
        (b"9" * 400, "no finite number"),
        (b"-" + b"9" * 5000, "no finite number"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"[" * 500 + b"]" * 500, "nested deeper than 64"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested deeper than 64"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff\\ud800": 1}', "half a surrogate pair"),
        (b'["a\\u0000b"]', "zero byte"),
    ],
)
def test_json_beyond_the_limits_is_refused(text, problem):
    with pytest.raises(UserError, match=problem) as caught:
        parse_json(text, "file.json")
    assert str(caught.value).startswith("file.json: ")


@pytest.mark.parametrize(
    "text, value",
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b"18446744073709551615", 2**64 - 1),
        (b"1000000000000000019884624838656", 1e30),  # model_max_length of many tokenizers
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"caf\\udce9"', "caf\udce9"),  # a file name that is no UTF-8
        (b"[" * MOST_DEPTH + b"]" * MOST_DEPTH, json.loads("[" * MOST_DEPTH + "]" * MOST_DEPTH)),
    ],
)
def test_json_within_the_limits_is_read(text, value):
    assert parse_json(text, "x") == value


def test_a_file_larger_than_the_limit_is_not_read_whole(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 2)
    with pytest.raises(UserError, match="more than"):
        read_json(path)
    with pytest.raises(OSError, match="a device"):
        read_json("/dev/zero")


def test_rows_that_are_damaged_are_left_out():
    bad = [b'{"step": ', b"[1]", b"3", b"\xff", b"[" * 50_000, b'{"a": "\\ud800"}', b"", b"null"]
    bad.append(b'{"a":' * 70 + b"1" + b"}" * 70)
    lines = [
        b'{"a": 1}',
        *bad,
        b'{"a": NaN, "b": 1e999, "c": -Infinity, "d": ' + b"9" * 5000 + b"}",
    ]
    nothing = dict.fromkeys("abcd")
    assert list(json_rows(io.BytesIO(b"\r\n".join(lines)))) == [{"a": 1}, nothing]


def test_texts_of_documents_are_kept_whatever_they_hold():
    assert parse_text(b'{"text": "a\xff\\ud800\\u0000", "n": 1e999}')["text"] == "a\udcff\ud800\0"
    with pytest.raises(ValueError, match="nested"):
        parse_text(b"[" * 100_000)


BOMB = "[&a0 [x, x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text, problem",
    [
        (BOMB + "]", "more than 100,000 values"),
        (MERGE_BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "inside what it names"),
        ("a: &a {b: *a}", "inside what it names"),
        ("a: &m {<<: *m}", "inside what it names"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper than 64"),
        ("a: " + "[" * 100_000, "nested deeper than 64"),
        ("- " * 3000 + "a", "nested deeper than 64"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("{[a]: b}", "a key must be a text"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!int x", "is no whole number"),
        ("a: !!int ''", "is no whole number"),
        ("a: !!float x", "is no number"),
        ("a: " + "9" * 5000, "beyond all numbers"),
        ("a: 0x" + "f" * 5000, "beyond all numbers"),
        ("a: 1e400", "beyond all numbers"),
        ("a: " + "9" * 320 + ":0", "beyond all numbers"),
        ('a: "\\ud800"', "half a surrogate pair|invalid Unicode character"),
        ('a: "b\\0"', "zero byte"),
        ("a: x\x00", "control characters|special characters"),
        ("x" * (MOST_YAML_BYTES + 1), "longer than"),
    ],
)
def test_yaml_beyond_the_limits_is_refused(text, problem):
    began = time.process_time()
    with pytest.raises(UserError, match=problem) as caught:
        parse_config(text, where="run.yaml")
    assert str(caught.value).startswith("run.yaml") and len(str(caught.value).splitlines()) == 1
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "text, value",
    [
        ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"),
        ("3e-4", 3e-4),
        ("1" + "0" * 30, 1e30),
        (".inf", float("inf")),
        ("&a {b: 1}", {"b": 1}),
        ("[&a {b: 1}, {<<: *a, c: 2}]", [{"b": 1}, {"b": 1, "c": 2}]),
        # a merge into a mapping that is built before what it takes from
        ("{p: {q: {r: &a {<<: &b {x: 1}, x: 2}}}, c: {<<: *a}}",
         {"p": {"q": {"r": {"x": 2}}}, "c": {"x": 2}}),
    ],
)  # fmt: skip
def test_yaml_within_the_limits_is_read(text, value):
    assert parse_yaml(text, "x") == value


def test_fifty_thousand_keys_are_refused_in_seconds(tmp_path):
    """They take one on a machine of these days, two where its threads share cores; once 18."""
    keys = "".join(f"key{i}: {i}\n" for i in range(50_000))
    nested = "".join(f"    s{i}: {{path: x{i}, paht: 1}}\n" for i in range(15_000))
    config = tmp_path / "run.yaml"

    def refused():
        with pytest.raises(UserError, match="more than 100,000 values|unknown key"):
            load_config(config)

    for text in (keys, f"data:\n  sources:\n{nested}"):
        config.write_text(text)
        assert processor_s(refused, 2) < 6


def test_yaml_is_read_without_libyaml_too():
    script = """
import sys
sys.modules["yaml._yaml"] = None
import yaml
from megascale.parsing import parse_yaml
assert not yaml.__with_libyaml__
assert parse_yaml("{a: &x [1, 3e-4, 2024-01-01], b: *x}", "x")["b"] == [1, 3e-4, "2024-01-01"]
try:
    parse_yaml("a: " + "[" * 100, "x")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("x line 1: not valid YAML: nested deeper"), done.stderr


@pytest.mark.parametrize(
    "text",
    ["1e9", "2024-01-01", "null", "0x10", "1_0", "a: b", "~", "1:30", "\x85", "a\u2028b", "\ufeff"],
)
def test_a_text_comes_back_from_a_dump(text):
    assert parse_yaml(dump_yaml({"a": text}), "x") == {"a": text}
    config = parse_config(json.dumps({"eval": {"sample_prompt": text}}))
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    "override, problem",
    [
        ("model.num_layers=1e18", "model.num_layers = .* must be at most 10000"),
        ("model.num_layers=" + "9" * 400, "beyond all numbers"),
        ("train.tokens=" + "9" * 70 + "M", "must be at most"),
        ("train.tokens=" + "9" * 40, "train.tokens must be"),
        ("parallel.pipeline=4Ti", "parallel.pipeline"),
        ("parallel.tensor=1000000000000", "parallel.tensor = .* must be at most"),
        ("parallel.expert=2000000000000000000", "parallel.expert = .* must be at most"),
        ("optim.lr=1e999", "beyond all numbers"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.lr=.nan", "must be a finite number"),
        ("run_dir=" + "[" * 3000, "nested deeper"),
        ("data.global_batch_tokens=2e18", "must be at most"),
        ("model.moe={num_experts: 999999999999}", "must be at most"),
    ],
)
def test_numbers_of_any_size_in_overrides(override, problem):
    began = time.process_time()
    with pytest.raises(UserError, match=problem) as caught:
        config = parse_config("data: {sources: {a: {path: x}}}", [override])
        finalize(config, {"a": 1000}, 257)
    assert len(str(caught.value)) <= 2 * MOST_MESSAGE and time.process_time() - began < 5


def test_a_message_is_one_line_of_bounded_length():
    with pytest.raises(UserError, match="unknown key") as caught:
        parse_config("? " + "x" * 70_000 + "\n: 1")
    assert len(str(caught.value)) < MOST_MESSAGE + 100
    assert "\n" not in str(UserError("a\nb\x1b\ud800"))


@pytest.mark.parametrize("value", ["", "a" * 256, "a/" * 3000, "a\0", "\ud800", 3, None])
def test_no_path(value):
    assert not is_path(value)
    assert is_path("/srv/a/" + "b" * 255) and is_path("caf\udce9")


@pytest.mark.parametrize(
    "name, most",
    [
        (f"{section}.{name}", most)
        for section, all_of in AT_MOST.items()
        for name, most in all_of.items()
    ],
)
def test_sizes_that_no_run_has_are_refused(name, most):
    kept = {"data": {"sources": {"a": {"path": "x"}}}, "model": {"moe": {"num_experts": 2}}}
    config = parse_config(json.dumps(kept), [f"{name}={int(most) + 1}"])
    with pytest.raises(UserError, match=f"{name} = .* must be at most"):
        finalize(config, {"a": 1000}, 257)
