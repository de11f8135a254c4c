"""YAML and `a.b=c` overrides to a RunConfig, and back."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from megascale.config.schema import NameOf, RunConfig
from megascale.errors import UserError
from megascale.installation import given_or_example
from megascale.parsing import dump_yaml, is_plain_name, parse_yaml, read_yaml_text

T = TypeVar("T")
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BINARY_SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
LARGEST = 2**62
MOST_DIGITS = 64
"""Characters of a whole number."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), under: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides, and type-check every key.

    The file may be an example of this installation, see `installation.given_or_example`.
    `under` gives values, as nested mappings, for keys that neither of them sets.

    Raises UserError, in one line, for an unreadable file, an unknown key (with the nearest
    valid one), a wrong type or an override that is not of the form a.b=c.
    """
    try:
        text = read_yaml_text(given_or_example(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(
            f"config {path}: {reason}; give the path of a YAML file, e.g. configs/quickstart.yaml"
        ) from None
    tree = read_tree(text, str(path))
    if "inputs" in tree or "outputs" in tree:
        raise UserError(
            f"{path} is the recipe of a corpus, not the config of a run; 'megascale prepare "
            f"{path}' makes the corpus, which a config then names in data.sources"
        )
    return build_as(RunConfig, tree, overrides, str(path), under)


def parse_config(text: str, overrides: Sequence[str] = (), where: str = "config") -> RunConfig:
    """Like `load_config`, from the text of a YAML file; `where` names it in errors."""
    return build_as(RunConfig, read_tree(text, where), overrides, where)


def read_tree(text: str, where: str) -> dict[str, Any]:
    """YAML text that is a mapping, or empty. Raises UserError, which begins with `where`."""
    tree = parse_yaml(text, where)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a config is a YAML mapping such as 'seed: 1', not {_kind(tree)}")
    return tree


def build_as(
    kind: type[T],
    tree: dict[str, Any],
    overrides: Sequence[str] = (),
    where: str = "config",
    under: Mapping[str, Any] | None = None,
) -> T:
    """A tree of YAML with `a.b=c` overrides as the frozen dataclass `kind`, every key type-checked.

    Changes the tree. Raises UserError, in one line that begins with `where`, for anything that
    does not fit.
    """
    apply_overrides(tree, overrides)
    _fill_in(tree, under or {})
    try:
        built: T = _build(kind, tree, "")
    except UserError as error:
        raise UserError(f"{where}: {error}{_said_by(overrides, str(error))}") from None
    return built


def checked(value: T, where: str) -> T:
    """A dataclass of options whose values come from elsewhere, with every type checked.

    Raises UserError, which begins with `where`, the dotted name of the section.
    """
    built: T = _build(type(value), _plain(asdict(value)), where)  # type: ignore[call-overload]
    return built


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set what `a.b=c` overrides say in nested mappings.

    Raises UserError for an override that is not of that form, or goes into what has no keys.
    """
    for override in overrides:
        _apply_override(tree, override)


def options_called(kind: type, name: str, prefix: str = "") -> list[str]:
    """Dotted names of the options of a dataclass that are, or end in, `name`.

    Those in lists and in mappings with names of the user's are not among them.
    """
    found = []
    for key, hint in typing.get_type_hints(kind).items():
        full = f"{prefix}{key}"
        if full == name or full.endswith(f".{name}"):
            found.append(full)
        for inner in (hint, *get_args(hint)):
            if (
                is_dataclass(inner)
                and isinstance(inner, type)
                and get_origin(hint) not in (tuple, dict)
            ):
                found += options_called(inner, name, f"{full}.")
    return found


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `parse_config` turns back into an equal config."""
    return dump_yaml(_plain(asdict(config)))


def _said_by(overrides: Sequence[str], problem: str) -> str:
    """Which override a problem comes from, where it begins with the name of one."""
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if re.match(rf"(?:unknown key ')?{re.escape(name)}(?!\w)", problem):
            return f" (override '{override}')"
    return ""


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise UserError(f"override '{override}': write it as a.b=value, e.g. train.tokens=20M")
    node = tree
    *parents, last = name.split(".")
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{part}' is {_kind(child)}, it has no keys")
        node = child
    node[last] = parse_yaml(value, f"override '{override}'")


def _fill_in(tree: dict[str, Any], under: Mapping[str, Any]) -> None:
    """Give `tree` the values of `under` that it lacks; a key set to null stays so."""
    for key, value in under.items():
        if isinstance(tree.setdefault(key, value), dict) and isinstance(value, dict):
            _fill_in(tree[key], value)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation `kind`; `where` is its dotted name."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return _build(kind, value, where)
    if origin is Annotated and isinstance(args[1], NameOf):
        return _choice(tuple(args[1].table), value, where)
    if origin is Annotated:
        return value if value in args[1:] else _build(args[0], value, where)
    if origin is Literal:
        return _choice(args, value, where)
    if origin is tuple:
        return _build_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping, not {_kind(value)}")
        return {_name(k, where): _build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    return _scalar(kind, value, where)


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where or 'config'} must be a mapping, not {_kind(value)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise UserError(_unknown_key(str(key), list(hints), where))
    required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    for name in required:
        if value.get(name) is None:
            raise UserError(f"{prefix}{name} is missing; it has no default")
    return kind(**{key: _build(hints[key], item, prefix + key) for key, item in value.items()})


def _build_tuple(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list, not {_kind(value)}")
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise UserError(f"{where} must be a list of {len(args)} values, not {len(value)}")
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
    return tuple(
        _build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    )


def _unknown_key(key: str, names: list[str], where: str) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(names)}"
    return f"unknown key '{f'{where}.' if where else ''}{key}'; {hint}"


def _choice(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in options:
        listed = ", ".join(str(option) for option in options)
        raise UserError(f"{where} must be one of {listed}; it is {value!r}")
    return value


def _name(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise UserError(f"{where}: the name {key!r} must be text; put it in quotes")
    if not is_plain_name(key):
        raise UserError(
            f"{where}: the name {key!r} is empty or has control characters; use a plain word"
        )
    return key


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is int and isinstance(value, str):
        value = whole_number(value, where)
    if kind is int and isinstance(value, float) and abs(value) <= LARGEST and value == int(value):
        value = int(value)  # YAML has 1e9 as a float
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        wanted = {int: "a whole number such as 20M", float: "a number such as 3e-4"}
        wanted |= {bool: "true or false", str: "text"}
        raise UserError(f"{where} must be {wanted[kind]}, not {_kind(value)} {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} = {value!r} must be a finite number such as 3e-4")
    return value


def whole_number(text: str, where: str, least: int = 0, most: int = LARGEST) -> int:
    """The number that `text` writes, with the suffixes that a config knows.

    Raises UserError, which begins with `where`.
    """
    number_and_suffix = (
        r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([KMBGT]|[KMG]i)?\s*"
    )
    match = re.fullmatch(number_and_suffix, text)
    if match is None:
        wanted = f"from {least} to {most}" if most < LARGEST else "such as 4096, 20M or 8Ki"
        raise UserError(f"{where} must be a whole number {wanted}, not '{text}'")
    if len(text) > MOST_DIGITS:
        raise UserError(f"{where} must be at most {most}, not a number of {len(text)} characters")
    digits, suffix = match.group(1).replace("_", ""), match.group(2) or ""
    value = float(digits) * (SUFFIXES | BINARY_SUFFIXES)[suffix]
    if value != int(value):
        raise UserError(f"{where} must be a whole number, not {text}")
    if value < least:
        raise UserError(f"{where} must be at least {least}, not {text}")
    if value > most:
        raise UserError(f"{where} must be at most {most}, not {text}")
    return int(value)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a whole number", float: "a number", type(None): "empty"}
    return names.get(type(value), type(value).__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
