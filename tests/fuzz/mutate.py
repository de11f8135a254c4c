"""Mutations of valid examples, drawn from a seeded generator: values, texts, bytes, and words."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import yaml

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 255, 65_537, 2**31, 2**32 + 1, 2**53 + 1, 2**62, 2**63, 2**64, 10**18,
    10**30, -(10**30), 0.0, -0.0, 0.5, -0.5, 1e-9, 1e-320, 1e15, 1e19, 1e100, 1e308, -1e308,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "1e9", "1e999", "9" * 400, "9" * 5000, "20M", "nan", "inf", "true", "null",
    "none", "a", "a" * 300, "b" * 70_000, "..", "../x", "x/y", ".", "\0", "a\0b", "\ud800",
    "\udcff", "\x1b[2J", "\u202e", "\ufeff", "\u0661\u0662", "\xb2", "a\nb", "\r", "%s%n{0}",
    "{x}", "a,b",
    "2024-01-01", "2024-13-45", "12:30:45", "0x7fffffffffffffffffff", "1_000", "--x", "-", "=",
)  # fmt: skip
RAW_JSON = (
    "1e999", "-1E+400", "9" * 400, "9" * 5000, "-" + "9" * 20, "NaN", "Infinity", "-Infinity",
    "[" * 40 + "]" * 40, "[" * 900 + "]" * 900, "[" * 60_000, '{"a":' * 500 + "1" + "}" * 500,
    '"\\ud800"', '"\\udcff\\u0000"', '{"a": 1, "a": 2}', "1e-999", "0" * 50, "'a'", "tru", "//",
)  # fmt: skip
BOMB = "[&a0 [x, x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
RAW_YAML = (
    *RAW_JSON, BOMB + "]", "&a [*a]", "&a {b: *a}", "{<<: {a: 1}}", "{<<: [{a: 1}, {a: 2}]}",
    "{<<: 1}", "{<<: &m {<<: *m}}", "2024-01-01", "2024-99-99", "2024-01-01 25:61:61",
    "!!timestamp x", "!!binary aGk=", "!!binary '!'", "!!set {a, b}", "!!omap [a: 1]",
    "!!python/object/apply:os.getcwd []", "!!int x", "!!float x", "!!bool x", "!!str [a]",
    "!!map [a]", "!!null x", "!!seq {a: 1}", "0b", "0x", "0o8", "08", "1:30", "190:20:30.15",
    "9" * 320 + ":0", ".inf", "-.inf", ".nan", "~", "{[a]: b}", "{1: 2, 1.0: 3, true: 4}",
    "{2024-01-01: x}", "*missing", "&a x", '"\\ud800"', '"\\0"', '"\\x85"', "|\n  a", "> b", "%",
    "@a", "`a`", "? a", "- " * 30 + "a", "- " * 3000 + "a", "[a, b", "{a: b", "=", "{=: 1}",
    "!<x> a", "! a", "!!x a", "0x" + "f" * 5000, "1e400", "1.5e-400", "-0", "0.", "._", "1__0",
)  # fmt: skip
_MARK = "@raw{}@"


def tree(rng: random.Random, value: Any, raw: tuple[str, ...] = ()) -> Any:
    """A copy of a value of JSON with one to three changes; markers stand for texts of `raw`."""
    changed = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, changed, raw)
    return changed[0]


def _change(rng: random.Random, root: list[Any], raw: tuple[str, ...]) -> None:
    places = list(_places(root))
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.12 and isinstance(holder, dict):
        del holder[key]
    elif kind < 0.2 and isinstance(holder, dict):
        holder[rng.choice([*TEXTS[:22], key + "x", key.upper()])] = holder.pop(key)
    elif kind < 0.28:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind < 0.34 and isinstance(holder[key], list):
        holder[key] = holder[key] * rng.choice((0, 2, 50))
    else:
        holder[key] = _value(rng, holder[key], raw)


def _value(rng: random.Random, old: Any, raw: tuple[str, ...]) -> Any:
    kind = rng.random()
    if raw and kind < 0.3:
        return _MARK.format(rng.randrange(len(raw)))
    if kind < 0.6:
        return rng.choice(NUMBERS)
    if kind < 0.8:
        return rng.choice(TEXTS)
    return rng.choice((None, True, False, [], {}, [old], {"a": old}, [old] * 3, str(old), [[], {}]))


def _places(root: Any) -> Any:
    """(holder, key) of everything inside."""
    stack = [root]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """JSON of a changed value, sometimes damaged as bytes too."""
    text = _with_raw(json.dumps(tree(rng, value, RAW_JSON)), RAW_JSON)
    return _encoded(rng, text)


def yaml_text(rng: random.Random, value: Any) -> str:
    """YAML of a changed value, in block or flow style."""
    changed = tree(rng, value, RAW_YAML)
    flow = rng.random() < 0.5
    text = json.dumps(changed) if flow else yaml.safe_dump(changed, sort_keys=False, width=10**6)
    text = _with_raw(text, RAW_YAML)
    return (
        damaged(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")
        if rng.random() < 0.1
        else text
    )


def _with_raw(text: str, raw: tuple[str, ...]) -> str:
    for number, piece in enumerate(raw):
        mark = _MARK.format(number)
        if mark in text:
            for quote in ('"', "'", ""):
                text = text.replace(f"{quote}{mark}{quote}", piece)
    return text


def _encoded(rng: random.Random, text: str) -> bytes:
    kind = rng.random()
    if kind < 0.03:
        return text.encode("utf-16")
    if kind < 0.06:
        return b"\xef\xbb\xbf" + text.encode()
    return damaged(rng, text.encode()) if kind < 0.2 else text.encode()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to three of: flips, cuts, insertions, repeats, numbers set to extremes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(content) + 1)
        kind = rng.randrange(7)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place : place + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            content[place:place] = rng.choice(
                (b"\0", b"\xff", b"\n", b"[", b'"', b"\xed\xa0\x80", b"9")
            )
        elif kind == 4:
            content[place:place] = content[place : place + rng.choice((1, 16, 200))]
        elif kind == 5:
            width = rng.choice((2, 4, 8))
            number = rng.choice(
                (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
            )
            begin = place - place % rng.choice((1, width))
            content[begin : begin + width] = number.to_bytes(width, "little")
        else:
            content[place : place + 8] = rng.randbytes(8)
    return bytes(content)


def words(rng: random.Random, given: list[str]) -> list[str]:
    """A command line with one or two changes; what a shell cannot pass on does not occur."""
    changed = list(given)
    for _ in range(rng.choice((1, 1, 2))):
        place, kind = rng.randrange(len(changed)) if changed else 0, rng.random()
        if kind < 0.7 and changed:
            name, equals, _ = changed[place].partition("=")
            text = word(rng)
            changed[place] = f"{name}={text}" if equals and rng.random() < 0.8 else text
        elif kind < 0.8 and changed:
            del changed[place]
        elif kind < 0.9 and changed:
            changed.insert(place, changed[place])
        else:
            changed.insert(place, word(rng))
    return changed


def word(rng: random.Random) -> str:
    """A word that a shell can pass on."""
    kind = rng.random()
    text = str(rng.choice(NUMBERS)) if kind < 0.4 else rng.choice(TEXTS if kind < 0.8 else RAW_YAML)
    text = text.replace("\0", "").replace("\ud800", "")
    return text[:100_000]
