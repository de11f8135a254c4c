"""The rates of devices by their data sheets, by name or from a YAML file.

What software gets out of a rate is not here: `rates.py` has these efficiencies, each with its
reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from megascale.config.load import build_as, read_tree
from megascale.errors import UserError, did_you_mean
from megascale.parsing import read_yaml_text

Precision = Literal["fp32", "bf16"]
GIB = 2**30
"""Data sheets write GB for the memory of a device and mean these: a driver shows 81,559 MiB of an
H100 "80 GB" and 143,771 MiB of an H200 "141 GB"."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What decides whether a run fits a device."""

    memory_bytes: int
    """Memory of the device."""
    context_bytes: int = GIB
    """Memory for the device's context, loaded kernels and work spaces. An assumption."""
    message_bytes: int = 2 * GIB
    """Memory for buffers of communicators (NCCL), where there is more than one rank. An
    assumption."""
    node_size: int = 8
    """Devices of a node."""


@dataclass(frozen=True, kw_only=True)
class Device(DeviceMemory):
    """Rates of one device by its data sheet, in one direction and without sparsity."""

    bf16_flops_per_s: float
    """Peak of matrix products in bf16, sums in fp32."""
    fp32_flops_per_s: float
    """Peak of fp32 without TF32, which training does not use."""
    intra_bytes_per_s: float
    """To all other devices of the node together: half of the rate of both directions."""
    inter_bytes_per_s: float
    """To other nodes: the network card of one device."""
    host_bytes_per_s: float
    """To host memory: half of the bus's rate of both directions."""
    peer_bytes_per_s: float | None = None
    """To a single device of the node. None: `intra_bytes_per_s`, as behind a switch."""
    source: str = "a file of yours"
    """Where the figures come from."""

    def flops_per_s(self, precision: Precision) -> float:
        """Peak floating-point operations per second at this precision."""
        return self.bf16_flops_per_s if precision == "bf16" else self.fp32_flops_per_s

    @property
    def ring_bytes_per_s(self) -> float:
        """To the next rank of a ring within the node, which is one device."""
        return self.intra_bytes_per_s if self.peer_bytes_per_s is None else self.peer_bytes_per_s


def _a100(memory_gib: int) -> Device:
    return Device(
        bf16_flops_per_s=312e12,
        fp32_flops_per_s=19.5e12,
        memory_bytes=memory_gib * GIB,
        intra_bytes_per_s=300e9,
        inter_bytes_per_s=25e9,
        host_bytes_per_s=32e9,
        source="NVIDIA A100 data sheet (SXM: NVLink 600 GB/s, PCIe Gen4); network of a DGX A100, "
        "200 Gbit/s per device",
    )


def _hopper(memory_gib: int, name: str) -> Device:
    return Device(
        bf16_flops_per_s=989.4e12,
        fp32_flops_per_s=66.9e12,
        memory_bytes=memory_gib * GIB,
        intra_bytes_per_s=450e9,
        inter_bytes_per_s=50e9,
        host_bytes_per_s=64e9,
        source=f"NVIDIA {name} data sheet and H100 architecture paper (SXM: NVLink 900 GB/s, PCIe "
        f"Gen5); network of a DGX {name}, 400 Gbit/s per device",
    )


DEVICES = {
    "a100-40": _a100(40),
    "a100-80": _a100(80),
    "h100": _hopper(80, "H100"),
    "h200": _hopper(141, "H200"),
    "b200": Device(
        bf16_flops_per_s=2250e12,
        fp32_flops_per_s=80e12,
        memory_bytes=180 * GIB,
        intra_bytes_per_s=900e9,
        inter_bytes_per_s=50e9,
        host_bytes_per_s=64e9,
        source="NVIDIA Blackwell architecture brief (HGX B200, 1000 W: NVLink 1.8 TB/s, PCIe "
        "Gen5); network of a DGX B200, 400 Gbit/s per device",
    ),
    "mi300x": Device(
        bf16_flops_per_s=1307.4e12,
        fp32_flops_per_s=163.4e12,
        memory_bytes=192 * GIB,
        intra_bytes_per_s=448e9,
        inter_bytes_per_s=50e9,
        host_bytes_per_s=64e9,
        peer_bytes_per_s=64e9,
        source="AMD Instinct MI300X data sheet (7 links of 128 GB/s, one to each other device, "
        "PCIe Gen5); network of 400 Gbit/s per device assumed",
    ),
    "cpu": Device(
        bf16_flops_per_s=96e9,
        fp32_flops_per_s=96e9,
        memory_bytes=4 * GIB,
        intra_bytes_per_s=5e9,
        inter_bytes_per_s=1.25e9,
        host_bytes_per_s=10e9,
        context_bytes=GIB // 2,
        message_bytes=GIB // 64,
        source="assumed, no data sheet: one core of 3 GHz with two fused multiply-adds of 8 fp32 "
        "numbers a cycle, bf16 no faster, 4 GiB of memory, 10 Gbit/s network",
    ),
}
"""By the names that `--device` of `megascale plan` and `megascale simulate` takes."""
ALIASES = {"a100": "a100-80"}
"""Names that stand for others."""


def device_of(name: str, network_gbps: float | None = None) -> Device:
    """A device of the table or of a YAML file, with another network where `network_gbps` says so.

    `network_gbps` is in Gbit/s per device. Raises UserError for an unknown name, a file that is no
    `Device`, and a rate that is not above 0.
    """
    device = _read(name) if name.endswith((".yaml", ".yml")) else _named(name)
    if network_gbps is None:
        return device
    if not 0 < network_gbps < math.inf:
        raise UserError(f"--network-gbps {network_gbps:g}: must be above 0, such as 400")
    return replace(device, inter_bytes_per_s=network_gbps * 1e9 / 8)


def _named(name: str) -> Device:
    known = ALIASES.get(name, name)
    if known in DEVICES:
        return DEVICES[known]
    raise UserError(
        f"--device {name}: not in the table{did_you_mean(name, [*DEVICES, *ALIASES])}; give one of "
        f"{', '.join(DEVICES)}, or a YAML file with keys "
        f"{', '.join(one.name for one in fields(Device))}"
    )


def _read(path: str) -> Device:
    where = f"--device {path}"
    try:
        text = read_yaml_text(path)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8; give a YAML file") from None
    device = build_as(Device, read_tree(text, where), where=where)
    for one in fields(Device):
        value = getattr(device, one.name)
        if isinstance(value, (int, float)) and not 1 <= value < 1e30:
            raise UserError(f"{where}: {one.name} = {value:g} must be from 1 to 1e30")
    return device
