"""Element-wise passes that stay in the cache.

On a CPU a transformer step spends a third of its time or more outside matrix products: each `x * (1 + scale) + shift`
reads and writes whole activations, and autograd repeats every one of them, often more than once, on the way back. The
functions here do the same arithmetic with fewer passes: their forward writes in place, their backward is written out by
hand and walks over the batch in pieces that fit the second-level cache.

Each has a plain twin made of ordinary torch operations. The twin runs on accelerators and under `torch.compile` (which
fuse by themselves) and under forward-mode differentiation; gradients of gradients need it too, see `plain_operations`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_ELEMENTS = 2**18  # 1 MiB of float32: half of a second-level cache

_plain_wanted: ContextVar[bool] = ContextVar("plain_wanted", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within this context only ordinary torch operations are used, which can be differentiated twice."""
    token = _plain_wanted.set(True)
    try:
        yield
    finally:
        _plain_wanted.reset(token)


def forward_mode() -> bool:
    """Is this call inside `torch.func` or forward-mode differentiation?"""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def usable(tensor: Tensor) -> bool:
    """Should the hand-written version run for this tensor?"""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and not _plain_wanted.get() and not forward_mode()


def pieces(batch: int, elements: int) -> Iterator[slice]:
    """Slices of the batch whose `elements` per sample fill the cache but do not overflow it."""
    step = max(1, CACHE_ELEMENTS // max(1, elements))
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, scale, shift, eps):
        out, mean, rstd = torch.native_layer_norm(tokens, tokens.shape[-1:], None, None, eps)
        ctx.save_for_backward(tokens, mean, rstd, scale, shift)
        return torch.addcmul(shift.unsqueeze(1), out, scale.unsqueeze(1), out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        samples = zip(grad.unbind(), *(x.unbind() for x in ctx.saved_tensors), strict=True)
        grads = [  # each sample has its own scale: the kernel of the affine norm does all three sums at once
            torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, rstd, w, b, [True, True, True])
            for g, x, mean, rstd, w, b in samples
        ]
        return *(torch.stack(part) for part in zip(*grads, strict=True)), None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, gate, update):
        ctx.save_for_backward(gate, update)
        return torch.addcmul(tokens, gate.unsqueeze(1), update)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, update = ctx.saved_tensors
        grad_gate, grad_update = torch.empty_like(gate), torch.empty_like(update)
        for i in pieces(len(grad), grad[0].numel()):
            torch.sum(grad[i] * update[i], dim=1, out=grad_gate[i])
            torch.mul(grad[i], gate[i].unsqueeze(1), out=grad_update[i])
        return grad, grad_gate, grad_update


_GELU_A, _GELU_B = 2 * (2 / torch.pi) ** 0.5, 2 * (2 / torch.pi) ** 0.5 * 0.044715


class _Gelu(torch.autograd.Function):
    """`x * s` with `s = sigmoid(a x + b x^3)`, the same function as the tanh form and cheaper to evaluate.

    The forward already makes the derivative `s + x s (1 - s) (a + 3 b x^2)`, while everything is in the cache.
    """

    @staticmethod
    def forward(ctx, inputs):
        one = torch.tensor(_GELU_A)
        rows = inputs.flatten(0, -2)
        out, slope = torch.empty_like(rows), torch.empty_like(rows)
        for i in pieces(len(rows), 4 * rows.shape[-1]):
            x, y, s = rows[i], out[i], slope[i]
            torch.addcmul(one, x, x, value=_GELU_B, out=s)
            s.mul_(x).sigmoid_()
            torch.mul(x, s, out=y)
            rest = torch.addcmul(y, y, s, value=-1)
            s.addcmul_(rest, torch.addcmul(one, x, x, value=3 * _GELU_B))
        ctx.save_for_backward(slope)
        return out.view_as(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].view_as(grad)


def modulated_norm(tokens: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm with a scale and shift per sample: `(tokens - mean) / std * scale + shift`.

    Args:
        tokens: `(B, N, D)`.
        scale: `(B, D)`.
        shift: `(B, D)`.
        eps: Added to the variance.

    Returns:
        `(B, N, D)`.
    """
    if usable(tokens) and tokens.dtype == scale.dtype:
        return _ModulatedNorm.apply(tokens.contiguous(), scale.contiguous(), shift.contiguous(), eps)
    return torch.addcmul(shift.unsqueeze(1), F.layer_norm(tokens, tokens.shape[-1:], eps=eps), scale.unsqueeze(1))


def gated_residual(tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`tokens + gate * update` for tokens and update `(B, N, D)` and a gate `(B, D)` per sample."""
    if usable(tokens):
        return _GatedResidual.apply(tokens, gate, update)
    return torch.addcmul(tokens, gate.unsqueeze(1), update)


def gelu(inputs: Tensor) -> Tensor:
    """GELU in its tanh form, any shape."""
    if usable(inputs) and inputs.dtype == torch.float32 and torch.is_grad_enabled() and inputs.requires_grad:
        return _Gelu.apply(inputs)
    return F.gelu(inputs, approximate="tanh")
