"""What a comparison of planners has measured, its ratios, and how it is told."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megascale import __version__
from megascale.corpus.batches import GlobalBatch
from megascale.monitor.ratios import MachineUse, Ratio, why_no_ratio
from megascale.planner import CostModel, StepPlan
from megascale.planner.stacked_gantt import TitledPlan, plot_stacked

MOST_LOSS_DIFFERENCE = {"fp32": 1e-4}
"""Relative, by precision: losses that differ by rounding alone."""
MOST_OTHER_LOSS_DIFFERENCE = 1e-2


@dataclass(frozen=True)
class TimedStep:
    """One training step, the same on all ranks."""

    seconds: float
    """Of the slowest rank."""
    processor_s: float
    """Of all ranks together."""
    others_s: float
    """Processor seconds of other programs on the machine of rank 0 meanwhile."""
    loss: float


@dataclass(frozen=True)
class Round:
    """One batch under every planner."""

    batch: GlobalBatch
    plans: Mapping[str, StepPlan]
    steps: Mapping[str, TimedStep]

    @property
    def loss_difference(self) -> float:
        """Largest difference of two planners' losses, relative."""
        losses = [step.loss for step in self.steps.values()]
        return (max(losses) - min(losses)) / abs(losses[0])

    def predicted_ratio(self, slow: str, fast: str) -> float:
        """The ratio of two planners' predicted times of the step."""
        return self.plans[slow].predicted_s / self.plans[fast].predicted_s


@dataclass(frozen=True)
class Setting:
    """Where and what was measured."""

    ranks: int
    device: str
    cores: int
    """Of the machine."""
    usable_cores: int
    """Those that the ranks can use at the same time."""
    precision: str
    capacity_tokens: int
    context_tokens: int
    corpora: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Rounds of baselines and a planner of ours, whose times `cost` predicts."""

    setting: Setting
    baselines: tuple[str, ...]
    ours: str
    cost: CostModel
    cost_error: float | None
    """Median relative error of the cost model's fit; None where the model was given."""
    rounds: Sequence[Round]

    @property
    def ratios(self) -> dict[str, Ratio]:
        """By baseline: its time over ours, a ratio for each round."""
        ours_s = self._seconds(self.ours)
        return {name: Ratio.of(self._seconds(name), ours_s) for name in self.baselines}

    @property
    def no_ratio(self) -> str | None:
        """Why the ratios would be noise; None where they say something."""
        steps = [step for one in self.rounds for step in one.steps.values()]
        use = MachineUse(
            wall_s=sum(step.seconds for step in steps),
            others_s=sum(step.others_s for step in steps),
            cores=self.setting.cores,
            usable_cores=self.setting.usable_cores,
        )
        return why_no_ratio(list(self.ratios.values()), use)

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of two planners' losses on a batch."""
        return max(one.loss_difference for one in self.rounds)

    @property
    def losses_agree(self) -> bool:
        """Whether the losses differ by no more than rounding."""
        most = MOST_LOSS_DIFFERENCE.get(self.setting.precision, MOST_OTHER_LOSS_DIFFERENCE)
        return self.loss_difference <= most

    def predicted_ratio(self, baseline: str) -> float:
        """The ratio of the predicted times, median over the rounds."""
        return statistics.median(one.predicted_ratio(baseline, self.ours) for one in self.rounds)

    def _seconds(self, planner: str) -> list[float]:
        return [one.steps[planner].seconds for one in self.rounds]

    def lines(self) -> Iterator[str]:
        """The result for people. What is noise is left out."""
        reason = self.no_ratio
        yield from self._times(with_measured=reason is None)
        if reason is None:
            yield from self._measured_ratios()
        else:
            predicted = [f"{self.predicted_ratio(one):.2f}x over {one}" for one in self.baselines]
            yield f"no ratio: {reason}; try again when the machine is quiet"
            yield f"predicted for {self.ours}: {', '.join(predicted)}"
        yield (
            f"losses: {'equal' if self.losses_agree else 'NOT EQUAL'}, largest relative difference "
            f"{self.loss_difference:.0e}"
        )

    def _times(self, with_measured: bool) -> Iterator[str]:
        lengths = [int(n) for one in self.rounds for n in one.batch.length]
        yield (
            f"{len(self.rounds)} batches, {len(lengths)} sequences of {min(lengths):,} to "
            f"{max(lengths):,} tokens (median {round(statistics.median(lengths)):,})"
        )
        yield "step time of      measured  predicted   (medians)"
        for name in (*self.baselines, self.ours):
            measured = f"{statistics.median(self._seconds(name)):.2f} s" if with_measured else "-"
            predicted = statistics.median(one.plans[name].predicted_s for one in self.rounds)
            yield f"  {name:<14} {measured:>9} {predicted:>8.2f} s"

    def _measured_ratios(self) -> Iterator[str]:
        for name, ratio in self.ratios.items():
            yield (
                f"{self.ours} over {name}: {ratio} as fast in {len(self.rounds)} repeats, "
                f"predicted {self.predicted_ratio(name):.2f}x"
            )

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, as plain values; `ratios` is null where they are noise."""
        reason = self.no_ratio
        ratios = {
            name: asdict(ratio) | {"predicted": self.predicted_ratio(name)}
            for name, ratio in self.ratios.items()
        }
        return {
            "megascale": __version__,
            **asdict(self.setting),
            "ratios": ratios if reason is None else None,
            "no_ratio": reason,
            "loss_difference": self.loss_difference,
            "cost": asdict(self.cost),
            "cost_error": self.cost_error,
            "rounds": [_round_json(one) for one in self.rounds],
        }


def _round_json(one: Round) -> dict[str, Any]:
    steps = {
        name: asdict(step) | {"predicted_s": one.plans[name].predicted_s}
        for name, step in one.steps.items()
    }
    return {"step": one.batch.step, "lengths": one.batch.length.tolist(), "planners": steps}


def plot_comparison(result: Comparison, path: Path) -> None:
    """The first batch under the static plan and under ours, on one time axis."""
    first, setting, reason = result.rounds[0], result.setting, result.no_ratio
    lengths = first.batch.length
    titles = {"static": "static context parallelism", "hybrid": "hybrid data parallelism"}
    plans = []
    for name, title in titles.items():
        times = f"predicted {first.plans[name].predicted_s:.2f} s"
        if reason is None:
            times += f", measured {first.steps[name].seconds:.2f} s"
        plans.append(TitledPlan(f"{title}: {times}", first.plans[name]))
    title = (
        f"{len(lengths)} sequences of {int(lengths.min()):,} to {int(lengths.max()):,} tokens on "
        f"{setting.ranks} ranks ({setting.device}), from {', '.join(setting.corpora)}"
    )
    if reason is None:
        ratio, number = result.ratios["static"], len(result.rounds)
        title += f"\n{result.ours} is {ratio} as fast over {number} batches"
    plot_stacked(plans, lengths, result.cost, title, path)
