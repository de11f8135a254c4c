"""Loaded by every Python process of a drill, which puts this folder on their PYTHONPATH.

It does what cannot be done to a process from outside, so that the product needs no hooks for it:

DRILL_CONTROL    a file with two numbers, float64: so many seconds the wall clock is ahead, for
                 `time.time` of all Python code and the time stamps of events.jsonl; and the
                 rank, counted from 1, whose forward passes take SLOWER times as long
DRILL_NAN_EVERY  every so many steps all gradients are NaN
"""

import importlib.machinery
import mmap
import os
import sys
import time

SLOWER = 10


def _slow_down(step):
    forward, rank = step._forward, int(os.environ["RANK"])

    def slow_forward(*given):
        began = time.perf_counter()
        done = forward(*given)
        if _control[1] == rank + 1:
            time.sleep((SLOWER - 1) * (time.perf_counter() - began))
        return done

    step._forward = slow_forward


def _change_step(step):
    _spoil_gradients(step)
    _slow_down(step)


def _spoil_gradients(step):
    finish, every = step.finalize_model_grads, int(os.environ["DRILL_NAN_EVERY"])
    from megascale.runtime.heartbeat import STEP, pulse

    def finalize_model_grads(models, *given, **named):
        finish(models, *given, **named)
        if (pulse._page[STEP] + 1) % every == 0:
            for parameter in models[0].parameters():
                parameter.main_grad.fill_(float("nan"))

    step.finalize_model_grads = finalize_model_grads


def _shift_stamps(events):
    honest = events.datetime

    class Shifted(honest):
        @classmethod
        def now(cls, tz=None):
            return honest.fromtimestamp(time.time(), tz)

    events.datetime = Shifted


class _AfterImport:
    """Calls a function with a module once it is loaded."""

    def __init__(self, functions):
        self._functions = functions

    def find_spec(self, name, path, target=None):
        if name not in self._functions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load, change = spec.loader.exec_module, self._functions[name]

        def exec_module(module):
            load(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


_functions = {}
if "DRILL_CONTROL" in os.environ:
    with open(os.environ["DRILL_CONTROL"], "rb") as _file:
        _control = memoryview(mmap.mmap(_file.fileno(), 16, access=mmap.ACCESS_READ)).cast("d")
    _honest = time.time
    time.time = lambda: _honest() + _control[0]
    _functions["megascale.monitor.events"] = _shift_stamps
    if "RANK" in os.environ:
        _functions["megascale.training.step"] = _change_step
sys.meta_path.insert(0, _AfterImport(_functions))
