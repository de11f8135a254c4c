"""JSON and YAML that anybody may have written: parsed within bounds, or refused in one line.

Every reader of such a file goes through here, so size, depth, numbers and characters have one set
of limits. What passes can be counted with, printed and written again: no number is infinite or
longer than 64 bits as a whole number, no nesting exhausts the stack, and no alias of YAML makes a
small text large.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml
from yaml.composer import Composer

from megascale.errors import UserError
from megascale.reading import open_regular, read_bounded

MOST_BYTES = 1 << 28
"""Of a JSON document."""
MOST_ROW_BYTES = 1 << 24
"""Of a line of a file of JSON lines."""
MOST_YAML_BYTES = 1 << 20
"""Of a YAML text."""
MOST_DEPTH = 64
"""Mappings and lists inside one another."""
MOST_NODES = 100_000
"""Values of a YAML text, those counted again that an alias repeats: about a second's work."""
LARGEST_INT = 2**64
"""Whole numbers from here on become floats, as in most programs that read JSON."""
_LONGEST_INT = 310
"""Characters of a whole number; above them it has no float."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters and ends of lines."""
_ODD_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")


def read_json(path: str | Path) -> Any:
    """The value of a file of JSON.

    Raises OSError where it cannot be read or is no regular file (nor a stream that a shell hands
    over), and UserError, which begins with the path, where it holds something else.
    """
    with open_regular(path, or_stream=True) as file:
        return parse_json(read_bounded(file, MOST_BYTES + 1), str(path))


def parse_json(data: bytes, where: str) -> Any:
    """The value of JSON text in UTF-8, with or without a byte order mark.

    Raises UserError, which begins with `where`, for anything else, NaN and Infinity, numbers and
    nesting beyond the limits, and text with a zero byte or half a surrogate pair. Halves that stand
    for bytes of a file name (PEP 383) are kept.
    """
    return _parse(data, where, MOST_BYTES, _STRICT)


def is_path(value: Any) -> bool:
    """Whether a value is a text that names a file on any machine: no part is too long."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        parts = value.encode("utf-8", "surrogateescape").split(b"/")
    except UnicodeEncodeError:
        return False
    return max(map(len, parts)) <= 255 and sum(map(len, parts)) + len(parts) <= 4096


def is_plain_name(text: str) -> bool:
    """Whether a text can be a name that is shown in a line: it has no control character."""
    return bool(text.strip()) and _CONTROL.search(text) is None


def parse_text(line: bytes) -> Any:
    """The value of a line of JSON whose texts are data, which may be no UTF-8.

    Bytes that are no UTF-8 become surrogates (PEP 383), and half surrogate pairs and zero bytes
    are kept. Raises ValueError for what is not JSON, or is nested too deeply.
    """
    try:
        return _TEXTS.decode(line.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_DEPTH} levels") from None


def read_json_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a regular file of JSON lines; see `json_rows`. Raises OSError."""
    with open_regular(path) as file:
        yield from json_rows(file)


def json_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; every line that is none is left out.

    A line may be half-written, damaged, or beyond the limits of `parse_json`. NaN, infinities and
    numbers too large for a float are None, as `monitor.lines.json_line` writes them.
    """
    begins = True
    while part := file.readline(MOST_ROW_BYTES):
        is_row, begins = begins, part.endswith(b"\n")
        try:
            row = _parse(part, "", MOST_ROW_BYTES, _LENIENT) if is_row else None
        except UserError:
            continue
        if isinstance(row, dict):
            yield row


def read_yaml_text(path: str | Path) -> str:
    """The text of a YAML file in UTF-8.

    Raises OSError or UnicodeDecodeError where it cannot be read or is no regular file (nor a
    stream that a shell hands over), and UserError where it is longer than any config.
    """
    with open_regular(path, or_stream=True) as file:
        data = read_bounded(file, MOST_YAML_BYTES + 1)
    if len(data) > MOST_YAML_BYTES:
        raise UserError(f"{path}: longer than {MOST_YAML_BYTES:,} bytes; give a YAML file")
    return data.decode("utf-8")


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML text: mappings, lists, texts, numbers, true, false and null.

    Dates are text, since no option is a date. Raises UserError, which begins with `where` and has
    the line, for anything else, a key given twice, and what is beyond the limits.
    """
    if len(text) > MOST_YAML_BYTES:
        raise UserError(f"{where}: longer than {MOST_YAML_BYTES:,} characters; give a shorter file")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}{place}: not valid YAML: {problem}") from None
    return value


def dump_yaml(value: Any) -> str:
    """YAML text of plain values that `parse_yaml` turns back into equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(data: bytes, where: str, most_bytes: int, decoder: json.JSONDecoder) -> Any:
    if len(data) > most_bytes:
        raise UserError(f"{where}: more than {most_bytes:,} bytes, which is no file of this kind")
    try:
        text = data.decode("utf-8-sig")
        value = decoder.decode(text)
        if text.count("[") + text.count("{") > MOST_DEPTH or _ODD_ESCAPE.search(text):
            _check(value)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; write it again as JSON") from None
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MOST_DEPTH} levels") from None
    except JSONDecodeError as error:
        line = f"{error.msg}, line {error.lineno}"
        raise UserError(f"{where}: not JSON: {line}; write it again") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return value


def _check(value: Any) -> None:
    """Raise ValueError for nesting and text beyond the limits."""
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for item in level:
            if depth == MOST_DEPTH and isinstance(item, list | dict):
                raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
        level, depth = inner, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("a text has half a surrogate pair") from None
    if "\0" in text:
        raise ValueError("a text has a zero byte")


def _number(text: str) -> int | float:
    """A whole number of JSON. Raises OverflowError beyond floats."""
    if len(text) < 19:
        return int(text)
    if len(text) > _LONGEST_INT:
        raise OverflowError
    return _bounded(int(text))


def _bounded(number: int) -> int | float:
    """The number, or a float near it. Raises OverflowError beyond floats."""
    return number if abs(number) < LARGEST_INT else float(number)


def _strict_int(text: str) -> int | float:
    try:
        return _number(text)
    except OverflowError:
        _refuse_number(text)


def _strict_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        _refuse_number(text)
    return number


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]}: no finite number that a float can hold")


def _lenient_int(text: str) -> int | float | None:
    try:
        return _number(text)
    except OverflowError:
        return None


def _lenient_float(text: str) -> float | None:
    number = float(text)
    return None if math.isinf(number) else number


_STRICT = json.JSONDecoder(
    parse_int=_strict_int, parse_float=_strict_float, parse_constant=_refuse_number
)
_LENIENT = json.JSONDecoder(
    parse_int=_lenient_int, parse_float=_lenient_float, parse_constant=lambda text: None
)


def _no_text(number: str) -> int:
    return 0


_TEXTS = json.JSONDecoder(parse_int=_no_text, parse_float=_no_text, parse_constant=_no_text)
"""Numbers of any length become 0, since only texts are read."""


if yaml.__with_libyaml__:

    class _Base(Composer, yaml.CSafeLoader):
        """libyaml splits the text, which is five times as fast; bounds are kept here."""

        def __init__(self, stream: str) -> None:
            yaml.CSafeLoader.__init__(self, stream)
            Composer.__init__(self)
else:
    _Base = yaml.SafeLoader  # type: ignore[assignment, misc]


class _Loader(_Base):
    """A loader of plain values: bounded, 3e-4 is a number, a key stands once."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node; raises ComposerError where nesting or aliases go beyond the limits."""
        event = self.peek_event()
        begin, self._depth = self._nodes, self._depth + 1
        if self._depth > MOST_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            raise _problem(f"nested deeper than {MOST_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _problem(f"'*{event.anchor}' stands inside what it names", event)
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - begin
        if self._nodes > MOST_NODES:
            raise _problem(f"more than {MOST_NODES:,} values", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping; raises an error for a key given twice. Here, before merges add keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key must be a text, not a list or a mapping", key_node)
            if key_node.value in seen:
                raise _problem(f"key '{key_node.value[:60]}' is given twice; keep one", key_node)
            seen.add(key_node.value)
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """A text; raises ConstructorError for characters that no file can hold."""
        text = str(self.construct_scalar(node))
        if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise _problem("a text has a zero byte or half a surrogate pair", node)
        return text

    def construct_int(self, node: yaml.ScalarNode) -> int | float:
        """A whole number; raises ConstructorError beyond floats."""
        try:
            if len(node.value) <= _LONGEST_INT:
                return _bounded(self.construct_yaml_int(node))
        except OverflowError:
            pass
        except (ValueError, IndexError):
            raise _problem(f"{node.value[:20]!r} is no whole number", node) from None
        raise _problem(f"{node.value[:20]}... is beyond all numbers that can be computed", node)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """A number; raises ConstructorError for one beyond floats that does not say .inf."""
        try:
            number = float(self.construct_yaml_float(node))
        except (ValueError, IndexError, OverflowError):
            raise _problem(f"{node.value[:20]!r} is no number", node) from None
        if math.isinf(number) and "inf" not in node.value.lower():
            raise _problem(f"{node.value[:20]} is beyond all numbers that can be computed", node)
        return number


def _problem(text: str, near: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=near.start_mark)


_PLAIN = ("null", "bool", "seq", "map")
_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}
for _name, _build in (
    ("str", _Loader.construct_text),
    ("int", _Loader.construct_int),
    ("float", _Loader.construct_float),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _build)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would take for a number, or fold."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """A text; with escapes where it has line separators, which a parser would fold."""
        style = None if text.replace("\n", "").isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
