"""A model on a cluster that nobody has to own: what the planner's simulator needs to know of both.

Without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from numpy.typing import ArrayLike

from megascale.config import (
    Layout,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    PlannerConfig,
    RunConfig,
    TrainConfig,
)
from megascale.devices.memory import fullest
from megascale.devices.rates import (
    Cut,
    Shape,
    cut_of,
    offload_of,
    paying_offload,
    shape_of,
)
from megascale.devices.step_time import StepCost, step_cost
from megascale.devices.table import Device
from megascale.errors import UserError
from megascale.model import counts
from megascale.planner import CostModel, OffloadModel, Problem
from megascale.planner.plan import Mode

VOCAB_SIZE = 32_000
Offload = Literal["none", "paying", "all"]
"""How much of the activations may go to host memory; `paying`: as much as saves time."""


@dataclass(frozen=True)
class Preset:
    """A model by name, and how it is cut where the command line does not say."""

    model: ModelConfig
    tensor: int = 1
    pipeline: int = 1


def _preset(
    shape: tuple[int, int, int, int], tensor: int, pipeline: int, experts: int = 0
) -> Preset:
    """A preset from (layers, hidden size, heads, feed-forward size)."""
    layers, hidden, heads, ffn = shape
    moe = MoeConfig(num_experts=experts, top_k=2, ffn_hidden_size=ffn) if experts else None
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_hidden_size=ffn,
        vocab_size=VOCAB_SIZE,
        tied_embeddings=False,
        moe=moe,
    )
    return Preset(model, tensor, pipeline)


# Layers, hidden sizes, heads and 8 groups of keys and values: ByteScale, table of models. Heads
# of 128, feed-forward sizes and the vocabulary of 32,000 are those of the published models. The
# paper does not say how it cut them; here pipelines go where its scheduler balances pipelines.
MODELS = {
    "7b": _preset((32, 4096, 32, 11008), 1, 1),
    "13b": _preset((40, 5120, 40, 13824), 2, 1),
    "30b": _preset((60, 6656, 56, 17920), 4, 1),
    "70b": _preset((80, 8192, 64, 28672), 8, 2),
    "8x7b": _preset((32, 4096, 32, 14336), 4, 2, experts=8),
    "8x22b": _preset((56, 6144, 48, 16384), 8, 4, experts=8),
}
MODELS["141b"] = MODELS["8x22b"]
ASSUMED_MODEL = "7b"
"""Whose costs a batch of lengths is planned with if nothing else is given."""


def preset_of(name: str) -> Preset:
    """The preset of a name. Raises UserError."""
    if name not in MODELS:
        raise UserError(f"--model {name}: not in the table, which has {', '.join(MODELS)}")
    return MODELS[name]


def layout_of(model_name: str, ranks: int, tensor: int, pipeline: int, expert: int) -> Layout:
    """The layout of a preset on `ranks` devices. Raises UserError where it does not fit."""
    model = preset_of(model_name).model
    if model.num_heads % tensor or (model.num_kv_heads or 1) % tensor:
        raise UserError(f"--tensor {tensor}: must divide the {model.num_kv_heads} key-value heads")
    if model.num_layers % pipeline:
        raise UserError(f"--pipeline {pipeline}: must divide the {model.num_layers} layers")
    num_experts = model.moe.num_experts if model.moe else 1
    if num_experts % expert:
        raise UserError(f"--expert {expert}: must divide the {num_experts} of --model {model_name}")
    if ranks % (tensor * pipeline * expert):
        least = tensor * pipeline * expert
        raise UserError(
            f"--ranks {ranks}: must be a multiple of tensor {tensor} x pipeline {pipeline} x "
            f"expert {expert} = {least}; try --ranks {max(least, ranks // least * least)}"
        )
    return Layout(ranks, tensor, pipeline, expert, ranks // (tensor * pipeline))


def mode_of(name: str | None, layout: Layout) -> Mode:
    """The mode of planning by name, by default the freest. Raises UserError."""
    modes: dict[str, Mode] = {"free": "free", "aligned": "aligned", "lockstep": "lockstep"}
    if name is None:
        return layout.mode
    if name not in modes:
        raise UserError(f"--mode {name}: must be one of {', '.join(modes)}")
    allowed = list(modes)[list(modes).index(layout.mode) :]
    if name not in allowed:
        raise UserError(
            f"--mode {name}: pipeline {layout.pipeline} and expert {layout.expert} need "
            f"{' or '.join(allowed)}"
        )
    return modes[name]


def offload_kind(name: str) -> Offload:
    """How much may go to host memory, by name. Raises UserError."""
    kinds: dict[str, Offload] = {"none": "none", "paying": "paying", "all": "all"}
    if name not in kinds:
        raise UserError(f"--offload {name}: must be one of {', '.join(kinds)}")
    return kinds[name]


def assumed_cost() -> CostModel:
    """The uncalibrated costs of `ASSUMED_MODEL`."""
    return counts.default_cost(MODELS[ASSUMED_MODEL].model)


class OnPaper(Protocol):
    """What is simulated: a model, the devices that train it, and how steps are cut."""

    @property
    def model_name(self) -> str:
        """By which the model is known."""

    @property
    def layout(self) -> Layout:
        """How it is cut over the devices."""

    @property
    def device_name(self) -> str:
        """By which the device is known."""

    @property
    def device(self) -> Device:
        """Its rates and memory."""

    @property
    def context(self) -> int:
        """Where longer documents are cut."""

    @property
    def capacity(self) -> int:
        """Tokens of an HDP rank in a micro-batch."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""

    @property
    def mode(self) -> Mode:
        """Mode of planning."""

    @property
    def offload(self) -> str:
        """How much goes to host memory."""

    @property
    def cost(self) -> StepCost:
        """What steps cost."""

    def problem(self, lengths: ArrayLike) -> Problem:
        """A step of sequences of `lengths` tokens."""

    def peak_bytes(self, kept_tokens: int) -> int:
        """Memory of a device whose HDP rank keeps activations of so many tokens."""

    def rates(self) -> str:
        """The begin of a sentence on where rates come from, which `device.source` ends."""

    def to_json(self) -> dict[str, Any]:
        """Everything that times and memory follow from, as plain values."""


@dataclass(frozen=True)
class Cluster:
    """A model, the devices that train it, and how steps are cut."""

    model_name: str
    model: ModelConfig
    layout: Layout
    device_name: str
    device: Device
    context: int
    capacity: int
    batch_tokens: int
    mode: Mode
    offload: Offload
    budget_s: float | None
    """As that of a `Problem`."""
    chunks: int = 1
    """Most chunks of a pipeline's wave."""

    @property
    def shape(self) -> Shape:
        """The model as its cost sees it."""
        return shape_of(self._config(), self.layout.tensor)

    @cached_property
    def cost(self) -> StepCost:
        """What steps cost."""
        return step_cost(self._config(self.capacity), self.layout, self.device)

    @property
    def cut(self) -> Cut:
        """How the model is cut over devices."""
        return cut_of(self._config(), self.layout)

    def problem(self, lengths: ArrayLike) -> Problem:
        """A step of sequences of `lengths` tokens."""
        cost = self.cost.cost
        offload: OffloadModel | None = offload_of(self.shape, self.device, self.cut)
        if offload and self.offload == "paying":
            offload = paying_offload(offload, cost, self.capacity)
        group = self.layout.expert if self.layout.expert > 1 else self.layout.hdp
        return Problem.of(
            lengths,
            self.layout.hdp,
            self.capacity,
            self.mode,
            cost,
            pipeline=self.layout.pipeline,
            expert_group=group,
            offload=None if self.offload == "none" else offload,
            budget_s=self.budget_s,
            chunks=self.chunks,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that times and memory follow from, as plain values."""
        value = asdict(self)
        del value["model"]
        return value | {"cost": asdict(self.cost.cost)}

    def rates(self) -> str:
        """Where rates come from."""
        return "Rates have assumed efficiencies; they are those of"

    def peak_bytes(self, kept_tokens: int) -> int:
        """Estimate of the memory of a device whose HDP rank keeps activations of so many tokens."""
        return fullest(self._config(kept_tokens), self.layout, self.device)

    def _config(self, tokens: int = 1) -> RunConfig:
        layout = self.layout
        return RunConfig(
            model=self.model,
            parallel=ParallelConfig(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                expert=layout.expert,
                sequence_parallel=layout.tensor > 1,
            ),
            planner=PlannerConfig(capacity_tokens=tokens),
            train=TrainConfig(precision="bf16"),
        )
