"""Cost, offload and transfer rates of a model on a device, from data sheets and model shape.

What a data sheet says is in `table.py`. How much of it software gets is in the constants below,
each with its reason. Measured rates (`megascale calibrate`) replace all of this where there is a
machine to measure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from megascale.config import Layout, RunConfig
from megascale.devices.table import Device, Precision
from megascale.model import counts
from megascale.model.activations import layer_activation_bytes
from megascale.planner.cost import CostModel
from megascale.planner.problem import OffloadModel

COMPUTE_EFFICIENCY = 0.55
"""Part of peak FLOP/s in matrix products and attention: the MFU that MegaScale reports on 12,288
devices (55.2 %). An assumption."""
LINK_EFFICIENCY = 0.8
"""Part of a link's rate that large messages get. An assumption."""
FIXED_S_PER_LAYER = 0.3e-3
"""Launches of a layer's kernels, forward and backward: 10 ms in 32 layers. An assumption."""
LATENCY_S_PER_LAYER = 0.1e-3
"""Start of a layer's exchanges, times log2 of the ring's size: 3 ms in 32 layers. An
assumption."""


class KnownError(NamedTuple):
    """Relative errors of predicted step times."""

    least: float
    most: float
    runs: str
    """Against what."""


KNOWN_ERRORS = {
    ("h100", False): KnownError(-0.01, 0.19, "Llama 3.1 8B to 405B, context 8K"),
    ("h100", True): KnownError(-0.53, -0.53, "GPT-OSS 120B, context 4K"),
}
"""In bf16, by device and by whether the model has experts, against what NVIDIA published
(`python tools/bench.py devices`). No constant here was fitted to these runs."""
GRADIENT_BYTES = 4
"""Gradients are added up in fp32."""


@dataclass(frozen=True)
class Shape:
    """What cost and memory of a model depend on; whole model, one token, forward."""

    num_layers: int
    hidden_size: int
    kv_size: int
    """Key and value heads times the size of a head."""
    flops_per_token: float
    """Of matrix products with weights, the output head's too."""
    flops_per_pair: float
    """Per query token and key token that it sees, all layers; 0 with a sliding window."""
    activation_bytes: float
    """Of one layer, kept for the backward pass."""
    head_flops_per_token: float = 0.0
    """Of the output head, which is never recomputed."""
    window_flops_per_token: float = 0.0
    """Of attention with a sliding window, of which every token is charged all."""
    routed_size: int = 0
    """Numbers that one token sends to its experts in a layer."""


@dataclass(frozen=True)
class Cut:
    """How a model is cut over devices and run on them."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    precision: Precision = "bf16"
    recompute: bool = False
    """Every layer runs its forward pass twice."""

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return 2 if self.precision == "bf16" else 4

    @property
    def passes(self) -> int:
        """How many times the forward operations a micro-batch takes; backward counts twice."""
        return 4 if self.recompute else 3


def cut_of(config: RunConfig, layout: Layout) -> Cut:
    """How the model of a run is cut and run."""
    train = config.train
    full = train.recompute == "full"
    return Cut(layout.tensor, layout.pipeline, layout.expert, train.precision, full)


def shape_of(config: RunConfig, tensor: int) -> Shape:
    """The model of a run as its cost sees it; `tensor` matters only through padded logits."""
    model = config.model
    alone = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
    pair, sliding = counts.attention_flops(model)
    moe = model.moe
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        kv_size=(model.num_kv_heads or 0) * (model.head_dim or 0) * counts.attentions(model),
        flops_per_token=counts.flops_per_token(model, tensor),
        flops_per_pair=pair,
        activation_bytes=layer_activation_bytes(alone, Layout(1, 1, 1, 1, 1)),
        head_flops_per_token=counts.head_flops_per_token(model, tensor),
        window_flops_per_token=sliding,
        routed_size=moe.top_k * model.hidden_size if moe else 0,
    )


@dataclass(frozen=True)
class TokenSeconds:
    """What the seconds per token of a cost model (`CostModel.b`) consist of."""

    linear: float
    """Matrix products with weights."""
    window: float
    """Attention with a sliding window."""
    exchange: float
    """Messages of tensor parallelism and of experts, with nothing to hide behind."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.window + self.exchange


def token_seconds(shape: Shape, device: Device, cut: Cut) -> TokenSeconds:
    """Seconds per token on one pipeline stage, forward and backward.

    Tensor parallelism exchanges the residual stream four times in each pass (Megatron's sequence
    parallelism: gather and scatter around attention and around the feed-forward part). Experts
    get tokens and give them back, in each pass once.
    """
    layers, size = shape.num_layers / cut.pipeline, cut.element_bytes
    rounds = cut.passes - 1  # forward, backward, and forward again where layers are recomputed
    residual = shape.hidden_size * size * (cut.tensor - 1) / cut.tensor
    exchange = 4 * rounds * layers * residual / _bytes_per_s(device, cut.tensor)
    routed = shape.routed_size * size * (cut.expert - 1) / cut.expert / cut.tensor
    exchange += 2 * rounds * layers * routed / _bytes_per_s(device, cut.expert * cut.tensor)
    flops_per_s = _flops_per_s(device, cut)
    recomputed = (cut.passes - 3) * (shape.flops_per_token - shape.head_flops_per_token)
    return TokenSeconds(
        linear=(3 * shape.flops_per_token + recomputed) / flops_per_s,
        window=cut.passes * shape.window_flops_per_token / flops_per_s,
        exchange=exchange,
    )


def _bytes_per_s(device: Device, size: int) -> float:
    """Of a device among `size` neighbours that all exchange with each other."""
    is_one_node = size <= device.node_size
    rate = device.intra_bytes_per_s if is_one_node else device.inter_bytes_per_s
    return rate * LINK_EFFICIENCY


def _flops_per_s(device: Device, cut: Cut) -> float:
    """Of all devices that one HDP rank of the whole model has."""
    return device.flops_per_s(cut.precision) * COMPUTE_EFFICIENCY * cut.tensor * cut.pipeline


def cost_of(shape: Shape, device: Device, cut: Cut) -> CostModel:
    """Cost on one pipeline stage of HDP ranks of `cut.tensor` devices each.

    Forward and backward are three times the forward operations; attention is causal, so half of
    all pairs. Keys and values go round a ring in the forward pass, and in the backward pass with
    their gradients: three times their bytes, over the one link between neighbours that is
    slowest. Recomputation adds one forward pass, with its messages.
    """
    layers = shape.num_layers / cut.pipeline
    intra, inter = (
        rate * LINK_EFFICIENCY for rate in (device.ring_bytes_per_s, device.inter_bytes_per_s)
    )
    passed = cut.passes * 2 * shape.kv_size * cut.element_bytes * layers / cut.tensor
    return CostModel(
        a=cut.passes * shape.flops_per_pair / 2 / _flops_per_s(device, cut),
        b=token_seconds(shape, device, cut).total,
        fixed=FIXED_S_PER_LAYER * layers * cut.passes / 3,
        latency=LATENCY_S_PER_LAYER * layers * cut.passes / 3,
        node_size=max(1, device.node_size // cut.tensor),
        pass_intra=passed / intra,
        pass_inter=passed / inter,
        calibrated=False,
    )


def offload_of(shape: Shape, device: Device, cut: Cut) -> OffloadModel:
    """Offload of one pipeline stage to host memory over each device's own link."""
    return OffloadModel(
        stage_layers=shape.num_layers // cut.pipeline,
        bytes_per_token=shape.activation_bytes / cut.tensor,
        copy_bytes_per_s=device.host_bytes_per_s * LINK_EFFICIENCY,
    )


def paying_offload(offload: OffloadModel, cost: CostModel, capacity: int) -> OffloadModel | None:
    """`offload`, of at most as much as saves time; None where any would only cost time.

    Offload makes rings smaller. That saves time while a ring passes on more than attention hides,
    and from a = pass / (tokens per rank) on it only makes each rank compute longer. So a rank
    should hold at most pass / a tokens, and gain at most pass / a / capacity. The layers are
    taken in as few blocks, of which the first and the last never offload, as have that gain.
    """
    if cost.a <= 0:
        return offload
    gain = cost.pass_inter / cost.a / capacity
    blocks = min(offload.stage_layers, int(2 * gain))
    if blocks <= 2:
        return None
    layers_per_block = offload.stage_layers / blocks
    return OffloadModel(
        blocks, offload.bytes_per_token * layers_per_block, offload.copy_bytes_per_s
    )


def sync_s(parameters: int, device: Device, cut: Cut, hdp: int) -> float:
    """Seconds to add up gradients and spread new weights at the end of a step, nothing hidden.

    `parameters` are those of one device. Gradients in fp32 are reduced and weights gathered over
    the HDP axis of `hdp` ranks. Where these are in one node each of them sends and receives all
    but its own part. Else their ring leaves each node over as many network cards as the node has
    HDP ranks.
    """
    sent = parameters * (GRADIENT_BYTES + cut.element_bytes)
    if hdp * cut.tensor <= device.node_size:
        return sent * (hdp - 1) / hdp / (device.intra_bytes_per_s * LINK_EFFICIENCY)
    cards = max(1, device.node_size // cut.tensor)
    return sent / (cards * device.inter_bytes_per_s * LINK_EFFICIENCY)


def passing_share(cost: CostModel, tokens: int, length: int, size: int) -> float:
    """Part of a micro-batch's time in which keys and values are passed on, hidden or not.

    The micro-batch has `tokens` tokens in sequences of `length` on a ring of `size` ranks across
    nodes (ByteScale measures 97.6 % for short sequences on 256 ranks).
    """
    total_s = float(cost.seconds(tokens * length, tokens, size, size <= cost.node_size))
    rate = cost.pass_intra if size <= cost.node_size else cost.pass_inter
    return rate * tokens * (size - 1) / size / total_s
