"""The fields of metrics.jsonl, a record each: unit, meaning, value, and how each is shown.

The rows of `metrics.jsonl`, and with them TensorBoard and the trackers, the line on the console,
the pictures of `megascale plot` and the table in `run/README.md` all follow from the records here.
A new field is a new record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from megascale.monitor.quantities import show_count

if TYPE_CHECKING:
    from megascale.arrays import Floats
    from megascale.monitor.step_record import StepRecord


@dataclass(frozen=True)
class Rows:
    """Which steps have a field in their row."""

    meaning: str
    holds: Callable[[StepRecord], bool]


EVERY_STEP = Rows("every step", lambda step: True)
NO_ROW = Rows("none; only on the console", lambda step: False)
WITH_STATIC = Rows(
    "steps with a plan of `static` too", lambda step: step.speedup_over_static is not None
)
WITH_REPLAY = Rows("runs with replay", lambda step: step.replays)
WITH_OFFLOAD = Rows("steps with offload", lambda step: bool(step.result.offload_gib))
WITH_EXPERTS = Rows("models with experts", lambda step: step.result.experts is not None)


@dataclass(frozen=True)
class Shown:
    """How the console shows a field."""

    text: str
    """With {} for the number."""
    is_mean: bool = False
    """Whether it is the mean over the steps since the last line."""
    at_least: float = -math.inf
    """Smaller values are not worth their place on the line, and are left out."""


@dataclass(frozen=True)
class Picture:
    """A picture that `megascale plot` draws over tokens."""

    name: str
    """Its file, without the ending."""
    title: str
    scale: Literal["linear", "log"] = "linear"
    numbers: Literal["plain", "scientific", "engineering", "percent"] = "plain"
    """How the axis is labelled."""
    from_zero: bool = False
    """Whether the axis begins at 0."""
    is_always_drawn: bool = False
    """Whether also where no run has a value to draw."""


@dataclass(frozen=True)
class Curve:
    """How a picture shows a field; fields may share a picture."""

    picture: Picture
    label: str = ""
    """After the name of the run, where several runs are drawn."""
    style: Literal["line", "trend", "smoothed", "marks"] = "trend"
    """The values; the values lightly and their running mean boldly; the running mean alone; or a
    vertical line at each step where the value is true."""
    minus: float = 0.0
    """What is subtracted from the values."""
    summary: Callable[[Floats], str] | None = None
    """What the label says of the finite values."""


@dataclass(frozen=True)
class Field:
    """A field of the row of a step."""

    name: str
    """In `metrics.jsonl`, TensorBoard and the trackers."""
    unit: str
    """Empty for a number without a unit."""
    meaning: str
    value: Callable[[StepRecord], Any]
    rows: Rows = EVERY_STEP
    number: Callable[[Any], str] = str
    """The value as a person reads it."""
    console: Shown | None = None
    """None: the console does not show it."""
    curve: Curve | None = None
    """None: no picture shows it."""

    def on_console(self, value: Any) -> str:
        """What the console says of a value; empty where the field has no place there, where the
        value is null, not finite or too small."""
        if self.console is None or value is None or not math.isfinite(value):
            return ""
        if value < self.console.at_least:
            return ""
        return self.console.text.format(self.number(value))

    def in_words(self, value: Any) -> str:
        """A value, not null, with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()


@dataclass(frozen=True)
class ScoreField:
    """A field of the score of a held-out set, which rows of evaluations have for each source."""

    name: str
    """In `metrics.jsonl` below `eval` and the source; `eval/SOURCE/NAME` in TensorBoard."""
    unit: str
    meaning: str
    picture: Picture | None = None


LOSS = Picture("loss", "Loss (nats per token)", is_always_drawn=True)
BITS_PER_BYTE = Picture("bits_per_byte", "Held-out bits per byte")
LEARNING_RATE = Picture(
    "learning_rate", "Learning rate", numbers="scientific", from_zero=True, is_always_drawn=True
)
SPEED = Picture(
    "speed",
    "Training speed (tokens per second)",
    numbers="engineering",
    from_zero=True,
    is_always_drawn=True,
)
GRAD_NORM = Picture("grad_norm", "Gradient norm before clipping", scale="log", is_always_drawn=True)
BALANCE = Picture("balance", "Balance of experts (0: even use)", scale="log")
REPLAY = Picture(
    "replay", "Part of all tokens that earlier runs had read", numbers="percent", from_zero=True
)
FIRST_PICTURES = (LOSS, BITS_PER_BYTE, LEARNING_RATE, SPEED, GRAD_NORM, BALANCE, REPLAY)
"""Drawn in this order, before pictures that only a record names."""

LEAST_WAIT_S = 0.01
"""Mean wait for plans from which the console shows it."""
SPEEDUP = "speedup_over_static"
"""Field: predicted step time of the static plan of a batch over that of the plan."""
CONSOLE_ORDER = (
    "loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", SPEEDUP, "mfu", "plan_wait_s",
)  # fmt: skip
"""Fields of the console's line from left to right; others that it shows follow them."""

FIELDS: tuple[Field, ...] = (
    Field("step", "steps", "Steps done.", lambda step: step.cursor.step),
    Field(
        "tokens_seen", "tokens", "Loss tokens of all these steps.",
        lambda step: step.cursor.tokens_seen,
        number="{:,}".format,
    ),
    Field(
        "num_tokens", "tokens", "Loss tokens of this step.", lambda step: step.result.num_tokens
    ),
    Field(
        "loss", "nats per token", "Mean training loss; null if it is not finite.",
        lambda step: step.result.loss,
        number="{:.4f}".format,
        console=Shown("loss {}"),
        curve=Curve(LOSS, "training"),
    ),
    Field(
        "bits_per_byte", "bits per byte",
        "The loss over the bytes of the text, by the mean bytes per token of each source.",
        lambda step: step.bits_per_byte,
        rows=NO_ROW,
        number="{:.3f}".format,
        console=Shown("bits/byte {}"),
    ),
    Field(
        "lr", "", "Learning rate.",
        lambda step: step.result.lr,
        number="{:.1e}".format,
        console=Shown("lr {}"),
        curve=Curve(LEARNING_RATE, style="line"),
    ),
    Field(
        "grad_norm", "", "L2 norm of the gradient of the mean loss, before clipping.",
        lambda step: step.result.grad_norm,
        number="{:.2g}".format,
        console=Shown("grad norm {}"),
        curve=Curve(GRAD_NORM),
    ),
    Field(
        "step_s", "s", "Wall time of the step; waiting for its plan is not part of it.",
        lambda step: step.result.seconds,
    ),
    Field(
        "tokens_per_s", "tokens/s", "`num_tokens` over `step_s`.",
        lambda step: step.result.num_tokens / step.result.seconds,
        number=show_count,
        console=Shown("{} tok/s"),
        curve=Curve(SPEED, summary=lambda values: f"median {median(values):,.0f}"),
    ),
    Field(
        "mfu", "fraction",
        "Model FLOP/s over the peak of all devices; null if the peak is not known.",
        lambda step: step.mfu,
        number=lambda value: f"{100 * value:.1f} %",
        console=Shown("MFU {}"),
    ),
    Field("plan_s", "s", "Time to make the plan.", lambda step: step.plan.plan_s),
    Field(
        "plan_wait_s", "s",
        "Time that the training loop waited for the plan; the console shows a mean of 10 ms or "
        "more.",
        lambda step: step.plan_wait_s,
        number=lambda value: f"{1000 * value:.1f} ms",
        console=Shown("plan wait {}", is_mean=True, at_least=LEAST_WAIT_S),
    ),
    Field(
        "plan_over_bound", "", "Predicted time of the step over the lower bound of all plans.",
        lambda step: step.plan.predicted_s / step.plan.lower_bound_s,
    ),
    Field(
        "speedup_over_static", "",
        "Predicted time of the step under static context parallelism over that of its plan; see "
        "the planner's guide.",
        lambda step: step.speedup_over_static,
        rows=WITH_STATIC,
        number="{:.2f}".format,
        console=Shown("{}x static"),
    ),
    Field(
        "skipped", "true or false", "Whether the update of the weights was left out.",
        lambda step: step.result.skipped,
        curve=Curve(GRAD_NORM, "skipped step(s)", style="marks"),
    ),
    Field(
        "replayed", "fraction", "Part of all tokens so far that earlier runs had read.",
        lambda step: step.replayed,
        rows=WITH_REPLAY,
        curve=Curve(REPLAY, style="line", summary=lambda values: f"last {values[-1]:.3f}"),
    ),
    Field(
        "offload_gib", "GiB", "Activations copied to host memory, all ranks together.",
        lambda step: step.result.offload_gib,
        rows=WITH_OFFLOAD,
    ),
    Field(
        "balance_loss", "", "Balance loss of the global batch, mean over layers; 1 is even use.",
        lambda step: float(step.experts.loss_L.mean()),
        rows=WITH_EXPERTS,
        curve=Curve(BALANCE, "balance loss - 1", style="smoothed", minus=1.0),
    ),
    Field(
        "max_violation", "",
        "Use of the busiest expert over even use, minus 1; the largest of all layers.",
        lambda step: float(step.experts.max_violation_L.max()),
        rows=WITH_EXPERTS,
        curve=Curve(BALANCE, "busiest expert over even use - 1", style="smoothed"),
    ),
    Field(
        "dead_experts", "experts", "Experts that no token chose, all layers together.",
        lambda step: int(step.experts.dead_L.sum()),
        rows=WITH_EXPERTS,
    ),
)  # fmt: skip
"""In the order of the rows."""

SCORES: tuple[ScoreField, ...] = (
    ScoreField("loss", "nats per token", "Mean loss of the held-out tokens.", LOSS),
    ScoreField(
        "bits_per_byte", "bits per byte",
        "Summed loss over the bytes of the same text; null if the corpus does not know its bytes.",
        BITS_PER_BYTE,
    ),
    ScoreField("tokens", "tokens", "Tokens scored."),
    ScoreField("documents", "documents", "Documents of which something was scored."),
    ScoreField("set_tokens", "tokens", "Tokens of the whole held-out set."),
    ScoreField("set_documents", "documents", "Documents of the whole held-out set."),
    ScoreField("part", "text", "Mark of the scored part; scores of other parts do not compare."),
)  # fmt: skip


def field_called(name: str) -> Field:
    """The record of a field."""
    return next(field for field in FIELDS if field.name == name)


def row_of(step: StepRecord) -> dict[str, Any]:
    """The row of a step in `metrics.jsonl`."""
    return {field.name: field.value(step) for field in FIELDS if field.rows.holds(step)}


def shown_fields() -> list[tuple[Field, Shown]]:
    """What the console shows, in CONSOLE_ORDER."""
    shown = [(field, field.console) for field in FIELDS if field.console is not None]
    places = {name: place for place, name in enumerate(CONSOLE_ORDER)}
    return sorted(shown, key=lambda one: places.get(one[0].name, len(places)))


def for_console(step: StepRecord) -> dict[str, Any]:
    """What the console shows of a step and its row does not have."""
    return {field.name: field.value(step) for field, _ in shown_fields() if field.rows is NO_ROW}


def score_row(score: object) -> dict[str, Any]:
    """The fields of a held-out score, an object with an attribute for each."""
    return {field.name: getattr(score, field.name) for field in SCORES}


def drawn_fields() -> dict[str, Curve]:
    """What pictures show, by the name of the field."""
    return {field.name: field.curve for field in FIELDS if field.curve is not None}


def pictures() -> tuple[Picture, ...]:
    """All pictures that show fields."""
    return tuple(
        dict.fromkeys([*FIRST_PICTURES, *(curve.picture for curve in drawn_fields().values())])
    )
