"""The compiled dictionary and its coder against the reference, and what becomes of bad files."""

import builtins
import functools
import hashlib
import heapq
import json
import os
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from toy_m1 import random_m1, small_book

from megascale.cli import main
from megascale.errors import UserError
from megascale.infowindow import expand as expand_module
from megascale.infowindow import stream as streams
from megascale.infowindow.checked_files import digest_of
from megascale.infowindow.codebook import KIND, Codebook, TreeCoder
from megascale.infowindow.expand import NUM_CODES
from megascale.infowindow.m1 import M1
from megascale.infowindow.reference import ReferenceCoder
from megascale.infowindow.stream import HEADER, decode_file, encode_file
from megascale.infowindow.tables import byte_tables
from megascale.infowindow.walk import Tree


def reference():
    return ReferenceCoder(random_m1(layers=1), 16)


REFERENCE = reference()
TEXTS = st.one_of(st.binary(max_size=200), st.text(max_size=80).map(str.encode))


def mixed_text(size):
    """Code, prose, other scripts, numbers as bytes, and noise, in equal parts."""
    code = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
    scripts = "".join(chr(c) for c in range(0x20, 0x30000, 7) if not 0xD800 <= c < 0xE000).encode()
    german = "Für Bücher müßte man Größe und Straße öfter prüfen. ".encode() * 400
    numbers = np.arange(5000, dtype="<i4").tobytes()
    noise = np.random.default_rng(0).bytes(size)
    return b"".join(one[: size // 5] for one in (code, scripts, german, numbers, noise))


def test_every_string_has_the_code_of_the_reference():
    strings = small_book().strings
    assert len(strings) == len(set(strings)) == NUM_CODES
    chosen = [strings[i] for i in range(0, NUM_CODES, 401)]
    for code, string in zip(range(0, NUM_CODES, 401), chosen):
        assert REFERENCE.encode([string])[0].tolist() == [code >> 8, code & 255], string


@settings(max_examples=60)
@given(st.lists(TEXTS, max_size=4))
def test_documents_come_back_and_are_coded_as_the_reference_does(texts):
    coder = small_book().coder
    coded = coder.encode(texts)
    assert coder.decode(coded) == texts
    assert [one.tolist() for one in coded] == [one.tolist() for one in REFERENCE.encode(texts)]


def test_compiled_and_reference_agree_on_mixed_text():
    text = mixed_text(20_000)
    (coded,) = small_book().coder.encode([text])
    assert (coded == REFERENCE.encode([text])[0]).all()
    assert small_book().coder.decode([coded]) == [text]


@settings(max_examples=30)
@given(TEXTS, st.integers(0, 200))
def test_parts_join(text, cut):
    coder = small_book().coder
    (whole,) = coder.encode([text])
    first, held = coder.encode_part(text[:cut], is_end=False)
    rest, last = coder.encode_part(text[held:], is_end=True)
    assert np.concatenate([first, rest]).tolist() == whole.tolist()
    assert held + last == len(text) and held <= min(cut, len(text))


def test_tunstall_takes_the_most_probable_strings(monkeypatch):
    """Against brute force, which asks the model after every string of the dictionary."""
    monkeypatch.setattr(expand_module, "NUM_CODES", 2000)
    told, model = [], random_m1(layers=1)
    found = expand_module.expand(model, "tunstall", told.append)
    strings = found.strings
    assert sum(told) == len(set(strings)) == 2000 and strings == sorted(strings)
    tables = byte_tables(model.weights_after([b"", *strings]))
    frequencies = dict(zip([b"", *strings], np.diff(tables, axis=1) / 2**14))

    @functools.cache
    def chance(string):
        return chance(string[:-1]) * frequencies[string[:-1]][string[-1]] if string else 1.0

    assert found.probabilities.tolist() == [chance(one) for one in strings]
    inside, known = min(chance(one) for one in strings if len(one) > 1), set(strings)
    for parent in strings:
        for byte in np.flatnonzero(chance(parent) * frequencies[parent] > inside).tolist():
            assert parent + bytes([byte]) in known
    assert all(one[:-1] in known for one in strings if len(one) > 1)


class EvenModel:
    """Bytes that do not depend on what came before: some likely, many of them equally so."""

    def __init__(self, weights):
        self._weights = np.ones(257, np.int64)
        self._weights[list(weights)] = list(weights.values())

    def weights_after(self, contexts):
        return np.tile(self._weights, (len(contexts), 1))


def best_first(model, size):
    """The dictionary, one string at a time: always the most probable, of equal ones the first."""
    row = np.diff(byte_tables(model.weights_after([b""])), axis=1)[0] / 2**14
    chosen = {bytes([byte]): float(row[byte]) for byte in range(256)}
    waiting = []

    def grow(parent):
        for byte in range(256):
            child = -(chosen[parent] * float(row[byte])), parent + bytes([byte])
            heapq.heappush(waiting, child)

    for one in list(chosen):
        grow(one)
    while len(chosen) < size:
        chance, one = heapq.heappop(waiting)
        chosen[one] = -chance
        grow(one)
    edge = -chance
    return dict(sorted(chosen.items())), sum(-chance == edge for chance, _ in waiting)


@pytest.mark.parametrize("batch", [1, 7, 2048])
@pytest.mark.parametrize(
    "weights",
    [
        dict.fromkeys(range(256), 1),
        dict.fromkeys(b"abcd", 1 << 20),
        {97: 1 << 20, 98: 1 << 19, 99: 1 << 18, 120: 1 << 19, 121: 1 << 18},
        {122: 1 << 20, 109: 1 << 19, 97: 1 << 18, 0: 1 << 18},
    ],
    ids=["all", "four", "first likely", "last likely"],
)
def test_of_equally_probable_strings_the_first_are_taken(monkeypatch, weights, batch):
    """Whatever the order in which they are found: against best first, with ties at the edge."""
    monkeypatch.setattr(expand_module, "_BATCH", batch)
    model, ties = EvenModel(weights), 0
    for size in (257, 300, 345, 401):
        monkeypatch.setattr(expand_module, "NUM_CODES", size)
        found = expand_module.expand(model, "tunstall", lambda count: None)
        expected, left_out = best_first(model, size)
        ties += left_out
        assert found.strings == list(expected)
        assert found.probabilities.tolist() == list(expected.values())
    assert ties


def test_windows_and_threads_change_nothing():
    text, coder = mixed_text(30_000), small_book().coder
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda one: coder.encode([one])[0], [text] * 8))
    assert all((one == both[0]).all() for one in both)


BOOK, STREAM = "f449d9ef975f0187", "2b114f69fc6adc2c"


def test_the_same_bytes_on_every_python_and_machine():
    text = "".join(map(chr, range(0x20, 0xD800, 3))).encode() + bytes(range(256)) * 20
    (stream,) = small_book().coder.encode([text])
    assert small_book().digest.startswith(BOOK)
    assert hashlib.sha256(stream.tobytes()).hexdigest().startswith(STREAM)


@settings(max_examples=20)
@given(st.sets(st.lists(st.sampled_from([0, 1, 2, 255]), min_size=2, max_size=5).map(bytes)))
def test_any_tree_is_walked_as_a_set_of_strings_would_be(longer):
    closed = {one[:i] for one in longer for i in range(1, len(one) + 1)}
    strings = sorted(closed | {bytes([byte]) for byte in range(256)})
    tree = Tree(strings)
    text = np.random.default_rng(len(longer)).choice([0, 1, 2, 255], 300).astype(np.uint8)
    codes, held = tree.encode(text)
    raw, start, known = text.tobytes(), 0, set(strings)
    for code in codes.tolist():
        end = start + 1
        while end < len(raw) and raw[start : end + 1] in known:
            end += 1
        assert strings[code] == raw[start:end]
        start = end
    assert start == held == len(raw)
    assert (tree.decode(codes) == text).all()


def write(folder, text, name="in"):
    path = folder / name
    path.write_bytes(text)
    return path


def nothing(count):
    pass


@pytest.mark.parametrize("size", [0, 1, 4095, 30_000])
def test_files_come_back_whatever_their_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(streams, "_CHUNK_WINDOWS", 700)
    book, text = small_book(), mixed_text(40_000)[:size]
    source = write(tmp_path, text)
    told = []
    sizes = encode_file(source, tmp_path / "coded", book, book.windows, told.append)
    assert sum(told) == size == sizes.text_bytes
    (stream,) = book.coder.encode([text])
    assert (tmp_path / "coded").read_bytes()[HEADER.size :] == stream.tobytes()
    decode_file(tmp_path / "coded", tmp_path / "out", book, nothing)
    assert (tmp_path / "out").read_bytes() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coded", "in", "out"]


def test_bad_streams_are_refused_and_leave_nothing(tmp_path):
    book, text = small_book(), mixed_text(5_000)
    coded, out = tmp_path / "coded", tmp_path / "out"
    encode_file(write(tmp_path, text), coded, book, book.windows, nothing)
    raw = coded.read_bytes()
    changed = bytearray(raw)
    changed[-1] ^= 1
    later = bytearray(raw)
    later[8] = 9
    other_bits, more_windows = bytearray(raw), bytearray(raw)
    other_bits[10] = 8
    more_windows[20] ^= 1
    for content, said in [
        (raw[:-1], "1 bytes of windows are missing; it was cut short"),
        (raw[:-2], "2 bytes of windows are missing; it was cut short"),
        (raw + b"x", "more than its windows; it was cut short or changed"),
        (bytes(other_bits), "speaks of windows of 8 bits; it was changed"),
        (bytes(more_windows), "it was cut short or changed"),
        (raw[:20], "not a file that megascale infowindow encode wrote"),
        (b"", "not a file that megascale infowindow encode wrote"),
        (text, "not a file that megascale infowindow encode wrote"),
        (bytes(changed), "does not decode to the text it was made of"),
        (bytes(later), "coded by version 9, this program reads version 1"),
    ]:
        bad = write(tmp_path, content, "bad")
        with pytest.raises(UserError, match=said):
            decode_file(bad, out, book, nothing)
    with pytest.raises(UserError, match="coded by codebook .* and this one is"):
        decode_file(coded, out, Codebook({**book.facts, "m1": "?"}, book.arrays), nothing)
    with pytest.raises(UserError, match="No such file"):
        decode_file(tmp_path / "none", out, book, nothing)
    for target, said in [
        (tmp_path / "no" / "folder", "no such folder; make it, or choose another place"),
        (tmp_path, "there, and not a file; choose another name"),
        (Path("/dev/null"), "there, and not a file; choose another name"),
        (Path("."), "there, and not a file; choose another name"),
    ]:
        with pytest.raises(UserError, match=said):
            encode_file(coded, target, book, book.windows, nothing)
    assert not out.exists() and not list(tmp_path.glob(".tmp-*"))


def test_what_is_interrupted_leaves_nothing_and_the_old_file_stays(tmp_path):
    book, source = small_book(), write(tmp_path, mixed_text(5_000))
    (tmp_path / "coded").write_bytes(b"old")

    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_file(source, tmp_path / "coded", book, book.windows, interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coded", "in"]
    assert (tmp_path / "coded").read_bytes() == b"old"


def test_no_name_but_that_of_the_output_is_touched(tmp_path):
    """A fixed name beside it would be an input, someone's file, or that of another who writes."""
    book, text = small_book(), mixed_text(5_000)
    path = write(tmp_path, text, "out.partial")
    encode_file(path, tmp_path / "out", book, book.windows, nothing)
    assert path.read_bytes() == text
    book.save(tmp_path / "out")
    assert path.read_bytes() == text
    longest = tmp_path / ("\u00fc" * 127)

    def another(count):
        encode_file(path, longest, book, book.windows, nothing)

    before = os.umask(0o027)
    try:
        encode_file(path, longest, book, book.windows, another)
    finally:
        os.umask(before)
    assert longest.stat().st_mode & 0o777 == 0o640
    decode_file(longest, longest, book, nothing)
    assert longest.read_bytes() == text
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.partial", longest.name}


def test_errors_of_the_system_name_the_output(tmp_path, monkeypatch):
    book, source = small_book(), write(tmp_path, b"text")
    with pytest.raises(UserError, match="xxx: cannot be made: File name too long"):
        encode_file(source, tmp_path / ("x" * 260), book, book.windows, nothing)

    def full(*_):
        raise OSError(28, "No space left on device", "partial")

    monkeypatch.setattr(os, "replace", full)
    for write_it in (
        lambda: encode_file(source, tmp_path / "out", book, book.windows, nothing),
        lambda: book.save(tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="out: cannot be made: No space left"):
            write_it()
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_file_may_take_its_own_place_and_pipes_are_read(tmp_path):
    book, text = small_book(), mixed_text(9_000)
    path, pipe = write(tmp_path, text), tmp_path / "pipe"
    encode_file(path, path, book, book.windows, nothing)
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_bytes, path.read_bytes())
        decode_file(pipe, path, book, nothing)
    assert path.read_bytes() == text


@settings(max_examples=200)
@given(st.binary(max_size=100), st.integers(0, HEADER.size), st.booleans())
def test_any_other_stream_is_one_clear_error(content, kept, with_digest):
    book = small_book()
    header = HEADER.pack(streams.MAGIC, 1, 16, 9, 4, bytes.fromhex(book.digest), bytes(16))
    raw = (header[:kept] + content)[: HEADER.size + 100]
    if with_digest:  # so that what comes behind it is looked at
        raw = raw[:28] + header[28:60] + raw[60:]
    with tempfile.TemporaryDirectory() as folder, pytest.raises(UserError):
        decode_file(write(Path(folder), raw), Path(folder) / "out", book, nothing)


@pytest.mark.parametrize("bits", [16, 32])
@settings(max_examples=60)
@given(st.binary(max_size=24))
def test_every_whole_number_of_windows_is_a_text(bits, content):
    """Codes need not be those that the encoder would choose, but each has its string."""
    coder = small_book().coder if bits == 16 else wide_book().coder
    stream = np.frombuffer(content, np.uint8)
    if len(content) * 8 % bits:
        with pytest.raises(UserError, match="no whole number of windows"):
            coder.decode([stream])
    else:
        (text,) = coder.decode([stream])
        assert len(text) >= len(content) * 8 // bits
        assert coder.decode(coder.encode([text])) == [text]


@functools.cache
def wide_book():
    return Codebook.compile(random_m1(layers=1), "ac", 32, nothing)


def test_codebooks_come_back_and_bad_ones_are_refused(tmp_path):
    path, book = tmp_path / "b16.safetensors", small_book()
    for target in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="there, and not a file; choose another name"):
            book.save(target)
    book.save(path)
    again = Codebook.open(path)
    assert again.strings == book.strings and again.digest == book.digest
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[-1000] ^= 1

    def forged(facts=None, version=1, **arrays):
        facts = dict(book.facts) | (facts or {})
        arrays = {name: np.ascontiguousarray(a) for name, a in (book.arrays | arrays).items()}
        digest = digest_of(KIND, arrays, facts)
        said = {"kind": KIND, "version": version, "facts": facts, "sha256": digest}
        return save(arrays, {"megascale": json.dumps(said)})

    lengths = np.array(book.arrays["length"])
    lengths[0] = 2
    chain = np.r_[np.arange(1, NUM_CODES - 254), np.ones(255)].astype(np.uint16)
    bytes_of_chain = np.r_[np.zeros(NUM_CODES - 255), np.arange(1, 256)].astype(np.uint8)
    for content, said in [
        (bytes(flipped), "damaged, its checksum is not that of its content"),
        (raw[: len(raw) // 2], "damaged or no megascale.infowindow.codebook file"),
        (b"", "damaged or no megascale.infowindow.codebook file"),
        (forged(version=2), "codebook of version 2, this program reads version 1"),
        (save({"a": np.zeros(1)}), "holds something else, no megascale.infowindow.codebook"),
        (forged({"code": "huffman"}), "no code that this program knows"),
        (forged({"bits": 32}), "no code that this program knows"),
        (forged(length=lengths), "no code that this program knows"),
        (forged(length=chain, last=bytes_of_chain), "no code that this program knows"),
        (forged(last=np.zeros(NUM_CODES, np.uint8)), "no code that this program knows"),
        (forged(last=book.arrays["last"][:-1], length=lengths[:-1]), "no code that this program"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            Codebook.open(path)
        assert "megascale infowindow compile" in str(error.value)
    with pytest.raises(UserError, match="a folder; give the file"):
        Codebook.open(tmp_path)
    random_m1(layers=1).save(path)
    with pytest.raises(UserError, match="holds megascale.infowindow.m1, no megascale.infowindow.c"):
        Codebook.open(path)


def test_codes_without_a_dictionary_keep_m1(tmp_path):
    model = random_m1(layers=1)
    for code, bits in (("ac", 32), ("plain", 0)):
        Codebook.compile(model, code, bits, nothing).save(tmp_path / "book")
        book = Codebook.open(tmp_path / "book")
        assert (book.code, book.bits, book.is_compiled) == (code, bits, False)
        texts = [b"some text", b"", b"\xff"]
        assert book.coder.decode(book.coder.encode(texts)) == texts
    with pytest.raises(UserError, match="plain AC codes a document as one number"):
        book.windows  # noqa: B018


@pytest.mark.parametrize(
    "code,bits,said",
    [
        ("huffman", 16, "code huffman: choose one of ac, tunstall, plain"),
        ("tunstall", 24, "it needs --bits 16"),
        ("ac", 20, "windows of 20 bits: choose one of 16, 24, 32, 64, 128"),
        ("plain", 16, "plain AC has no windows"),
    ],
)
def test_codes_that_there_are_not(code, bits, said):
    with pytest.raises(UserError, match=said):
        Codebook.compile(random_m1(layers=1), code, bits, nothing)


def run(capsys, *words):
    status = main(["infowindow", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err.strip().splitlines()[-1] if status else err


def test_the_commands(tmp_path, capsys):
    m1, book = tmp_path / "m1.safetensors", tmp_path / "b32.safetensors"
    random_m1(layers=1).save(m1)
    status, out, _ = run(capsys, "compile", m1, "--bits", 32, "--out", book)
    assert status == 0 and "windows of 32 bits, by M1 while coding" in out
    text = write(tmp_path, b"a text of some words\n" * 3)
    for more in ([], ["--reference"], ["--reference", "--m1", m1]):
        status, out, _ = run(capsys, "encode", text, tmp_path / "x", "--codebook", book, *more)
        assert status == 0 and "63 bytes in" in out
        status, out, _ = run(capsys, "decode", tmp_path / "x", tmp_path / "y", "--codebook", book)
        assert status == 0 and (tmp_path / "y").read_bytes() == text.read_bytes()
    other = random_m1(seed=1, layers=1)
    other.save(tmp_path / "other")
    encode = ["encode", text, tmp_path / "x", "--codebook", book]
    small_book().save(tmp_path / "b16.safetensors")
    for words, said in [
        ([*encode, "--reference", "--m1", tmp_path / "other"], "is not the one that the codebook"),
        ([*encode, "--m1", m1], "--m1 is for --reference"),
        (["encode", tmp_path / "no", tmp_path / "x", "--codebook", book], "no: No such file"),
        (["compile", m1, "--code", "tunstall", "--bits", 24, "--out", book], "needs --bits 16"),
        (["compile", book, "--out", tmp_path / "z"], "holds megascale.infowindow.codebook, no"),
        (["inspect", book], "only a code with a dictionary"),
        (["inspect", "."], "a folder; give the file that megascale infowindow compile wrote"),
        (["encode", "IN", "OUT", "--codebook", "."], "a folder; give the file that megascale"),
        (["inspect", tmp_path / "b16.safetensors", "--text", tmp_path / "no"], "No such file"),
        (["inspect", tmp_path / "b16.safetensors", "--rows", 0], "must be at least 1"),
    ]:
        status, _, line = run(capsys, *words)
        assert status == 2 and said in line and line.startswith("megascale: "), line


def test_inspect_shows_what_windows_hold(tmp_path, capsys):
    small_book().save(tmp_path / "b16.safetensors")
    text = write(tmp_path, "für mehr\nfür mehr".encode())
    status, out, _ = run(capsys, "inspect", tmp_path / "b16.safetensors", "--text", text)
    assert status == 0 and "19 bytes in" in out and "share of the text" in out
    assert (tmp_path / "b16.png").read_bytes().startswith(b"\x89PNG")


def deny(monkeypatch, folder):
    """The system's answer below a folder without search permission; tests may run as root."""

    def denied(answer, path, *more, **options):
        if isinstance(path, (str, os.PathLike)) and str(folder) + os.sep in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return answer(path, *more, **options)

    for module, name in ((os, "stat"), (os, "open"), (os, "mkdir"), (builtins, "open")):
        monkeypatch.setattr(module, name, functools.partial(denied, getattr(module, name)))


@pytest.mark.parametrize("which", ["in", "out", "codebook", "m1"])
def test_folders_that_cannot_be_searched(tmp_path, capsys, monkeypatch, which):
    places = {name: tmp_path / name for name in ("in", "out", "codebook", "m1")}
    places[which] = tmp_path / "closed" / which
    places[which].parent.mkdir()
    small_book().save(places["codebook"])
    random_m1(layers=1).save(places["m1"])
    places["in"].write_bytes(b"some text")
    coding = [places["in"], places["out"], "--codebook", places["codebook"]]
    words = {
        "m1": ["compile", places["m1"], "--out", places["out"]],
        "codebook": ["inspect", places["codebook"]],
    }.get(which, ["encode", *coding, "--reference", "--m1", places["m1"]])
    deny(monkeypatch, places[which].parent)
    for one in [words] if which == "m1" else [words, ["decode", *coding]]:
        status, _, line = run(capsys, *one)
        assert status == 2 and f"{places[which]}: " in line and "Permission denied; " in line


@pytest.mark.parametrize("kind", ["codebook", "m1"])
def test_what_cannot_be_read_is_named_for_what_it_is(tmp_path, capsys, kind):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, said in [
        (tmp_path, "a folder; give the file that megascale infowindow"),
        (Path("/dev/null"), "a device or a pipe; give the file that megascale infowindow"),
        (pipe, "a device or a pipe; give the file that megascale infowindow"),
        (tmp_path / "none", "no such file; make it with megascale infowindow"),
        (tmp_path / ("x" * 260), "File name too long; give a file that can be read"),
    ]:
        words = (
            ["inspect", path] if kind == "codebook" else ["compile", path, "--out", tmp_path / "z"]
        )
        status, _, line = run(capsys, *words)
        assert status == 2 and f"{path}: {said}" in line, line


def test_compile_looks_first_whether_a_file_can_be_made(tmp_path, capsys, monkeypatch):
    random_m1(layers=1).save(tmp_path / "m1")
    monkeypatch.setattr(Codebook, "compile", None)
    long = tmp_path / ("x" * 260)
    for out, said in [
        (Path("/proc/x.safetensors"), "No such file or directory"),
        (Path("/proc/x/y.safetensors"), "No such file or directory"),
        (tmp_path / "m1" / "y.safetensors", f"{tmp_path / 'm1'} is no folder"),
        (long, "File name too long"),
    ]:
        status, _, line = run(capsys, "compile", tmp_path / "m1", "--out", out)
        assert status == 2 and f"{out}: cannot be made: {said}; choose another place" in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["m1"]


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    m1, book = tmp_path / "m1.safetensors", tmp_path / "b.png"
    random_m1(layers=1).save(m1)
    small_book().save(book)
    (tmp_path / "link").symlink_to(book)
    text = write(tmp_path, b"some text", "text.png")
    before = {path.name: path.read_bytes() for path in (m1, book, text)}
    for words, said in [
        (["compile", m1, "--out", m1], f"{m1}: would take the place of {m1}, which is read"),
        (["encode", text, book, "--codebook", tmp_path / "link"], f"{book}: would take the place"),
        (["encode", text, m1, "--codebook", book, "--reference"], "would take the place of"),
        (["decode", text, book, "--codebook", book], "would take the place of"),
        (["inspect", book], f"{book}: would take the place of {book}"),
        (["inspect", book, "--picture", text, "--text", text], "would take the place of"),
    ]:
        status, _, line = run(capsys, *words)
        assert status == 2 and said in line, line
    assert {path.name: path.read_bytes() for path in (m1, book, text)} == before


@pytest.mark.parametrize("name", ["m", "m.xyz", "m.jpgpng"])
def test_pictures_of_other_kinds_are_refused(tmp_path, capsys, name):
    small_book().save(tmp_path / "book")
    status, _, line = run(capsys, "inspect", tmp_path / "book", "--picture", tmp_path / name)
    assert status == 2 and f"{name}: must end in .png, .svg or .pdf" in line
    assert [p.name for p in tmp_path.iterdir()] == ["book"]


def test_a_frozen_m1_file_is_not_a_codebook_of_another_kind(tmp_path):
    small_book().save(tmp_path / "book")
    with pytest.raises(UserError, match="no megascale.infowindow.m1"):
        M1.open(tmp_path / "book")


def test_coding_needs_neither_torch_nor_m1(tmp_path):
    import subprocess

    small_book().save(tmp_path / "book")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from megascale.infowindow.tokenizer import InfoWindowTokenizer\n"
        "from pathlib import Path\n"
        f"tokenizer = InfoWindowTokenizer.load(Path({str(tmp_path / 'book')!r}))\n"
        "assert tokenizer.decode(tokenizer.encode('some text')) == 'some text'\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert isinstance(small_book().coder, TreeCoder)
