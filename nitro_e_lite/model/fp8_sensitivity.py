"""How much each layer minds being rounded to FP8, one at a time: what a policy is justified with.

Record what the transformer is called with while a pipeline draws, round the weights of one layer (or the numbers that
go into it), call it again with the same and see how far the velocity moves. It needs no FP8 hardware: the products
are done in the model's own number type, on rounded numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model.fp8 import check_unquantized
from nitro_e_lite.model.fp8_codes import FN, dequantize, quantize
from nitro_e_lite.model.fp8_policy import ACTIVATIONS, Policy


@dataclass(frozen=True)
class Sensitivity:
    """How far the output moves when one layer (or group of layers) alone is rounded.

    Attributes:
        name: of the layer or group.
        layers: in the group.
        share: of the model's parameters.
        weight: root mean square change of the output over that of the output, its weights in FP8.
        activation: the same, its inputs in FP8 with a scale for each token.
    """

    name: str
    layers: int
    share: float
    weight: float
    activation: float


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """Collects what a model is called with, for example while a pipeline draws."""
    calls: list[tuple[tuple, dict]] = []
    hook = model.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _rounded(rows: Tensor, granularity: str, dtype: torch.dtype) -> Tensor:
    """A matrix, or tokens `(..., I)`, as FP8 would have them."""
    codes, scale = quantize(rows.flatten(0, -2), granularity, dtype)
    return dequantize(codes, scale, rows.dtype).view_as(rows)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    calls: Sequence[tuple[tuple, dict]],
    group: Callable[[str], str | None] = lambda name: name,
    policy: Policy | None = None,
) -> list[Sensitivity]:
    """Rounds one layer at a time to FP8 and measures how far the output moves; the model is as before afterwards.

    Args:
        model: not quantised; float32 keeps bf16's own rounding out of the numbers.
        calls: what it is called with, of `recorded_calls`: best those of a whole drawing.
        group: name of a Linear layer -> group that is rounded together, or None to leave it out.
        policy: whose granularity and activations are measured; its rules are what the numbers are for.

    Returns:
        One entry a group, in the order of the model. Products are done in the model's number type on rounded numbers,
        so that "activation" can be measured where hardware has no FP8 products.
    """
    policy = policy or Policy()
    check_unquantized(model)
    if not calls:
        raise InvalidValue("calls: empty; record some with recorded_calls")
    groups: dict[str, list[nn.Linear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (into := group(name)) is not None:
            groups.setdefault(into, []).append(layer)
    total, expected = sum(p.numel() for p in model.parameters()), [_output(model, call) for call in calls]

    def round_input(_, args):
        return _rounded(args[0], policy.granularity, ACTIVATIONS[policy.activations]), *args[1:]

    def change() -> float:
        pairs = [(_output(model, call), right) for call, right in zip(calls, expected, strict=True)]
        moved = sum((found - right).square().sum() for found, right in pairs)
        return (moved / sum(right.square().sum() for _, right in pairs)).sqrt().item()

    results = []
    for name, layers in groups.items():
        before = [layer.weight.data for layer in layers]
        try:
            for layer in layers:
                layer.weight.data = _rounded(layer.weight.data, policy.granularity, FN)
            weight = change()
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer.weight.data = value
        hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
        try:
            activation = change()
        finally:
            for hook in hooks:
                hook.remove()
        share = sum(layer.weight.numel() for layer in layers) / total
        results.append(Sensitivity(name, len(layers), share, weight, activation))
    return results


def _output(model: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    found = model(*call[0], **call[1])
    return (found[0] if isinstance(found, tuple) else found.sample).double()
