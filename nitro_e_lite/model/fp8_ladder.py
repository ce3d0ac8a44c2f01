"""What a device can do with FP8: dynamic FP8, weight-only FP8 or bf16, with the reason of each step down.

- `dynamic`: weights and activations in FP8, multiplied as FP8; activations get a scale for each token when they come.
- `weight_only`: weights are stored in FP8 and multiplied out to 16 bit just before use. Saves memory, not time.
- `bf16`: nothing changes.

Limits that are known beforehand come first, because they make the better reason; then one small product is done on the
device and has to come out right, because drivers, compilers and libraries know more ways to fail than a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nitro_e_lite.model.fp8_codes import E5M2, FN, FNUZ, dequantize, quantize, to_fnuz
from nitro_e_lite.model.fp8_policy import ACTIVATIONS, Policy

RUNGS = ("dynamic", "weight_only", "bf16")
SMALLEST = 1e-12  # largest activation of a token below which its scale no longer shrinks: a token of zeros stays zero


@dataclass(frozen=True)
class Facts:
    """What is known of a device.

    Attributes:
        kind: torch's type of device, "cpu", "cuda" (ROCm too), "mps", "xpu".
        name: what a person calls it.
        capability: compute capability of an NVIDIA GPU.
        arch: such as "gfx942" of an AMD GPU.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] | None = None
    arch: str | None = None

    @property
    def fnuz(self) -> bool:
        """Does its hardware read `float8_e4m3fnuz` (MI300 series)?"""
        return self.arch is not None and self.arch.startswith(("gfx940", "gfx941", "gfx942"))


@dataclass(frozen=True)
class Choice:
    """The rung of the ladder that is used.

    Attributes:
        rung: one of `RUNGS`.
        reasons: one for each step down from the first.
        fnuz: the hardware reads fnuz codes.
        fast_accum: products may add up in fewer bits, which Intel's GPUs cannot.
    """

    rung: str
    reasons: tuple[str, ...] = ()
    fnuz: bool = False
    fast_accum: bool = True


def device_facts(device: torch.device) -> Facts:
    """Asks the driver."""
    if device.type != "cuda":
        return Facts(device.type, device.type)
    about = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Facts("cuda", about.name, arch=about.gcnArchName.split(":")[0])
    return Facts("cuda", about.name, capability=(about.major, about.minor))


def _why_not_dynamic(facts: Facts, dtype: torch.dtype) -> str | None:
    """What keeps a device from multiplying FP8 numbers; None: nothing that is known beforehand."""
    if dtype != torch.bfloat16:
        return f"FP8 products with a scale for each row give bfloat16, and {dtype} was asked for"
    if facts.kind == "cpu":
        return "a CPU multiplies FP8 numbers hundreds of times slower than 16-bit ones"
    if facts.kind not in ("cuda", "xpu"):
        return f"torch has no FP8 products for {facts.kind}"
    if facts.capability is not None and facts.capability < (8, 9):
        found = ".".join(map(str, facts.capability))
        return f"{facts.name} has compute capability {found}; FP8 products need 8.9 (Ada, Hopper)"
    if facts.arch is not None and not (facts.fnuz or facts.arch.startswith("gfx95")):
        return f"{facts.name} is a {facts.arch}; FP8 products need gfx942 (MI300) or gfx950 (MI350)"
    return None


def choose_rung(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    facts: Facts | None = None,
    try_out: Callable[[torch.device, Choice, torch.dtype], str | None] | None = None,
) -> Choice:
    """The first rung that a device can do: known limits first, then one small product that must come out right.

    Args:
        device: where the transformer runs.
        dtype: number type of what is not in FP8.
        facts: of the device; asked for when not given.
        try_out: what is done on the device to be sure: a reason, or None when all went well; `try_product`.
    """
    device, reasons = torch.device(device), []
    facts, try_out = facts or device_facts(device), try_out or try_product
    for rung, limit in (("dynamic", _why_not_dynamic(facts, dtype)), ("weight_only", None)):
        choice = Choice(rung, tuple(reasons), facts.fnuz, facts.kind != "xpu")
        problem = limit or try_out(device, choice, dtype)
        if problem is None:
            return choice
        reasons.append(f"not {rung}: {problem}")
    return Choice("bf16", tuple(reasons))


@torch.no_grad()
def try_product(device: torch.device, choice: Choice, dtype: torch.dtype) -> str | None:
    """One small product on a device, compared with the same in float32: what went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    layer, rows = nn.Linear(64, 32, bias=False), torch.randn(16, 64, generator=generator)
    layer.weight.copy_(torch.randn(32, 64, generator=generator))
    expected = rows @ layer.weight.T
    try:
        codes, scale = quantize(layer.weight)
        layer.weight = wrap(codes, scale, dtype, Policy(), choice, dynamic=True)
        found = layer.to(device)(rows.to(device, dtype)).float().cpu()
    except Exception as error:  # whatever a driver, a compiler or torchao raises is the reason
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    error = ((found - expected).norm() / expected.norm()).item()
    return None if error < 0.1 else f"a product came out wrong by {error:.0%}"


@cache
def _torchao() -> Any:
    """What builds torchao's tensor of codes and scales; imported when it is needed."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs as Activation

    def build(codes: Tensor, scale: Tensor, dtype: torch.dtype, activations: torch.dtype | None, fast: bool) -> Tensor:
        rows = len(scale) == len(codes) and len(codes) > 1
        kernel, options = KernelPreference.TORCH, {}
        if activations is not None:
            per = PerRow() if rows else PerTensor()
            options["act_quant_kwargs"] = Activation(activations, per, hp_value_lb=SMALLEST, kernel_preference=kernel)
            options["mm_config"] = Float8MMConfig(use_fast_accum=fast)
        block = [1 if rows else codes.shape[0], codes.shape[1]]
        return Float8Tensor(codes, scale, block_size=block, kernel_preference=kernel, dtype=dtype, **options)

    return build


def wrap(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, policy: Policy, choice: Choice, dynamic: bool
) -> nn.Parameter:
    """fn codes and scales as the weight of a layer on a rung."""
    activations = ACTIVATIONS[policy.activations] if dynamic and choice.rung == "dynamic" else None
    if choice.rung == "bf16":
        return nn.Parameter(dequantize(codes, scale, dtype), requires_grad=False)
    if choice.fnuz:
        codes, scale = to_fnuz(codes, scale)
        activations = {FN: FNUZ, E5M2: torch.float8_e5m2fnuz}.get(activations)
    return nn.Parameter(_torchao()(codes, scale, dtype, activations, choice.fast_accum), requires_grad=False)
