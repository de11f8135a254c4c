"""Equal-Info Windows for `transformers`, in one file that needs nothing of megascale.

`megascale export` copies it beside a model, where `AutoTokenizer.from_pretrained(FOLDER,
trust_remote_code=True)` finds it. A token is named after its id, in hexadecimal digits, since the
bytes of a window need not be text.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

CODEBOOK_FILE = "codebook.safetensors"
END = "<|endoftext|>"


class InfoWindowTokenizer(PreTrainedTokenizer):
    """Bytes of UTF-8 in windows, each the longest string of a dictionary; see the codebook."""

    vocab_files_names = {"codebook_file": CODEBOOK_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, codebook_file: str, vocabulary: int = 65536, **options: Any) -> None:
        self._codebook_file, self._vocabulary = codebook_file, vocabulary
        self._strings = _read(codebook_file)
        self._codes = {string: code for code, string in enumerate(self._strings)}
        self._digits = 4 if vocabulary == 65536 else 2
        for name in ("bos_token", "eos_token"):
            options.setdefault(name, END)
        options.setdefault("special_tokens_pattern", "bos")
        super().__init__(vocabulary=vocabulary, **options)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        """Tokens without the end of a document."""
        return self._vocabulary

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        names = {self._convert_id_to_token(i): i for i in range(self._vocabulary)}
        return {**names, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        raw, begin, digits = text.encode("utf-8"), 0, []
        while begin < len(raw):
            end = begin + 1
            while end < len(raw) and raw[begin : end + 1] in self._codes:
                end += 1
            digits.append(f"{self._codes[raw[begin:end]]:04x}")
            begin = end
        line = "".join(digits)
        return [line[i : i + self._digits] for i in range(0, len(line), self._digits)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token, 16)

    def _convert_id_to_token(self, index: int) -> str:
        return f"{index:0{self._digits}x}"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, added ones by their names; a window that is cut off is left out."""
        said, line = [], ""
        for token in [*tokens, ""]:
            if token and token not in self.added_tokens_encoder:
                line += token
                continue
            codes = [int(line[i : i + 4], 16) for i in range(0, len(line) // 4 * 4, 4)]
            raw = b"".join(self._strings[code] for code in codes)
            said += [raw.decode("utf-8", errors="replace"), token]
            line = ""
        return "".join(said)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        hidden = set(self.all_special_ids) if skip_special_tokens else set()
        # a token that is left out still ends what comes before it
        return self.convert_tokens_to_string(
            ["" if index in hidden else self.convert_ids_to_tokens(index) for index in ids]
        )

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the codebook into a folder."""
        name = f"{filename_prefix}-{CODEBOOK_FILE}" if filename_prefix else CODEBOOK_FILE
        out = os.path.join(save_directory, name)
        if os.path.abspath(out) != os.path.abspath(self._codebook_file):
            shutil.copyfile(self._codebook_file, out)
        return (out,)


def _read(codebook_file: str) -> list[bytes]:
    """The strings of a dictionary, in the order of their codes."""
    from safetensors import safe_open

    with safe_open(codebook_file, framework="numpy") as file:
        said = json.loads(file.metadata()["megascale"])
        if said["kind"] != "megascale.infowindow.codebook" or said["version"] != 1:
            raise ValueError(f"{codebook_file}: no codebook of version 1")
        if said["facts"]["bits"] != 16:
            raise ValueError(f"{codebook_file}: has no dictionary")
        lengths, lasts = file.get_tensor("length").tolist(), file.get_tensor("last").tolist()
    strings: list[bytes] = []
    path = [b""]
    for length, last in zip(lengths, lasts, strict=True):
        path[length:] = [path[length - 1] + bytes([last])]
        strings.append(path[length])
    return strings
