"""Hand-written CPU kernels: element-wise passes that stay in the cache, and matrix products by the faster library.

On a CPU a transformer step spends a third of its time or more outside matrix products: each `x * (1 + scale) + shift`
reads and writes whole activations, and autograd repeats every one of them, often more than once, on the way back. The
functions here do the same arithmetic with fewer passes: their forward writes in place, their backward is written out by
hand and walks over the batch in pieces that fit the second-level cache.

The products themselves: on an x86 CPU torch multiplies float32 matrices with MKL, whose best kernels run on Intel
processors alone. oneDNN, which comes with torch too, uses the wide registers of any processor that has them. `linear`
asks oneDNN where that is faster; `nitro-e benchmark` prints what it gains.

Each kernel has a plain twin made of ordinary torch operations. One switch, `usable`, decides for all of them: the twin
runs on accelerators, under `torch.compile` (which fuses by itself), under autocast and under forward-mode
differentiation; gradients of gradients need it too, see `plain_operations`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

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
    """Should the hand-written version run for this tensor? The one switch of this module."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
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
    return torch.addcmul(shift.unsqueeze(1), layer_norm(tokens, eps=eps), scale.unsqueeze(1))


def layer_norm(tokens: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`F.layer_norm` over the last axis, `(..., D)`; of 16 bit numbers in forward mode by way of float32.

    An accelerator keeps their statistics in float32, and torch then gives a tangent of that type, which no later
    product takes.
    """
    if tokens.element_size() == 2 and forward_mode():
        tokens, weight, bias, dtype = tokens.float(), _wide(weight), _wide(bias), tokens.dtype
        return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps).to(dtype)
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)


def rms_norm(tokens: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` in the same way."""
    if tokens.element_size() == 2 and forward_mode():
        return F.rms_norm(tokens.float(), tokens.shape[-1:], weight.float(), eps).to(tokens.dtype)
    return F.rms_norm(tokens, tokens.shape[-1:], weight, eps)


def _wide(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()


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


class JoinHeads(torch.autograd.Function):
    """`attention.join_heads`, written straight into the joint sequence, a cache full of samples at a time."""

    @staticmethod
    def forward(ctx, image, text, image_weight, text_weight, ratio, chunk, eps):
        batch, length, _, *heads = image.shape
        joint = image.new_empty(3, batch, ratio, heads[0], (length + text.shape[1]) // ratio, heads[1]).transpose(3, 4)
        inverses = []
        for stream, weight, rows in _streams(image, text, image_weight, text_weight, ratio):
            inverse = stream.new_empty(batch, stream.shape[1], 2, heads[0], 1)
            source = _grouped(stream, ratio, chunk)  # (B, s, l, n, 3, M, E)
            into = joint[:, :, :, rows].unflatten(3, (-1, chunk)).permute(1, 2, 3, 4, 0, 5, 6)
            normed, grouped_inverse, row_weight = (
                into[..., :2, :, :],
                _grouped(inverse, ratio, chunk),
                weight.unsqueeze(1),
            )
            for i in pieces(batch, stream[0].numel()):
                size = torch.linalg.vector_norm(stream[i, :, :2], dim=-1, keepdim=True)
                torch.rsqrt(size.square_().mul_(1 / heads[1]).add_(eps), out=inverse[i])
                torch.mul(source[i, ..., :2, :, :], grouped_inverse[i], out=normed[i])
                normed[i].mul_(row_weight)
                into[i, ..., 2, :, :].copy_(source[i, ..., 2, :, :])
            inverses.append(inverse)
        ctx.save_for_backward(image, text, image_weight, text_weight, *inverses)
        ctx.pattern = ratio, chunk
        return joint.flatten(1, 2).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        image, text, image_weight, text_weight, *inverses = ctx.saved_tensors
        ratio, chunk = ctx.pattern
        results = []
        streams = _streams(image, text, image_weight, text_weight, ratio)
        for (stream, weight, rows), inverse in zip(streams, inverses, strict=True):
            grad_stream, grad_weight = torch.empty_like(stream), torch.zeros_like(weight)
            query, key, value = (  # (B, l, s, n, M, E): the order of the stream itself
                grad.unflatten(0, (-1, ratio))[:, :, rows].unflatten(2, (-1, chunk)).transpose(1, 2) for grad in grads
            )
            tokens, into, inverse = (x.unflatten(1, (-1, ratio, chunk)) for x in (stream, grad_stream, inverse))
            for i in pieces(len(stream), stream[0].numel()):
                for p, grad in enumerate((query, key)):
                    views = (x[i, ..., p, :, :] for x in (tokens, inverse, into))
                    _norm_backward(grad[i], *views, weight[p], grad_weight[p])
                into[i, ..., 2, :, :].copy_(value[i])
            results.append((grad_stream, grad_weight))
        (grad_image, grad_image_weight), (grad_text, grad_text_weight) = results
        return grad_image, grad_text, grad_image_weight, grad_text_weight, None, None, None


def _streams(image, text, image_weight, text_weight, ratio):
    """Each stream with its weights and its place in the joint sequence."""
    border = image.shape[1] // ratio
    return (image, image_weight, slice(0, border)), (text, text_weight, slice(border, None))


def _grouped(stream: Tensor, ratio: int, chunk: int) -> Tensor:
    """View `(B, N, ...)` as `(B, s, l, n, ...)`."""
    return stream.unflatten(1, (-1, ratio, chunk)).transpose(1, 2)


def _norm_backward(grad, tokens, inverse, into, weight, grad_weight) -> None:
    """Backward of `tokens * inverse * weight`, `inverse = rsqrt(mean(tokens^2) + eps)`; fills the last two."""
    product = tokens.new_empty(tokens.shape)
    product = torch.mul(grad, tokens, out=product).view(-1, tokens.shape[-1])  # (rows, E)
    grad_weight += inverse.flatten() @ product
    slope = (product @ weight).view(inverse.shape) * inverse**3 / tokens.shape[-1]
    torch.mul(grad, weight, out=into)
    into.mul_(inverse).addcmul_(tokens, slope, value=-1)


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
    if _product_usable(rows, weight):
        return product(rows, weight, bias)
    return F.linear(rows, weight, bias)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two stacks of matrices `(K, N, I)` and `(K, I, O)`, by the faster library."""
    if ONEDNN and left.dtype == torch.float32 and usable(left):
        return torch.stack([product(a, b.t()) for a, b in zip(left, right, strict=True)])
    return left @ right


def _product_usable(rows: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and rows.dtype == weight.dtype == torch.float32
    if not (ONEDNN and plain and rows.device.type == "cpu"):
        return False
    if rows.numel() * weight.shape[0] < SMALL:
        return False
    compiling = torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return compiling or usable(rows)


class Linear(nn.Linear):
    """`torch.nn.Linear` with `linear` inside."""

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., I)` to `(..., O)`."""
        return linear(rows, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` whose scale and shift another step can fold in: called without tokens, it hands them out.

    Off-loading brings weights in when a module is called: those that are read past it would stay where they are.
    """

    def forward(self, tokens: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`(..., D)` to `(..., D)`; without tokens weight and bias, `(D,)` each."""
        if tokens is None:
            return self.weight.clone(), self.bias.clone()
        return layer_norm(tokens, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """The same of `torch.nn.RMSNorm`, which has no shift."""

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """`(..., D)` to `(..., D)`; without tokens the weight `(D,)`."""
        return self.weight.clone() if tokens is None else super().forward(tokens)


def speed_up(module: nn.Module) -> None:
    """Has every plain Linear layer of a module multiply by `linear`; weights, names and files stay the same."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
