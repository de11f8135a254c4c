"""Cost, offload and transfer rates of a model on a device, from data sheets and model shape.

What a data sheet says is in `DEVICES`; what it does not say, how much of it software gets out,
is in the constants below, each with its reason. Measured rates (`megascale calibrate`) replace
all of this where there is a machine to measure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megascale.errors import UserError
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
ELEMENT_BYTES = 2
"""bf16."""


@dataclass(frozen=True)
class Device:
    """Rates of one device by its data sheet, in one direction and without sparsity."""

    bf16_flops_per_s: float
    memory_bytes: int
    intra_bytes_per_s: float
    """To other devices of the node: half of NVLink's rate of both directions."""
    inter_bytes_per_s: float
    """To other nodes: one network card per device, as in the maker's own systems."""
    host_bytes_per_s: float
    """To host memory: half of PCI Express's rate of both directions."""
    node_size: int = 8
    """Devices of a node."""


DEVICES = {
    # SXM modules; network: DGX H100 / H200 have 400 Gbit/s per device, DGX A100 200.
    "h100": Device(989.4e12, 80 * 10**9, 450e9, 50e9, 64e9),
    "h200": Device(989.4e12, 141 * 10**9, 450e9, 50e9, 64e9),
    "a100": Device(312e12, 80 * 10**9, 300e9, 25e9, 32e9),
}
"""By the name that `megascale simulate --device` takes."""


def device_of(name: str, network_gbps: float | None = None) -> Device:
    """A device of the table, with another network where `network_gbps` (Gbit/s per device) says.

    Raises UserError for an unknown name and for a rate that is not above 0.
    """
    if name not in DEVICES:
        raise UserError(f"--device {name}: not in the table, which has {', '.join(DEVICES)}")
    if network_gbps is None:
        return DEVICES[name]
    if not 0 < network_gbps < float("inf"):
        raise UserError(f"--network-gbps {network_gbps:g}: must be above 0, such as 400")
    return replace(DEVICES[name], inter_bytes_per_s=network_gbps * 1e9 / 8)


@dataclass(frozen=True)
class Shape:
    """What cost and memory of a model depend on; whole model, one token, forward."""

    num_layers: int
    hidden_size: int
    kv_size: int
    """Key and value heads times the size of a head."""
    flops_per_token: float
    """Of matrix products with weights."""
    flops_per_pair: float
    """Per query token and key token that it sees, all layers."""
    activation_bytes: float
    """Of one layer, kept for the backward pass."""


def cost_of(shape: Shape, device: Device, tensor: int = 1, pipeline: int = 1) -> CostModel:
    """Cost on one pipeline stage of HDP ranks of `tensor` devices each.

    Forward and backward are three times the forward operations; attention is causal, so half of
    all pairs. Keys and values go round a ring in the forward pass, and in the backward pass with
    their gradients: three times their bytes, over the one link between neighbours that is
    slowest. Tensor parallelism exchanges the residual stream four times in each pass, with
    nothing to hide behind (Megatron's sequence parallelism: gather and scatter around attention
    and around the feed-forward part).
    """
    layers = shape.num_layers / pipeline
    flops_per_s = device.bf16_flops_per_s * COMPUTE_EFFICIENCY * tensor * pipeline
    intra, inter = (
        rate * LINK_EFFICIENCY for rate in (device.intra_bytes_per_s, device.inter_bytes_per_s)
    )
    passed = 3 * 2 * shape.kv_size * ELEMENT_BYTES * layers / tensor
    residual = shape.hidden_size * ELEMENT_BYTES * (tensor - 1) / tensor
    return CostModel(
        a=3 * shape.flops_per_pair / 2 / flops_per_s,
        b=3 * shape.flops_per_token / flops_per_s + 8 * layers * residual / intra,
        fixed=FIXED_S_PER_LAYER * layers,
        latency=LATENCY_S_PER_LAYER * layers,
        node_size=max(1, device.node_size // tensor),
        pass_intra=passed / intra,
        pass_inter=passed / inter,
    )


def offload_of(shape: Shape, device: Device, tensor: int = 1, pipeline: int = 1) -> OffloadModel:
    """Offload of one pipeline stage to host memory over each device's own link."""
    return OffloadModel(
        stage_layers=shape.num_layers // pipeline,
        bytes_per_token=shape.activation_bytes / tensor,
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


def sync_s(parameters: int, device: Device, tensor: int = 1) -> float:
    """Seconds to add up gradients and spread new weights at the end of a step, nothing hidden.

    `parameters` are those of one device. Gradients in fp32 are reduced and weights in bf16
    gathered over the HDP axis, whose ring leaves each node over as many network cards as the
    node has HDP ranks.
    """
    cards = max(1, device.node_size // tensor)
    sent = parameters * (4 + ELEMENT_BYTES)
    return sent / (cards * device.inter_bytes_per_s * LINK_EFFICIENCY)


def passing_share(cost: CostModel, tokens: int, length: int, size: int) -> float:
    """Part of a micro-batch's time in which keys and values are passed on, hidden or not.

    The micro-batch has `tokens` tokens in sequences of `length` on a ring of `size` ranks across
    nodes (ByteScale measures 97.6 % for short sequences on 256 ranks).
    """
    total_s = float(cost.seconds(tokens * length, tokens, size, size <= cost.node_size))
    rate = cost.pass_intra if size <= cost.node_size else cost.pass_inter
    return rate * tokens * (size - 1) / size / total_s
