"""Learning-rate curves by name, as segments over tokens.

The infinite schedule is that of Ibrahim et al., arXiv 2403.08763, with the parts of their config.
Its constant phase does not depend on how long the run is, so that a checkpoint of it may go on to
any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

from megascale.config.optimizers import OPTIMIZERS
from megascale.config.schema import OptimConfig, SegmentConfig
from megascale.errors import UserError

T = TypeVar("T")
Segments = tuple[SegmentConfig, ...]
Curve = Literal["cosine", "infinite", "wsd", "constant", "anneal"]
AnnealShape = Literal["exponential", "linear", "cosine"]

RATES = ("lr", "min_lr", "constant_lr")
LENGTHS = ("warmup_tokens", "cooldown_tokens", "anneal_tokens")
USUAL_PERCENT = {"warmup_tokens": 1, "cooldown_tokens": 60, "anneal_tokens": 10}
"""Of the run, for each of LENGTHS."""
OPTIONS = (*RATES, *LENGTHS, "cooldown_shape", "anneal_shape")
USED: dict[Curve, tuple[str, ...]] = {
    "cosine": ("lr", "min_lr", "warmup_tokens"),
    "infinite": OPTIONS,
    "wsd": ("lr", "min_lr", "warmup_tokens", "anneal_tokens", "anneal_shape"),
    "constant": ("lr", "warmup_tokens"),
    "anneal": ("lr", "min_lr", "anneal_shape"),
}


def expand(optim: OptimConfig, tokens: int) -> OptimConfig:
    """`optim` with the segments of its curve over a run of `tokens`, in place of the curve.

    Unchanged where it gives segments itself. Raises UserError for an option that its curve does
    not have, for rates out of order, and for parts that do not fit `tokens`.
    """
    given = [name for name in ("curve", *OPTIONS) if getattr(optim, name) is not None]
    if optim.schedule:
        if given:
            raise UserError(f"optim.{given[0]} and optim.schedule are both set; remove one")
        return optim
    curve = optim.curve or "cosine"
    for name in given:
        if name not in ("curve", *USED[curve]):
            fit = ", ".join(other for other, names in USED.items() if name in names)
            raise UserError(
                f"optim.{name} has no meaning for optim.curve={curve}; leave it out "
                f"(optim.{name}= clears it), or set optim.curve to one of: {fit}"
            )
    _check(optim)
    done: dict[str, Any] = dict.fromkeys(("curve", *OPTIONS))
    return replace(optim, schedule=CURVES[curve](optim, tokens), **done)


def options_of(schedule: Segments) -> OptimConfig | None:
    """The curve with the options that give `schedule`; None where no curve gives it."""
    if len(schedule) < 2:
        return None
    first, second, last = schedule[0], schedule[1], schedule[-1]
    options: dict[str, Any] = {
        "lr": first.lr,
        "min_lr": last.lr,
        "warmup_tokens": first.tokens,
        "cooldown_tokens": second.tokens,
        "cooldown_shape": second.shape,
        "constant_lr": second.lr,
        "anneal_tokens": schedule[-2].tokens,
        "anneal_shape": schedule[-2].shape,
    }
    tokens = sum(segment.tokens or 0 for segment in schedule)
    for curve, names in USED.items():
        shapes = {options[name] for name in names if name.endswith("_shape")}
        if not shapes <= set(get_args(AnnealShape)):
            continue
        named = OptimConfig(curve=curve, **{name: options[name] for name in names})
        try:
            if expand(named, tokens).schedule == schedule:
                return named
        except UserError:
            continue
    return None


def _check(optim: OptimConfig) -> None:
    for name in RATES:
        rate = getattr(optim, name)
        if rate is not None and not 0 <= rate < math.inf:
            raise UserError(f"optim.{name} = {rate} must be a finite number, at least 0")
    for name in LENGTHS:
        length = getattr(optim, name)
        if length is not None and length < 0:
            raise UserError(f"optim.{name} = {length} must be at least 0")
    lr, min_lr = _rates(optim)
    if min_lr > lr:
        raise UserError(f"optim.min_lr = {min_lr:g} is above optim.lr = {lr:g}; {lr / 10:g} works")
    constant_lr = _or(optim.constant_lr, lr)
    if not min_lr <= constant_lr <= lr:
        raise UserError(
            f"optim.constant_lr = {constant_lr:g} must lie between optim.min_lr = {min_lr:g} and "
            f"optim.lr = {lr:g}; {(lr + min_lr) / 2:g} works"
        )


def _cosine(optim: OptimConfig, tokens: int) -> Segments:
    """Warm-up to `lr`, half a wave to `min_lr` at the end of the run."""
    lr, min_lr = _rates(optim)
    warmup = _warmup_tokens(optim, tokens)
    fall = SegmentConfig(shape="cosine", tokens=max(1, tokens - warmup), lr=min_lr)
    return (_rise(warmup, lr), fall, SegmentConfig(lr=min_lr))


def _infinite(optim: OptimConfig, tokens: int) -> Segments:
    """Warm-up to `lr`, cooldown to `constant_lr`, constant, anneal to `min_lr`."""
    lr, min_lr = _rates(optim)
    warmup = _warmup_tokens(optim, tokens)
    cooldown = max(1, _or(optim.cooldown_tokens, tokens * 60 // 100))
    anneal = _or(optim.anneal_tokens, max(1, tokens * 14 // 100))
    rate = _or(optim.constant_lr, (lr + min_lr) / 2)
    fall = SegmentConfig(shape=optim.cooldown_shape or "cosine", tokens=cooldown, lr=rate)
    shape = optim.anneal_shape or "exponential"
    _require_parts_within(optim, tokens)
    hold = _hold(rate, warmup + cooldown, anneal, tokens)
    return (_rise(warmup, lr), fall, *hold, *_anneal_to(min_lr, anneal, shape))


def _wsd(optim: OptimConfig, tokens: int) -> Segments:
    """Warm-up to `lr`, stable there, anneal to `min_lr`."""
    lr, min_lr = _rates(optim)
    warmup = _warmup_tokens(optim, tokens)
    anneal = _or(optim.anneal_tokens, max(1, tokens // 10))
    _require_parts_within(optim, tokens)
    hold = _hold(lr, warmup, anneal, tokens)
    shape = optim.anneal_shape or "linear"
    return (_rise(warmup, lr), *hold, *_anneal_to(min_lr, anneal, shape))


def _constant(optim: OptimConfig, tokens: int) -> Segments:
    """Warm-up to `lr`, and `lr` for ever."""
    lr, _ = _rates(optim)
    return (_rise(_warmup_tokens(optim, tokens), lr), SegmentConfig(lr=lr))


def _anneal(optim: OptimConfig, tokens: int) -> Segments:
    """From `lr` to `min_lr` over the whole run; the first token holds `lr`, where others rise."""
    if optim.lr is None:
        raise UserError(
            "optim.curve=anneal needs optim.lr: the rate of the constant phase that it goes on "
            "from, e.g. optim.lr=1.65e-4"
        )
    lr, min_lr = _rates(optim)
    fall = _anneal_to(min_lr, max(1, tokens - 1), optim.anneal_shape or "exponential")
    return (SegmentConfig(tokens=1, lr=lr), *fall)


CURVES: dict[str, Callable[[OptimConfig, int], Segments]] = {
    "cosine": _cosine,
    "infinite": _infinite,
    "wsd": _wsd,
    "constant": _constant,
    "anneal": _anneal,
}


def _rates(optim: OptimConfig) -> tuple[float, float]:
    """Peak and last rate."""
    lr = _or(optim.lr, OPTIMIZERS[optim.name].lr)
    return lr, _or(optim.min_lr, lr / 10)


def _warmup_tokens(optim: OptimConfig, tokens: int) -> int:
    return max(1, _or(optim.warmup_tokens, tokens // 100))


def _rise(tokens: int, lr: float) -> SegmentConfig:
    return SegmentConfig(shape="linear", tokens=tokens, lr=lr)


def _require_parts_within(optim: OptimConfig, tokens: int) -> None:
    """Raise UserError for an option that alone is longer than a run which needs room for all."""
    for name, percent in USUAL_PERCENT.items():
        length = getattr(optim, name)
        if length is not None and length > tokens and optim.anneal_tokens != 0:
            raise UserError(
                f"optim.{name} = {length} is above train.tokens = {tokens}; set optim.{name}="
                f"{max(1, tokens * percent // 100)}, {percent} % of the run, or lengthen the run"
            )


def _hold(rate: float, begin: int, anneal: int, tokens: int) -> Segments:
    """The constant phase from `begin` to where the anneal begins; without one, for ever."""
    if not anneal:
        return (SegmentConfig(lr=rate),)
    if begin + anneal > tokens:
        raise UserError(
            f"train.tokens = {tokens} is too short for {begin} tokens of warm-up and cooldown and "
            f"an anneal of {anneal}; set optim.anneal_tokens={max(0, tokens - begin)}, or lengthen "
            "the run"
        )
    length = tokens - begin - anneal
    return (SegmentConfig(tokens=length, lr=rate),) if length else ()


def _anneal_to(min_lr: float, tokens: int, shape: AnnealShape) -> Segments:
    """To `min_lr` in `tokens`, and `min_lr` for ever; nothing for no tokens."""
    if not tokens:
        return ()
    if shape == "exponential" and not min_lr:
        raise UserError(
            "optim.min_lr = 0 is never reached by an exponential anneal; set "
            "optim.anneal_shape=linear, or optim.min_lr above 0"
        )
    fall = SegmentConfig(shape=shape, tokens=tokens, lr=min_lr)
    return (fall, SegmentConfig(lr=min_lr))


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
