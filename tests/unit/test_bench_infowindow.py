"""What the benchmark and the reproduction of Equal-Info Windows say of what they measured."""

import bench_infowindow as bench
import pytest
import reproduce_infowindow as reproduce
from toy_m1 import random_m1, small_book


def test_mixed_text_is_exact():
    found = bench.exactness(random_m1(layers=1), small_book(), 0.01)
    assert found["bytes"] == 10_000 and found["documents"] >= 2
    assert found["equal"] == found["came_back"] == found["documents"]


def test_answers_of_the_reference_tell_right_codebooks_from_wrong_ones(monkeypatch):
    model, book = random_m1(layers=1), small_book()
    right, goes_on = bench.answers(model, book.strings)
    assert right.all()
    inside = {one for one in book.strings if len(one) > 1}
    assert goes_on.sum() == len(inside)
    assert all(goes_on[book.strings.index(one[:-1]), one[-1]] for one in list(inside)[:50])
    windows = [len(book.coder.encode([text])[0]) // 2 for text in bench.mixed(20_000)]
    for answers, equal in (
        ((right, goes_on), len(windows)),
        ((~right, goes_on), windows.count(0)),
        ((right, ~goes_on), windows.count(0) + windows.count(1)),
    ):
        monkeypatch.setattr(bench, "answers", lambda *_, given=answers: given)
        found = bench.exactness_by_answers(model, book, 0.02)
        assert found["came_back"] == found["documents"] >= 2
        assert found["equal"] == equal


def test_mixed_text_is_of_every_kind_and_always_the_same():
    first, second = list(bench.mixed(300_000)), list(bench.mixed(300_000))
    assert first == second and sum(map(len, first)) == 300_000 and first[0] == b""
    kinds = list(bench.kinds_of_text(5_000))
    assert len(kinds) == 6 and all(len(kind) >= 1_000 for kind in kinds)
    assert "\u4e2d" in kinds[-1].decode()


def test_ratios_rise_with_the_window():
    texts = [b"some words of some text, and some more of them " * 30]
    found = bench.ratios(random_m1(layers=1), {"ac": small_book()}, texts, 1400)
    sizes = {one["code"]: one["bytes_per_16_bits"] for one in found}
    assert sizes["ac, 16 bits"] < sizes["ac, 64 bits"] and len(found) == 8
    for one in found:
        assert one["uniform_bits_per_byte"] * one["bytes_per_16_bits"] == pytest.approx(16)


def test_the_benchmark_prints_and_draws(tmp_path):
    peers = [*bench.ours({"ac": small_book()}, ["some text" * 9]), _plain_peer()]
    made = {"wall_s": 1, "processor_s": 1, "m1_contexts": 5, "expected_bytes": 2, "longest": 3}
    results = {
        "m1_parameters": 5,
        "corpus": "x",
        "text_mb": 1.0,
        "speed": bench.speeds(peers, 2),
        "ratios": [{"code": "a", "bytes_per_16_bits": 2.0, "uniform_bits_per_byte": 8.0}],
    }
    exact = {"bytes": 1, "documents": 1, "equal": 1, "came_back": 1}
    results |= dict.fromkeys(("exactness", "exactness_by_answers"), exact)
    results |= {f"compile_{code}": made for code in ("ac", "tunstall")}
    lines = list(bench.report(results))
    assert "1.000x" in lines[2] and lines[2].startswith("plain")
    bench.plot(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def _plain_peer():
    texts = ["some text" * 5000]
    return bench.Peer("plain", lambda t: [list(one) for one in t], lambda x: texts, texts)


def curve(method, per_token, ends, scores):
    return {
        "method": method,
        "bytes_per_token": per_token,
        "uniform": 8.0,
        "unigram": 4.0,
        "flops_per_byte": 1e6,
        "tokens": ends,
        "bits_per_byte": scores,
    }


def test_methods_are_compared_at_equal_bytes_and_at_equal_tokens(tmp_path):
    curves = [
        curve("bytes", 1.0, [0, 100, 400], [8.0, 4.0, 2.0]),
        curve("windows", 4.0, [0, 50, 100], [8.0, 5.0, 3.0]),
        curve("windows", 4.0, [0, 50, 100], [8.0, 5.0, 3.2]),
    ]
    one, two = reproduce.compare(curves)
    assert (one["at_equal_bytes"], one["at_equal_tokens"]) == (2.0, 4.0)
    assert two["at_equal_bytes"] == two["at_equal_tokens"] == pytest.approx(3.1)
    assert two["spread"] == pytest.approx(0.2) and two["equal_tokens"] == 100
    lines = list(reproduce.report({"bytes": 400, "seeds": 2, "methods": [one, two]}))
    assert [line.split()[0] for line in lines[2:]] == ["bytes", "windows"]
    reproduce.plot(curves, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
