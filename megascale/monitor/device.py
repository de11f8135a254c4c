"""What a device can do at best, and how much of it a step used."""

from __future__ import annotations

import re

# (device name as CUDA gives it, dense bf16 peak, fp32 peak outside tensor cores) in TFLOP/s, from
# NVIDIA's data sheets without their sparsity factor of 2; None where it has no bf16 unit.
# Order matters: the first pattern that matches the whole name counts.
PEAKS: tuple[tuple[str, float | None, float], ...] = (
    (r"GB200", 2500.0, 80.0),
    (r"B200", 2250.0, 75.0),
    (r"H200 NVL", 835.5, 60.0),
    (r"H200", 989.4, 66.9),
    (r"GH200 (480|144)GB.*", 989.4, 66.9),
    (r"H100 NVL", 835.5, 60.0),
    (r"H100 PCIe", 756.5, 51.2),
    (r"H[18]00 80GB HBM3", 989.4, 66.9),
    (r"A[18]00[- ](SXM4?|PCIE|PCIe|PG509)[-0-9]*(40|80)GB", 312.0, 19.5),
    (r"A100 80GB PCIe", 312.0, 19.5),
    (r"A40", 149.7, 37.4),
    (r"A30", 165.0, 10.3),
    (r"A10G", 70.0, 31.5),
    (r"A10", 125.0, 31.2),
    (r"L40S", 362.0, 91.6),
    (r"L40", 181.0, 90.5),
    (r"L4", 121.0, 30.3),
    (r"V100S-PCIE-32GB", None, 16.4),
    (r"V100-SXM[23]-(16|32)GB.*", None, 15.7),
    (r"V100-PCIE-(16|32)GB", None, 14.0),
    (r"T4", None, 8.1),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak dense FLOP/s of a device in 'bf16' or 'fp32' (outside tensor cores, so no TF32).

    None for a CPU, a slice of a GPU (MIG), a precision or a device that is not in the table:
    never a guess.
    """
    model = re.sub(r"^(NVIDIA|Tesla) (Tesla )?", "", device_name.strip())
    for pattern, bf16, fp32 in PEAKS:
        if re.fullmatch(pattern, model):
            peak = {"bf16": bf16, "fp32": fp32}.get(precision)
            return None if peak is None else peak * 1e12
    return None


def mfu(flops: float, seconds: float, ranks: int, peak: float | None) -> float | None:
    """Model FLOP/s utilisation: the share of the peak of all ranks that the model used.

    `flops`: operations of the whole step over all ranks. None where the peak is unknown.
    Source: Chowdhery et al. 2022, PaLM, appendix B.
    """
    if peak is None:
        return None
    return flops / (seconds * ranks * peak)
