"""The code itself: the reference coder against brute force, and the acceptance facts of the paper
(arXiv 2404.03626; numbers in names are those of its facts in the issue)."""

import functools
from fractions import Fraction
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_m1 import FormulaModel

from megascale.errors import UserError
from megascale.infowindow import expand as expand_module
from megascale.infowindow.direct import PlainCoder, WindowCoder
from megascale.infowindow.reference import (
    WINDOW_BITS,
    Tables,
    decode,
    decode_plain,
    decode_window,
    encode,
    encode_plain,
    encode_window,
    from_tokens,
    gzip_tokens,
    information,
    plain_tables,
    repeated,
    share,
    static_table,
    to_tokens,
)
from megascale.infowindow.tables import TOTAL, byte_tables, cumulative

TEXTS = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from([b"a", b"b"]), max_size=60).map(b"".join),
    st.text(max_size=20).map(str.encode),
)
MODEL = FormulaModel(peak=5.0)
TABLES = Tables(MODEL)


BRUTE_BITS = 14  # the fewest with which every byte has a code


def ranges_of(tables, bits):
    """All strings with a code by brute force: string -> (low, count)."""
    found, level = {}, {b"": (0, 1 << bits)}
    while level:
        children = {}
        for string, (low, count) in level.items():
            own = int(string != b"")
            edges = [edge * (count - own) // TOTAL for edge in tables.of(string)]
            for byte in np.flatnonzero(np.diff(edges)).tolist():
                inside = edges[byte + 1] - edges[byte]
                children[string + bytes([byte])] = (low + own + edges[byte], inside)
        found |= children
        level = children
    return found


@functools.cache
def all_ranges(seed, peak):
    tables = Tables(FormulaModel(bytes(range(97, 105)), 1, peak, seed))
    return tables, ranges_of(tables, BRUTE_BITS)


@pytest.mark.parametrize("seed,peak", [(1, 4.0), (2, 9.0)])
def test_codes_and_strings_correspond_one_to_one(seed, peak):
    tables, ranges = all_ranges(seed, peak)
    owners = {low: string for string, (low, _) in ranges.items()}
    assert sorted(owners) == list(range(1 << BRUTE_BITS)) and len(ranges) == 1 << BRUTE_BITS
    assert sorted(ranges) == [owners[code] for code in sorted(owners)], "codes sort as strings do"
    for code in range(0, 1 << BRUTE_BITS, 997):
        assert decode_window(code, BRUTE_BITS, tables) == owners[code]


def test_compiling_finds_the_strings_of_brute_force(monkeypatch):
    monkeypatch.setattr(expand_module, "NUM_CODES", 1 << BRUTE_BITS)
    tables, ranges = all_ranges(2, 9.0)
    found = expand_module.expand(FormulaModel(bytes(range(97, 105)), 1, 9.0, 2), "ac", ignore)
    assert found.strings == sorted(ranges) and max(map(len, found.strings)) > 20
    for string, chance in zip(found.strings[::499], found.probabilities[::499]):
        bits = information(string, [tables.of(string[:i]) for i in range(len(string))])
        assert -log2(chance) == pytest.approx(bits)


def ignore(count):
    pass


@settings(max_examples=60)
@given(st.lists(st.sampled_from(list(b"abcdefgh\xff")), min_size=1, max_size=60).map(bytes))
def test_a_window_is_the_longest_string_with_a_code(text):
    tables, ranges = all_ranges(1, 4.0)
    code, end = encode_window(text, 0, BRUTE_BITS, tables)
    assert ranges[text[:end]][0] == code
    assert not any(text[:longer] in ranges for longer in range(end + 1, len(text) + 1))


@pytest.mark.parametrize("bits", WINDOW_BITS)
@settings(max_examples=25)
@given(text=TEXTS)
def test_1_every_document_comes_back(bits, text):
    codes = encode(text, bits, TABLES)
    assert decode(codes, bits, TABLES) == text
    assert (codes == []) == (text == b"")


@pytest.mark.parametrize("bits", WINDOW_BITS)
@settings(max_examples=25)
@given(text=TEXTS, prefix=TEXTS)
def test_2_windows_have_exactly_their_bits_and_do_not_know_what_was_before(bits, text, prefix):
    codes = encode(text, bits, TABLES)
    assert all(0 <= code < 1 << bits for code in codes)
    lengths = [encode_window(text, s, bits, TABLES) for s in starts_of(text, bits)]
    assert [code for code, _ in lengths] == codes
    before = encode(prefix, bits, TABLES)
    start = encode_window(prefix, 0, bits, TABLES)[1] if prefix else 0
    joined = prefix[:start] + text
    if prefix and starts_of(joined, bits)[1:2] == [start]:  # the prefix ends where a window does
        assert encode(joined, bits, TABLES) == [before[0], *codes]


def starts_of(text, bits):
    starts, start = [], 0
    while start < len(text):
        starts.append(start)
        start = encode_window(text, start, bits, TABLES)[1]
    return starts


@settings(max_examples=40)
@given(text=TEXTS, bits=st.sampled_from(WINDOW_BITS))
def test_3_one_more_byte_has_no_code(text, bits):
    start = 0
    while start < len(text):
        code, end = encode_window(text, start, bits, TABLES)
        low, count = 0, 1 << bits
        for i in range(start, end):
            low, count = share(TABLES.of(text[start:i]), text[i], low, count, i == start)
        assert (low, count > 0) == (code, True)
        if end < len(text):
            assert share(TABLES.of(text[start:end]), text[end], low, count, False)[1] == 0
        start = end


@settings(max_examples=40)
@given(TEXTS)
def test_4_plain_ac_is_within_two_bits_of_the_information(text):
    tables = list(plain_tables(text, MODEL))
    bits = information(text, tables) + 14 - log2(tables[-1][257] - tables[-1][256])
    for size in (8, 16):
        tokens = encode_plain(text, tables, size)
        assert all(0 <= token < 1 << size for token in tokens)
        assert bits <= len(tokens) * size <= bits + 2 + size
    assert decode_plain(encode_plain(text, tables), MODEL) == text


def sample(model, length, seed=0):
    """A text that the model itself writes."""
    random, text = np.random.default_rng(seed), b""
    while len(text) < length:
        table = byte_tables(model.weights_after([text]))[0]
        place = int(random.integers(TOTAL))
        text += bytes([int(np.searchsorted(table, place, side="right")) - 1])
    return text


def test_4_windows_hold_almost_their_bits():
    text = sample(MODEL, 1500)
    for bits in (16, 32, 128):
        held = [information(one, tables_along(one)) for one in windows(text, bits)]
        # what is left of a window is less than the next byte takes, and the strings' own codes
        assert bits - 4.0 < np.mean(held[:-1]) <= bits + 0.5


def windows(text, bits):
    starts = [*starts_of(text, bits), len(text)]
    return [text[a:b] for a, b in zip(starts, starts[1:])]


def tables_along(text):
    return [TABLES.of(text[:i]) for i in range(len(text))]


def test_5_larger_windows_hold_more_per_bit():
    text = sample(MODEL, 2000)
    ratios = [8 * len(text) / (bits * len(encode(text, bits, TABLES))) for bits in WINDOW_BITS]
    ratios.append(len(text) / len(encode_plain(text, plain_tables(text, MODEL))))
    assert ratios == sorted(ratios) and ratios[0] < 0.9 * ratios[-1]


def test_6_bits_per_byte_of_guessing_is_eight_over_the_ratio():
    text = sample(MODEL, 1000)
    codes = encode(text, 16, TABLES)
    tokens = to_tokens(codes, 16, 256)
    uniform = len(tokens) * log2(256) / len(text)
    assert uniform == pytest.approx(8 / (len(text) / len(tokens)))
    assert uniform == pytest.approx(len(to_tokens(codes, 16, 65536)) * 16 / len(text))


@settings(max_examples=60)
@given(st.sampled_from([16, 32, 64, 128]), st.data())
def test_8_tokens_of_16_bits_are_pairs_of_8(bits, data):
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=5))
    small, large = to_tokens(codes, bits, 256), to_tokens(codes, bits, 65536)
    assert large == [high << 8 | low for high, low in zip(small[::2], small[1::2])]
    assert from_tokens(small, bits, 256) == from_tokens(large, bits, 65536) == codes


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: to_tokens([1], 24, 65536), "24 bits cannot be cut into tokens of 16"),
        (lambda: to_tokens([1], 20, 256), "windows of 20 bits"),
        (lambda: to_tokens([1], 16, 1000), "a vocabulary of 1000"),
        (lambda: from_tokens([1, 2, 3], 16, 256), "no whole number of windows"),
        (lambda: from_tokens([1, 256], 16, 256), "token 256 is outside"),
        (lambda: decode([1 << 16], 16, TABLES), "code 65536 is outside"),
        (lambda: decode([-1], 16, TABLES), "code -1 is outside"),
        (lambda: decode_plain([0, 0], MODEL), "cut short"),
    ],
)
def test_bad_input_is_one_clear_line(call, said):
    with pytest.raises(UserError, match=said):
        call()


@pytest.mark.parametrize("bits", WINDOW_BITS)
def test_coders_in_batches_do_what_the_reference_does(bits):
    texts = [sample(MODEL, 300, seed) for seed in range(3)] + [b"", b"\x00\xff" * 20, b"a" * 200]
    coder = WindowCoder(MODEL, bits)
    streams = coder.encode(texts)
    for text, stream in zip(texts, streams):
        assert stream.tolist() == to_tokens(encode(text, bits, TABLES), bits, 256)
    assert coder.decode(streams) == texts
    part, held = coder.encode_part(texts[0], is_end=False)
    rest, last = coder.encode_part(texts[0][held:], is_end=True)
    assert np.concatenate([part, rest]).tolist() == streams[0].tolist()
    assert held + last == len(texts[0]) and 0 < last


def test_the_plain_coder_does_what_the_reference_does():
    texts = [sample(MODEL, 100), b"", b"\xff\x00"]
    coder = PlainCoder(MODEL)
    streams = coder.encode(texts)
    assert (
        streams[0].tolist()[: len(texts[0])]
        == (encode_plain(texts[0], plain_tables(texts[0], MODEL)) + [0])[: len(streams[0])]
    )
    assert coder.decode(streams) == texts


def test_static_ac_and_gzip_are_baselines():
    text = sample(MODEL, 2000)
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=257)
    table = static_table(counts)
    static = encode_plain(text, repeated(table, len(text)))
    bits = information(text, repeated(table, len(text))) + 14
    assert bits <= 8 * len(static) <= bits + 10
    assert len(encode_plain(text, plain_tables(text, MODEL))) < len(static)
    import zlib

    assert zlib.decompress(bytes(gzip_tokens(text))) == text


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**30), min_size=2, max_size=257))
def test_tables_have_no_zero_and_follow_the_weights(weights):
    (table,) = cumulative(np.array([weights]))
    assert table[0] == 0 and table[-1] == TOTAL and (np.diff(table) >= 1).all()
    whole = max(sum(weights), 1)
    for i, (weight, frequency) in enumerate(zip(weights, np.diff(table))):
        exact = Fraction(weight, whole) * (TOTAL - len(weights)) + 1
        if i != int(np.argmax(weights)):
            assert exact - 1 < frequency <= exact
