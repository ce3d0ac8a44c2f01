"""How big and how much arithmetic a model is, and what machines can do at best.

Size and arithmetic are counted on torch's *meta* device: the model is built and run without a single number being
stored, so the full 302M-parameter model is counted on any laptop in a second.

What counts as a FLOP: a multiplication and an addition are two. The headline number holds the products with weights
(linear layers and convolutions), which is how 0.0775 TFLOPs comes about for the published model (batch 1, 128 text
tokens). The products inside attention, query x key and probability x value, hold no weights and are reported beside it;
with them it is 0.0804, and either rounds to the published 0.08.

Model FLOPs utilisation (MFU) is the arithmetic a model needs over what the device could have done in the same time. The
peaks in `HARDWARE` are those of dense bfloat16 matrix products with float32 accumulation; figures with "sparsity" are
twice as high and belong to no program here. AMD's are compute units x FLOPs a clock x clock: 208 (MI250) or 220
(MI250X) x 1,024 x 1.7 GHz, 304 x 2,048 x 2.1 GHz (MI300X, MI325X), 256 x 4,096 x 2.4 GHz (MI355X; AMD rounds to 2.5
PFLOPS). Compute units and memory of the newer ones: rocm.docs.amd.com/en/latest/reference/gpu-specs.html; compute units
and clock of an MI250's dies: rocm.docs.amd.com/en/latest/conceptual/gpu-arch/mi250.html (2 x 104, 1.7 GHz).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nitro_e_lite.config import SCALES, to_dict
from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.tokens import FULL_TEXT_LENGTH
from nitro_e_lite.presets import preset

TRAINING_PASSES = 3  # what a training sample costs, in forward passes: one, and two for the gradients
PUBLISHED_DAYS, PUBLISHED_DEVICES, PUBLISHED_HARDWARE = 1.5, 8, "mi300x"  # both stages together

PARTS = {
    "patch_embed": "embeddings",
    "text_embed": "embeddings",
    "time_embed": "embeddings",
    "compressor": "token compressor",
    "reconstructor": "token reconstructor",
    "projector": "REPA projector",
    "norm_out": "output",
    "proj_out": "output",
}


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward pass.

    Attributes:
        weights: products with weights.
        attention: products inside attention, which hold no weights.
        components: part of the model -> what is computed there, products of both kinds.
    """

    weights: int
    attention: int
    components: dict[str, int]


def model_config(size: str) -> dict[str, Any]:
    """Constructor arguments of the transformer at one of the project's sizes; "full" is the published model.

    Raises:
        ValueError: for another size.
    """
    if size not in SCALES:
        raise InvalidValue(f"size: {size!r} is not one of {', '.join(SCALES)}")
    return {} if size == "full" else to_dict(preset("base", size).model)


def build_on_meta(config: Mapping[str, Any]) -> EMMDiTTransformer2DModel:
    """The transformer without storage: every tensor has a shape and no numbers."""
    with torch.device("meta"):
        return EMMDiTTransformer2DModel(**config).eval()


def part_of(name: str) -> str:
    """The part of the transformer that a parameter or module belongs to, in a reader's words."""
    first, *rest = name.split(".")
    return f"group {int(rest[0]) + 1}" if first == "groups" else PARTS[first]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Part of the transformer -> number of parameters."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return dict(counts)


def count_flops(config: Mapping[str, Any], batch: int = 1, text_tokens: int = FULL_TEXT_LENGTH) -> FlopCount:
    """Counts one forward pass; the module's essay says what is counted.

    Args:
        config: constructor arguments of the transformer.
        batch: pictures in the batch.
        text_tokens: length of the text.

    Raises:
        TypeError, ValueError: for a batch or number of text tokens that is no integer, below 1 or above a million.
    """
    for name, value in (("batch", batch), ("text_tokens", text_tokens)):
        if not isinstance(value, Integral):
            raise InvalidType(f"{name}: expected an integer, got {value!r}")
        if value < 1:
            raise InvalidValue(f"{name}: {value} is below 1")
        if value > 1_000_000:
            raise InvalidValue(f"{name}: {value} is above 1000000")
    model = build_on_meta(config)
    size = model.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(batch, size.in_channels, size.sample_size, size.sample_size)
        model(latents, torch.empty(batch, text_tokens, size.caption_channels), torch.empty(batch))
    counts = counter.get_flop_counts()
    components: Counter[str] = Counter()
    for name, operations in counts.items():
        inner = name.partition(".")[2]  # without the class name
        if re.fullmatch(r"\w+|groups\.\d+\.\d+", inner):
            components[part_of(inner)] += sum(operations.values())
    total = sum(counts["Global"].values())
    attention = sum(n for operation, n in counts["Global"].items() if "bmm" in str(operation))
    return FlopCount(total - attention, attention, dict(components))


@dataclass(frozen=True)
class Hardware:
    """One accelerator.

    Attributes:
        name: what the planner calls it. The two dies of an MI250 are two devices to the driver, and so to a run.
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
        Hardware("mi250x", "MI250X", 64e9, 191.5e12, "AMD Instinct MI250X data sheet (383.0), one of its two dies"),
        Hardware("mi250", "MI250", 64e9, 181.05e12, "AMD Instinct MI250 data sheet (362.1), one of its two dies"),
        Hardware("mi300x", "MI300X", 192e9, 1307.4e12, "AMD Instinct MI300X data sheet"),
        Hardware("mi325x", "MI325X", 256e9, 1307.4e12, "AMD Instinct MI325X data sheet"),
        Hardware("mi355x", "MI355X", 288e9, 2516.6e12, "AMD Instinct MI355X data sheet, without sparsity"),
        Hardware("h100", "H100", 80e9, 989.4e12, "NVIDIA H100 data sheet, SXM, without sparsity"),
        Hardware("h200", "H200", 141e9, 989.4e12, "NVIDIA H200 data sheet, SXM, without sparsity"),
        Hardware("a100", "A100", 80e9, 312e12, "NVIDIA A100 data sheet, 80 GB SXM, without sparsity"),
        Hardware("rtx4090", "RTX 4090", 24e9, 165.2e12, "NVIDIA Ada GPU architecture, float32 accumulation"),
        Hardware("cpu", "", 16e9, None, "no data sheet: name the peak, or let it be measured"),
    )
}


def find_peak(device_name: str) -> float | None:
    """Peak FLOP/s of the device whose driver calls it `device_name`; None when it is not in the table."""
    for device in HARDWARE.values():
        if device.label and device.label in device_name:
            return device.peak
    return None


def published_samples_per_second() -> float:
    """Training samples a second of the published run, all devices together: steps and batches of the full presets."""
    stages = [preset(name, "full") for name in ("base", "finetune")]
    return sum(stage.steps * stage.batch_size for stage in stages) / (PUBLISHED_DAYS * 86_400)


def model_flops(config: dict, text_tokens: int) -> float:
    """FLOPs of one forward pass of one sample, attention included."""
    flops = count_flops(config, 1, text_tokens)
    return flops.weights + flops.attention
