"""What machines can do at best: memory and peak arithmetic, with the document each number stands in.

Model FLOPs utilisation (MFU) is the arithmetic a model needs over what the device could have done in the same time. The
peak is the one of dense bfloat16 matrix products with float32 accumulation; figures with "sparsity" are twice as high
and belong to no program here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One accelerator.

    Attributes:
        name: what the planner calls it.
        label: part of the name that the driver reports.
        memory: bytes.
        peak: dense bfloat16 FLOP/s; None when it is not in a data sheet.
        source: where the numbers stand.
    """

    name: str
    label: str
    memory: float
    peak: float | None
    source: str


HARDWARE = {
    device.name: device
    for device in (
        Hardware("mi300x", "MI300X", 192e9, 1307.4e12, "AMD Instinct MI300X data sheet"),
        Hardware("h100", "H100", 80e9, 989.4e12, "NVIDIA H100 data sheet, SXM, without sparsity"),
        Hardware("h200", "H200", 141e9, 989.4e12, "NVIDIA H200 data sheet, SXM, without sparsity"),
        Hardware("a100", "A100", 80e9, 312e12, "NVIDIA A100 data sheet, 80 GB SXM, without sparsity"),
        Hardware("rtx4090", "RTX 4090", 24e9, 165.2e12, "NVIDIA Ada GPU architecture, float32 accumulation"),
        Hardware("cpu", "", 16e9, None, "no data sheet: name the peak, or let it be measured"),
    )
}


def find_peak(device_name: str) -> float | None:
    """Peak FLOP/s of the device whose driver calls it ``device_name``; None when it is not in the table."""
    for device in HARDWARE.values():
        if device.label and device.label in device_name:
            return device.peak
    return None
