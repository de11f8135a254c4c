"""Equal-Info Windows against the tokenizers in use: `python tools/bench.py infowindow`.

Speed is in MB of text per second of processor time, so per core, of the median of several rounds
in which all take turns on the same documents: our codebook, Hugging Face `tokenizers` with a BPE of
64K trained on the same corpus, tiktoken with the merges of that BPE, sentencepiece (trained on part
of it), and the coder that asks M1 for every byte. Peers that are not installed are left out.
All do the same: a list of texts (str) to ids, and those ids back to a list of texts. Ids are what a
tokenizer's own `encode` returns and its `decode` takes: arrays of ours, lists of the others.

Exactness: documents of code, English, German, machine code, noise and every script of Unicode,
coded by the codebook and by the reference coder, bit for bit, and back. The reference coder itself
judges a few megabytes. It takes bytes while they have a code, so all that it could ever do is in
what it says of each of the 2^16 strings and each byte behind it; by those answers many megabytes
are judged.

Ratios: bytes of text per token of 16 bits under every code, on held-out text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_hdp import RESULTS, to_json
from small_runs import ROOT

from megascale.corpus.shards import Shard
from megascale.corpus.tokenizers import train_bpe
from megascale.infowindow import reference
from megascale.infowindow.codebook import Codebook, TreeCoder
from megascale.infowindow.direct import PlainCoder, WindowCoder
from megascale.infowindow.m1 import M1
from megascale.infowindow.reference import ReferenceCoder, Tables, share, static_table
from megascale.infowindow.tokenizer import InfoWindowTokenizer
from megascale.runtime.progress import progress

CORPUS = "python_stdlib"
VOCABULARY = 65536
DIRECT_BYTES = 4000
"""Text for the coder that asks M1, which takes a second or so for them."""
SENTENCEPIECE_BYTES = 8_000_000
"""Text that sentencepiece learns its vocabulary from."""

Documents = list[bytes]


@dataclass(frozen=True)
class Peer:
    """Something that turns texts into ids and back."""

    name: str
    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    decode: Callable[[Any], list[str]]
    texts: list[str]

    @property
    def num_bytes(self) -> int:
        """Of the texts."""
        return sum(len(text.encode()) for text in self.texts)


def bench_infowindow(options: Sequence[str]) -> None:
    """Compile, measure, compare; print it and write JSON and PNG."""
    arguments = _arguments(options)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    folder: Path = arguments.folder
    corpus = prepared(folder / "corpora" / CORPUS, CORPUS)
    model = M1.open(arguments.m1 or trained_m1(folder, corpus, arguments.m1_tokens))
    results: dict[str, Any] = {"m1_parameters": model.num_parameters, "corpus": CORPUS}
    books = {}
    for code in ("ac", "tunstall"):
        books[code], results[f"compile_{code}"] = compiled(model, code)
    train, heldout = documents(corpus, "train", arguments.mb), documents(corpus, "heldout", 1)
    results["text_mb"] = sum(map(len, train)) / 1e6
    texts = [one.decode(errors="replace") for one in train]
    peers = [*ours(books, texts), direct(model, texts), *others(corpus, texts, folder)]
    results["speed"] = speeds(peers, arguments.rounds)
    results["ratios"] = ratios(model, books, heldout, arguments.ratio_bytes)
    results["exactness"] = exactness(model, books["ac"], arguments.reference_mb)
    results["exactness_by_answers"] = exactness_by_answers(model, books["ac"], arguments.exact_mb)
    print(*report(results), sep="\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "infowindow_speed.json").write_text(to_json(results), encoding="utf-8")
    plot(results, arguments.out / "infowindow_speed.png")
    print(f"written: {arguments.out}/infowindow_speed.json, {arguments.out}/infowindow_speed.png")


def _arguments(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py infowindow", description=__doc__)
    add = parser.add_argument
    add("--m1", type=Path, help="a frozen M1; default: a small one, trained here")
    add("--m1-tokens", default="10M", help="that it is trained on (default: 10M, some minutes)")
    add("--mb", type=float, default=10.0, help="text for the speeds (default: 10)")
    add("--rounds", type=int, default=5, help="of which the median counts (default: 5)")
    add("--reference-mb", type=float, default=1.0, help="judged by the reference (default: 1)")
    add("--exact-mb", type=float, default=100.0, help="judged by its answers (default: 100)")
    add("--ratio-bytes", type=int, default=20_000, help="held-out text (default: 20000)")
    add("--folder", type=Path, default=ROOT / "runs" / "bench", help="of corpus and M1")
    add("--out", type=Path, default=RESULTS, help="of JSON and picture")
    return parser.parse_args(options)


def prepared(out: Path, name: str, *more: str) -> Path:
    """A corpus of a recipe in `data`, made where it is not there."""
    if not (out / "corpus.json").exists():
        megascale("prepare", f"data/{name}.yaml", "--out", str(out), *more)
    return out


def trained_m1(folder: Path, corpus: Path, tokens: str) -> Path:
    """A small M1, trained where it is not there."""
    path = folder / f"m1-{tokens}" / "m1.safetensors"
    if not path.exists():
        words = ["--shape", "small", f"train.tokens={tokens}", "optim.lr=6e-3"]
        megascale("infowindow", "train-m1", str(corpus), "--out", str(path.parent), *words)
    return path


def megascale(*words: str) -> None:
    """Run a verb in a process of its own."""
    where = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "megascale", *words]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": where}, check=True)


def compiled(model: M1, code: str) -> tuple[Codebook, dict[str, float]]:
    """A codebook, and what it took."""
    wall, processor = time.monotonic(), time.process_time()
    with progress(VOCABULARY, f"compiling {code}", " codes") as bar:
        book = Codebook.compile(model, code, 16, bar.update)
    facts = {name: book.facts[name] for name in ("m1_contexts", "expected_bytes", "longest")}
    spent = {"wall_s": time.monotonic() - wall, "processor_s": time.process_time() - processor}
    return book, facts | spent


def documents(corpus: Path, part: str, megabytes: float) -> Documents:
    """Documents of a corpus of bytes, up to so many bytes."""
    shard, found, left = Shard.open(corpus / part), [], int(megabytes * 1e6)
    for i in range(shard.num_documents):
        if left > 0:
            found.append(shard.read(i)[:-1].astype(np.uint8).tobytes()[:left])
            left -= len(found[-1])
    return found


def ours(books: dict[str, Codebook], texts: list[str]) -> Iterator[Peer]:
    """Our codebooks, by their tokenizer with 64K ids."""
    for code, book in books.items():
        coder = InfoWindowTokenizer(book, VOCABULARY)
        yield Peer(f"infowindow {code}", coder.encode_batch, partial(map_list, coder.decode), texts)


def map_list(function: Callable[[Any], Any], batch: Any) -> list[Any]:
    """What a function of one text gives for each."""
    return [function(one) for one in batch]


def direct(model: M1, texts: list[str]) -> Peer:
    """The coder that asks M1, on a little text."""
    coder = WindowCoder(model, 16)
    return Peer(
        "M1 directly",
        lambda batch: [one.view(">u2") for one in coder.encode([text.encode() for text in batch])],
        lambda ids: [one.decode() for one in coder.decode([codes.view("u1") for codes in ids])],
        [texts[0][:DIRECT_BYTES]],
    )


def others(corpus: Path, texts: list[str], folder: Path) -> Iterator[Peer]:
    """The tokenizers in use, trained on the same corpus."""
    whole = [one.decode() for one in documents(corpus, "train", 1e6)]
    backend = trained_bpe(whole, folder)
    encode = backend.encode_batch_fast
    yield Peer(
        "tokenizers BPE",
        lambda batch: [one.ids for one in encode(batch, add_special_tokens=False)],
        backend.decode_batch,
        texts,
    )
    with suppress(ImportError):
        coder = tiktoken_of(backend)
        ways = partial(map_list, coder.encode_ordinary), partial(map_list, coder.decode)
        yield Peer("tiktoken BPE", *ways, texts)
    with suppress(ImportError):
        processor = sentencepiece_of(whole, folder)
        ways = partial(processor.encode, num_threads=1), partial(processor.decode, num_threads=1)
        yield Peer("sentencepiece BPE", *ways, texts)


def trained_bpe(texts: list[str], folder: Path) -> Any:
    """A BPE of 64K ids, trained where it is not there."""
    from tokenizers import Tokenizer

    path = folder / "bpe.json"
    if not path.exists():
        train_bpe(texts, VOCABULARY)._backend.save(str(path))
    return Tokenizer.from_file(str(path))


def tiktoken_of(backend: Any) -> Any:
    """tiktoken with the merges of a byte-level BPE. Raises ImportError where it is missing."""
    import tiktoken

    byte_of = {character: byte for byte, character in byte_names().items()}
    vocabulary = backend.get_vocab(with_added_tokens=False)
    names = sorted((i, name) for name, i in vocabulary.items() if set(name) <= set(byte_of))
    ranks = {bytes(byte_of[c] for c in name): rank for rank, (_, name) in enumerate(names)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("here", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def byte_names() -> dict[int, str]:
    """The characters by which byte-level BPE spells bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible}
    return names | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def sentencepiece_of(texts: list[str], folder: Path) -> Any:
    """A sentencepiece BPE over part of the text. Raises ImportError where it is missing."""
    import sentencepiece

    prefix = folder / "sentencepiece"
    if not prefix.with_suffix(".model").exists():
        lines = "\n".join(texts)[:SENTENCEPIECE_BYTES].splitlines()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(prefix),
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(prefix.with_suffix(".model")))


def speeds(peers: Sequence[Peer], rounds: int) -> list[dict[str, Any]]:
    """MB per second of processor time, of the median round; all take turns."""
    spent: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    tokens = {}
    with progress((rounds + 1) * len(peers), "measuring", " turns") as bar:
        for turn in range(rounds + 1):  # the first is for caches and compilers
            for peer in peers:
                begin = time.process_time()
                ids = peer.encode(peer.texts)
                middle = time.process_time()
                back = peer.decode(ids)
                end = time.process_time()
                tokens[peer.name] = sum(map(len, ids))
                if _is_ours(peer.name) and back != peer.texts:
                    raise SystemExit(f"bench.py: {peer.name} did not give the text back")
                if turn:
                    spent[peer.name].append((middle - begin, end - middle))
                del ids, back  # here, not in the time of the next one
                bar.update()
    return [_speed(peer, spent[peer.name], tokens[peer.name]) for peer in peers]


def _speed(peer: Peer, spent: Sequence[tuple[float, float]], tokens: int) -> dict[str, Any]:
    encode_s, decode_s = (statistics.median(column) for column in zip(*spent, strict=True))
    return {
        "name": peer.name,
        "encode_mb_per_s": peer.num_bytes / encode_s / 1e6,
        "decode_mb_per_s": peer.num_bytes / decode_s / 1e6,
        "bytes_per_token": peer.num_bytes / tokens,
    }


def ratios(
    model: M1, books: dict[str, Codebook], texts: Documents, most: int
) -> list[dict[str, Any]]:
    """Bytes of text per 16 bits under each code, and bits per byte of guessing."""
    some, left = [], most
    for text in texts:
        if left > 0:
            some.append(text[: min(left, 5000)])
            left -= len(some[-1])
    total, found = sum(map(len, some)), {}
    for code, book in books.items():
        found[f"{code}, 16 bits"] = sum(map(len, book.coder.encode(some)))
    for bits in (24, 32, 64, 128):
        found[f"ac, {bits} bits"] = sum(map(len, WindowCoder(model, bits).encode(some)))
    found["plain AC"] = sum(map(len, PlainCoder(model).encode(some)))
    counts = np.bincount(np.frombuffer(b"".join(some), np.uint8), minlength=257) + 1
    table = static_table(counts)
    static = [reference.encode_plain(one, reference.repeated(table, len(one))) for one in some]
    found["static AC"] = sum(map(len, static))
    found["gzip"] = sum(len(reference.gzip_tokens(one)) for one in some)
    return [
        {
            "code": name,
            "bytes_per_16_bits": 2 * total / size,
            "uniform_bits_per_byte": 8 * size / total,
        }
        for name, size in found.items()
    ]


def exactness(model: M1, book: Codebook, megabytes: float) -> dict[str, Any]:
    """Codebook against reference coder on mixed text, document by document, and back."""
    judge, coder = ReferenceCoder(model, 16), book.coder
    sums = {"documents": 0, "bytes": 0, "equal": 0, "came_back": 0}
    with progress(int(megabytes * 1e6), "judging by the reference", "B") as bar:
        for text in mixed(int(megabytes * 1e6)):
            (stream,), (wanted,) = coder.encode([text]), judge.encode([text])
            sums["documents"] += 1
            sums["bytes"] += len(text)
            sums["equal"] += bool(np.array_equal(stream, wanted))
            sums["came_back"] += coder.decode([stream]) == [text]
            bar.update(len(text))
    return sums


def exactness_by_answers(model: M1, book: Codebook, megabytes: float) -> dict[str, Any]:
    """Codebook against what the reference says of every string and every byte behind it."""
    right, goes_on = answers(model, book.strings)
    sums = {"documents": 0, "bytes": 0, "equal": 0, "came_back": 0, "strings": int(right.sum())}
    coder = book.coder
    assert isinstance(coder, TreeCoder)
    with progress(int(megabytes * 1e6), "judging by its answers", "B") as bar:
        for text in mixed(int(megabytes * 1e6)):
            (stream,) = coder.encode([text])
            codes = coder.codes(stream)
            ends = np.cumsum(coder.tree.lengths[codes])
            following = np.frombuffer(text, np.uint8)[ends[:-1]]
            sums["documents"] += 1
            sums["bytes"] += len(text)
            sums["equal"] += bool(right[codes].all() and not goes_on[codes[:-1], following].any())
            sums["came_back"] += coder.decode([stream]) == [text]
            bar.update(len(text))
    return sums


def answers(model: M1, strings: Sequence[bytes]) -> tuple[Any, Any]:
    """By the reference: whether each string has its place as code, and (2^16, 256) whether a window
    that holds it would take a byte too."""
    tables, ranges = Tables(model), {b"": (0, len(strings))}
    right = np.zeros(len(strings), dtype=np.bool_)
    goes_on = np.zeros((len(strings), 256), dtype=np.bool_)
    with progress(len(strings), "asking the reference", " strings") as bar:
        for i, string in enumerate(strings):  # sorted, so what it begins with was there before
            parent = string[:-1]
            low, count = share(tables.of(parent), string[-1], *ranges[parent], is_root=not parent)
            ranges[string], right[i] = (low, count), low == i and count > 0
            if count > 1:  # else nothing is left to share
                table = tables.of(string)
                goes_on[i] = [share(table, byte, low, count, False)[1] > 0 for byte in range(256)]
            bar.update()
    return right, goes_on


def mixed(size: int) -> Iterator[bytes]:
    """Documents of every kind in turn, from nothing to 200,000 bytes each; the same every time."""
    random = np.random.default_rng(0)
    kinds = [np.frombuffer(one, np.uint8) for one in kinds_of_text(size // 5 + 300_000)]
    yield b""
    while size > 0:
        for kind in kinds:
            length = min(int(200_000 ** random.random()), size)
            begin = int(random.integers(max(1, len(kind) - length)))
            if length > 0:
                yield kind[begin : begin + length].tobytes()
            size -= length


def kinds_of_text(most: int) -> Iterator[bytes]:
    """Code, English, German, machine code, noise, every script of Unicode."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield _read(sorted(library.glob("*.py")), most)
    yield _read(sorted(Path("/usr/share/man").glob("man*/*.gz")), most) or b"English text. " * 9999
    yield _read(sorted(Path("/usr/share/man/de").glob("man*/*.gz")), most) or GERMAN
    yield _read([Path(sys.executable).resolve(), *sorted(library.rglob("*.so"))], most)
    yield np.random.default_rng(1).bytes(most)
    every = (chr(i) for i in range(0x20, 0x323B0) if not 0xD800 <= i < 0xE000)
    yield "".join(every).encode()


GERMAN = "F\u00fcr B\u00fccher m\u00fc\u00dfte man Stra\u00dfen pr\u00fcfen. ".encode() * 9999


def _read(paths: Sequence[Path], most: int) -> bytes:
    import gzip

    parts, left = [], most
    for path in paths:
        if left <= 0:
            break
        raw = path.read_bytes()
        parts.append(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        left -= len(parts[-1])
    return b"".join(parts)[:most]


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures, a line each; speeds as ratios to the fastest of the tokenizers in use."""
    known = [one for one in results["speed"] if not _is_ours(one["name"])]
    fastest = {way: max(one[f"{way}_mb_per_s"] for one in known) for way in ("encode", "decode")}
    yield f"{results['text_mb']:.1f} MB of {results['corpus']}, per core"
    for one in results["speed"]:
        encode, decode = one["encode_mb_per_s"], one["decode_mb_per_s"]
        yield (
            f"{one['name']:<22} encode {encode:9.3f} MB/s ({encode / fastest['encode']:7.3f}x)  "
            f"decode {decode:9.3f} MB/s ({decode / fastest['decode']:7.3f}x)  "
            f"{one['bytes_per_token']:.2f} bytes/token"
        )
    for one in results["ratios"]:
        yield (
            f"{one['code']:<22} {one['bytes_per_16_bits']:6.3f} bytes in 16 bits, guessing "
            f"{one['uniform_bits_per_byte']:.3f} bits per byte"
        )
    for code in ("ac", "tunstall"):
        made = results[f"compile_{code}"]
        yield (
            f"compiled {code} from {results['m1_parameters']:,} parameters in "
            f"{made['wall_s']:.0f} s ({made['processor_s']:.0f} s of processors), "
            f"{made['m1_contexts']:,} contexts, {made['expected_bytes']:.2f} bytes expected"
        )
    for name, judge in (("exactness", "the reference"), ("exactness_by_answers", "its answers")):
        exact = results[name]
        yield (
            f"{exact['bytes']:,} bytes in {exact['documents']:,} documents: {exact['equal']:,} "
            f"equal to {judge} bit for bit, {exact['came_back']:,} came back"
        )


def _is_ours(name: str) -> bool:
    return name.startswith(("infowindow", "M1"))


def plot(results: dict[str, Any], path: Path) -> None:
    """Speeds, and bytes in 16 bits of every code."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    speed, ratio = figure.subplots(1, 2)
    names = [one["name"] for one in results["speed"]]
    for shift, way in ((-0.2, "encode"), (0.2, "decode")):
        values = [one[f"{way}_mb_per_s"] for one in results["speed"]]
        speed.barh(np.arange(len(names)) + shift, values, 0.4, label=way)
    speed.set(xscale="log", xlabel="MB of text per second and core", yticks=range(len(names)))
    speed.set_yticklabels(names)
    speed.invert_yaxis()
    speed.legend()
    codes = [one["code"] for one in results["ratios"]]
    ratio.barh(codes, [one["bytes_per_16_bits"] for one in results["ratios"]], color="tab:green")
    ratio.set(xlabel="bytes of text in 16 bits")
    ratio.invert_yaxis()
    figure.savefig(path, dpi=120)
