"""The first signal asks, the second insists."""

import os
import signal

import pytest

from megascale.runtime import signals
from megascale.runtime.signals import StopRequest


@pytest.fixture
def stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    request = StopRequest()
    yield request
    request.restore()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_is_remembered(stop, number):
    assert not stop
    os.kill(os.getpid(), number)
    assert stop and stop.signal_name == signal.Signals(number).name


def test_an_echo_is_not_a_second_request(stop):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal_name == "SIGINT"


def test_a_second_one_stops_at_once():
    request, calls = StopRequest(echo_s=0.0), []
    request.at_first = lambda: calls.append(request.signal_name)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert calls == ["SIGINT"]
    finally:
        request.restore()


def test_nohup_is_heeded(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not request and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    request.restore()
    signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    StopRequest().restore()
    assert signal.getsignal(signal.SIGTERM) == before
