"""Joint attention over image and text tokens, whole or in subregions.

Image and text have their own query, key and value projections and look at one common sequence, image first.
Queries and keys are RMS-normalised per head, which keeps the logits bounded in half precision.

*Alternating subregion attention* (ASA) cuts that sequence into `s` groups that attend only within themselves,
which divides the cost of attention by `s`. A token at position `(l, s, n)` of the regrouping `(l s n)` goes to
group `s`: chunk size `n = 1` gives strided groups (every s-th token), `n = 4` gives blocks of 4. The groups change
from block to block (full, strided, blocks, full, ...), so information still reaches every token.

Normalising, regrouping and joining the two streams is one step here, `join_heads`: each is a pass over memory, and
on a CPU passes over memory, not matrix products, are what attention can save.

Source: Stable Diffusion 3 (MM-DiT); Nitro-E (E-MMDiT), alternating subregion attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.products import Linear

BACKENDS = ("auto", "sdpa", "math")
EPS = 1e-6  # of the RMS norm of queries and keys


def subregion_split(tokens: Tensor, ratio: int, chunk: int) -> Tensor:
    """Regroup `(l s n)` tokens into `s` short sequences: `b (l s n) d -> (b s) (l n) d`.

    Args:
        tokens: `(B, N, D)`, `N` a multiple of `ratio * chunk`.
        ratio: Number of groups `s`.
        chunk: Tokens that stay together `n`.

    Returns:
        `(B * s, N / s, D)`.

    Raises:
        ValueError: `N` is not a multiple of `ratio * chunk`.
    """
    _check_divisible(tokens.shape[1], ratio, chunk)
    if ratio == 1:
        return tokens
    groups = tokens.unflatten(1, (-1, ratio, chunk)).transpose(1, 2)  # (B, s, l, n, D)
    return groups.flatten(2, 3).flatten(0, 1)  # (B*s, N/s, D)


def subregion_merge(groups: Tensor, ratio: int, chunk: int) -> Tensor:
    """The exact inverse of `subregion_split`: `(b s) (l n) d -> b (l s n) d`.

    Args:
        groups: `(B * s, N / s, D)`.
        ratio: Number of groups `s`.
        chunk: Tokens that stay together `n`.

    Returns:
        `(B, N, D)`.
    """
    if ratio == 1:
        return groups
    tokens = groups.unflatten(0, (-1, ratio)).unflatten(2, (-1, chunk))  # (B, s, l, n, D)
    return tokens.transpose(1, 2).flatten(1, 3)  # (B, N, D)


def joint_attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Softmax attention probabilities `(..., S, S')` of queries `(..., S, E)` and keys `(..., S', E)`."""
    return torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention.

    Args:
        query: `(B, M, S, E)`.
        key: `(B, M, S', E)`.
        value: `(B, M, S', E)`.
        backend: "sdpa" is torch's fused kernel; "math" is two matrix products and a softmax, which forward-mode and
            double differentiation need; "auto" is the faster of the two that works.

    Returns:
        `(B, M, S, E)`.
    """
    if backend == "math" or (backend == "auto" and _math_is_better(query)):
        return joint_attention_probabilities(query, key) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _math_is_better(query: Tensor) -> bool:
    """The fused kernel has no forward mode; on a CPU its backward is slow in half precision."""
    if cpu_kernels.forward_mode():
        return True
    half_precision = query.dtype in (torch.float16, torch.bfloat16)
    trains = torch.is_grad_enabled() and query.requires_grad
    return query.device.type == "cpu" and half_precision and trains


def _check_divisible(tokens: int, ratio: int, chunk: int) -> None:
    if tokens % (ratio * chunk):
        raise ValueError(
            f"{tokens} tokens cannot be split into {ratio} groups of chunks of {chunk}: "
            f"the number of tokens must be a multiple of {ratio * chunk}"
        )


def join_heads(image: Tensor, text: Tensor, weights: tuple[Tensor, Tensor], ratio: int, chunk: int):
    """Two projected streams to the queries, keys and values of their common (sub)sequences.

    Args:
        image: Queries, keys and values of the image `(B, N, 3, M, E)`.
        text: The same of the text `(B, L, 3, M, E)`.
        weights: RMS norm weights (query, key) of image and of text, `(2, E)` each.
        ratio: ASA groups `s`.
        chunk: ASA chunk `n`.

    Returns:
        Queries, keys and values `(B * s, M, S, E)`, `S = (N + L) / s`, image tokens first.
    """
    for stream in (image, text):
        _check_divisible(stream.shape[1], ratio, chunk)
    if cpu_kernels.usable(image):
        joined = _JoinHeads.apply(image, text, *weights, ratio, chunk)
    else:
        joined = _join_heads_plain(image, text, weights, ratio, chunk)
    return tuple(part.transpose(1, 2) for part in joined)  # (B*s, M, S, E)


def _join_heads_plain(image, text, weights, ratio, chunk):
    joined = []
    for stream, weight in zip((image, text), weights, strict=True):
        heads = stream.shape[2:]
        groups = subregion_split(stream.flatten(2), ratio, chunk).unflatten(2, heads)  # (B*s, N/s, 3, M, E)
        query, key, value = groups.unbind(2)
        query, key = (F.rms_norm(x, x.shape[-1:], w, EPS) for x, w in zip((query, key), weight, strict=True))
        joined.append((query, key, value))
    return [torch.cat(parts, dim=1) for parts in zip(*joined, strict=True)]  # (B*s, S, M, E)


class _JoinHeads(torch.autograd.Function):
    """`_join_heads_plain`, written straight into the joint sequence, a cache full of samples at a time."""

    @staticmethod
    def forward(ctx, image, text, image_weight, text_weight, ratio, chunk):
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
            for i in cpu_kernels.pieces(batch, stream[0].numel()):
                size = torch.linalg.vector_norm(stream[i, :, :2], dim=-1, keepdim=True)
                torch.rsqrt(size.square_().mul_(1 / heads[1]).add_(EPS), out=inverse[i])
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
            for i in cpu_kernels.pieces(len(stream), stream[0].numel()):
                for p, grad in enumerate((query, key)):
                    views = (x[i, ..., p, :, :] for x in (tokens, inverse, into))
                    _norm_backward(grad[i], *views, weight[p], grad_weight[p])
                into[i, ..., 2, :, :].copy_(value[i])
            results.append((grad_stream, grad_weight))
        (grad_image, grad_image_weight), (grad_text, grad_text_weight) = results
        return grad_image, grad_text, grad_image_weight, grad_text_weight, None, None


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


class JointAttention(nn.Module):
    """Attention of image and text tokens over their common sequence.

    Args:
        num_heads: `M`.
        head_dim: `E`; the width is `D = M * E`.
        pattern: ASA pattern `(ratio, chunk)`; `(1, 1)` is full attention.
        context_pre_only: The text stream ends here: it has no output.
    """

    def __init__(
        self, num_heads: int, head_dim: int, pattern: tuple[int, int] = (1, 1), context_pre_only: bool = False
    ):
        super().__init__()
        dim = num_heads * head_dim
        self.heads, self.pattern, self.context_pre_only = (num_heads, head_dim), pattern, context_pre_only
        self.backend = "auto"
        self.qkv = Linear(dim, 3 * dim)
        self.qkv_context = Linear(dim, 3 * dim)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)
        self.norm_q_context, self.norm_k_context = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)
        self.out = Linear(dim, dim)
        self.out_context = None if context_pre_only else Linear(dim, dim)

    def joint_heads(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries, keys and values `(B * s, M, (N + L) / s, E)` of tokens `(B, N, D)` and `(B, L, D)`.

        `joint_attention_probabilities(query, key)` of them are the attention maps.
        """
        qkv = self.qkv(image).unflatten(-1, (3, *self.heads))  # (B, N, 3, M, E)
        qkv_context = self.qkv_context(text).unflatten(-1, (3, *self.heads))  # (B, L, 3, M, E)
        weights = (
            torch.stack([self.norm_q.weight, self.norm_k.weight]),
            torch.stack([self.norm_q_context.weight, self.norm_k_context.weight]),
        )
        return join_heads(qkv, qkv_context, weights, *self.pattern)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            image: `(B, N, D)`, normalised and modulated.
            text: `(B, L, D)`, normalised and modulated.

        Returns:
            `(B, N, D)` and `(B, L, D)`, or None for the text when `context_pre_only`.
        """
        query, key, value = self.joint_heads(image, text)
        mixed = scaled_attention(query, key, value, self.backend).transpose(1, 2).flatten(2)  # (B*s, S, D)
        border = image.shape[1] // self.pattern[0]
        mixed_image, mixed_text = mixed.tensor_split([border], dim=1)
        image = self.out(subregion_merge(mixed_image, *self.pattern).contiguous())
        if self.out_context is None:
            return image, None
        return image, self.out_context(subregion_merge(mixed_text, *self.pattern).contiguous())
