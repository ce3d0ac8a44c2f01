"""Matrix products with weights, computed by the fastest library at hand.

On an x86 CPU torch multiplies float32 matrices with MKL, whose best kernels run on Intel processors alone. oneDNN,
which comes with torch too and computes its convolutions and half-precision products, uses the wide registers of any
processor that has them. `linear` asks oneDNN; on an accelerator, in another number type, under autocast or where there
is little to multiply it is `torch.nn.functional.linear`. `nitro-e benchmark` prints what that gains.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from nitro_e_lite.model import cpu_kernels

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # else: another BLAS than MKL
SMALL = 2**24  # multiplications below which the call itself takes longer than they do
NARROW = 512  # side of a weight below which it takes longer to transpose what its gradient is made of than oneDNN gains


@torch.library.custom_op("nitro_e_lite::product", mutates_args=(), device_types="cpu")
def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` of float32 `(..., I)`, `(O, I)` and `(O,)` on a CPU, by oneDNN: `(..., O)`."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@product.register_fake
def _(rows, weight, bias=None):
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.nitro_e_lite.product)
def _(rows_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(rows_shape) * weight_shape[0]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    rows, weight = ctx.saved_tensors
    wants_rows, wants_weight, *wants_bias = ctx.needs_input_grad  # without a bias there are two
    flat, flat_rows = grad.flatten(0, -2), rows.flatten(0, -2)  # (N, O), (N, I)
    onto_rows = product(grad, weight.t()) if wants_rows else None
    if not wants_weight:
        onto_weight = None
    elif min(weight.shape) < NARROW:
        onto_weight = flat.t() @ flat_rows  # MKL reads them as they lie
    else:
        onto_weight = product(flat.t(), flat_rows.t())
    return onto_rows, onto_weight, *(flat.sum(0) if wanted else None for wanted in wants_bias)


product.register_autograd(_backward, setup_context=_keep)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the faster library: `(..., I)` to `(..., O)` with a weight `(O, I)`."""
    if _usable(rows, weight):
        return product(rows, weight, bias)
    return F.linear(rows, weight, bias)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two stacks of matrices `(K, N, I)` and `(K, I, O)`, by the faster library."""
    if ONEDNN and left.device.type == "cpu" and left.dtype == torch.float32:
        return torch.stack([product(a, b.t()) for a, b in zip(left, right, strict=True)])
    return left @ right


def _usable(rows: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and rows.dtype == weight.dtype == torch.float32
    if not (ONEDNN and plain and rows.device.type == "cpu"):
        return False
    if torch.is_autocast_enabled("cpu") or rows.numel() * weight.shape[0] < SMALL:
        return False
    return torch.compiler.is_compiling() or cpu_kernels.usable(rows)


class Linear(nn.Linear):
    """`torch.nn.Linear` with `linear` inside."""

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., I)` to `(..., O)`."""
        return linear(rows, self.weight, self.bias)


def speed_up(module: nn.Module) -> None:
    """Has every plain Linear layer of a module multiply by `linear`; weights, names and files stay the same."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
