"""A tokenizer of Hugging Face as it lies on a disk or a hub, and what its files say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megascale.errors import UserError
from megascale.parsing import read_json
from megascale.reading import open_regular, require_regular

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
NAMED = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token")
"""Special tokens that have a role; the unknown token is none of them, for text becomes it."""
_PROBES = ("a", "0", "\u4e00", " ")
"""Texts of which a tokenizer knows one at least."""


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer of the `tokenizers` library and what is said of it."""

    backend: Any
    named: Mapping[str, str]
    """Special tokens by their role, such as eos_token."""
    adds_bos: bool
    """Whether its config says that a text begins with its bos_token."""

    def named_ids(self) -> list[int]:
        """Ids of the named tokens that it has."""
        ids = [self.backend.token_to_id(text) for text in self.named.values()]
        return [int(i) for i in ids if i is not None]

    def own_bos_id(self) -> int | None:
        """The id that it puts right before a text itself; None where it puts none.

        Its post-processor decides, as in `transformers`; where that puts none, `add_bos_token` of
        its config, as in slow tokenizers. Of several ids the last counts.
        """
        own = put_before_text(self.backend)
        if own is not None or not self.adds_bos or "bos_token" not in self.named:
            return own
        token_id = self.backend.token_to_id(self.named["bos_token"])
        return None if token_id is None else int(token_id)


def put_before_text(backend: Any) -> int | None:
    """The id that a post-processor puts right before a text; None where it puts none."""
    for probe in _PROBES:
        plain = backend.encode(probe, add_special_tokens=False).ids
        if not plain:
            continue
        whole = backend.encode(probe, add_special_tokens=True).ids
        starts = range(len(whole) - len(plain) + 1)
        begin = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
        return int(whole[begin - 1]) if begin else None
    return None


def find_tokenizer(path: str) -> FoundTokenizer:
    """From a local folder, a tokenizer.json, or the hub by name.

    Raises UserError where it cannot be read or reached.
    """
    local = Path(path)
    if local.is_file():
        return _from_files(local, local.parent)
    if (local / TOKENIZER_FILE).is_file():
        return _from_files(local / TOKENIZER_FILE, local)
    if path.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(f"tokenizer.path {path}: no such folder; give one with a {TOKENIZER_FILE}")
    _require_reader(local)
    return _through_transformers(str(local) if local.is_dir() else path)


def _require_reader(folder: Path) -> None:
    """Name the package that a folder's vocabulary file needs and this environment lacks."""
    for file in sorted(folder.glob("*.model")):
        with open_regular(file) as content:
            # SentencePiece's are protobuf, tiktoken's lines of text
            package = "sentencepiece" if content.read(1) == b"\n" else "tiktoken"
        if find_spec(package) is None:
            raise UserError(
                f"tokenizer.path {folder}: {file.name} needs {package}, which is not installed: "
                f"pip install {package}, or add a {TOKENIZER_FILE}"
            )


def _from_files(file: Path, folder: Path) -> FoundTokenizer:
    config = _config_of(folder)
    adds_bos = config.get("add_bos_token") is True
    return FoundTokenizer(read_backend(file), _named_in(config), adds_bos)


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, UserError):
        return {}
    return config if isinstance(config, dict) else {}


def _named_in(config: Mapping[str, Any]) -> dict[str, str]:
    given = {name: config.get(name) for name in NAMED}
    texts = {n: one.get("content") if isinstance(one, dict) else one for n, one in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _through_transformers(path: str) -> FoundTokenizer:
    """Hub names, and folders of other formats, which transformers turns into fast ones."""
    from transformers import AutoTokenizer

    for file in Path(path).glob("*"):
        if not file.is_dir():
            require_regular(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        named = {name: getattr(tokenizer, name) for name in NAMED if getattr(tokenizer, name)}
        adds_bos = getattr(tokenizer, "add_bos_token", None) is True
        return FoundTokenizer(tokenizer.backend_tokenizer, named, adds_bos)
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"tokenizer.path {path}: neither a readable local folder nor a tokenizer of the hub "
            f"that can be reached; copy its {TOKENIZER_FILE} here and give that path ({reason})"
        ) from None


def read_backend(path: Path) -> Any:
    """A tokenizer.json as a tokenizer of the `tokenizers` library. Raises UserError, OSError."""
    from tokenizers import Tokenizer as Backend

    require_regular(path)
    with reading_tokenizer(path):
        return Backend.from_file(str(path))


@contextmanager
def reading_tokenizer(path: str | Path) -> Iterator[None]:
    """What the `tokenizers` library raises in the block becomes a UserError that names `path`.

    The library raises bare Exception. For some damaged files its Rust code panics, which reaches
    Python as an exception that is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a tokenizer: {reason}; copy or prepare it again") from None
