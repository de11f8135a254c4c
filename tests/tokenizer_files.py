"""Tokenizers of the `tokenizers` library, made here, in folders as Hugging Face has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megascale.corpus.tokenizers import train_bpe

END, BEGIN, PAD = "</s>", "<s>", "<pad>"
TEXTS = ["the cat sat on the mat; the dog did not", "if a < b and b > c: return a / b"] * 8


def byte_bpe(texts=TEXTS, begin=BEGIN) -> Any:
    """A byte-level BPE with BEGIN, END and PAD, which puts `begin`, if any, before a text."""
    from tokenizers import AddedToken, Tokenizer, processors

    backend: Any = Tokenizer.from_str(train_bpe(texts, 300)._backend.to_str())
    backend.add_special_tokens([AddedToken(one, special=True) for one in (BEGIN, END, PAD)])
    if begin is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return backend


def merging_bpe() -> Any:
    """A BPE of characters whose merges reach END, and go on from there."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pieces = [BEGIN, END, "<unk>", *map(chr, range(32, 127)), "</", "s>", "</s>>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), (END, ">")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(one, special=True) for one in (BEGIN, END)])
    return backend


def unigram(characters=None, byte_fallback=False) -> Any:
    """A unigram model with END and BEGIN among its pieces; of printable ASCII by default."""
    from tokenizers import Tokenizer, decoders, models

    if characters is None:
        characters = "".join(map(chr, range(32, 127)))
    pieces = [("<unk>", 0.0), (BEGIN, 0.0), (END, 0.0), *((one, -5.0) for one in characters)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend: Any = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unflagged_bpe() -> Any:
    """A byte-level BPE with END as an added token that is not flagged special."""
    from tokenizers import AddedToken, Tokenizer

    backend: Any = Tokenizer.from_str(train_bpe(TEXTS, 300)._backend.to_str())
    backend.add_tokens([AddedToken(END, special=False), AddedToken("<b>", special=False)])
    return backend


def save(backend, folder: Path, **config) -> str:
    """Write a tokenizer folder, with END as its end of sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    text = json.dumps({"eos_token": END} | config)
    (folder / "tokenizer_config.json").write_text(text)
    return str(folder)


def prepare_texts(folder: Path, texts, tokenizer, heldout=0.0, processes=1, **options):
    """Prepare texts, each a file of its own, with a tokenizer folder; see `prepare`."""
    from megascale.corpus.prepare import prepare
    from megascale.corpus.recipe import parse_recipe

    inside = folder / "in"
    inside.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (inside / f"{i:04}").write_text(text, encoding="utf-8", newline="")
    recipe = {
        "name": "x",
        "heldout_fraction": heldout,
        "inputs": [{"kind": "files", "paths": [f"{inside}/*"]}],
        "tokenizer": {"kind": "hf", "path": str(tokenizer)} | options,
    }
    return prepare(parse_recipe(json.dumps(recipe)), folder / "corpus", processes)
