"""Joint attention over image and text tokens, whole or in subregions.

Image and text have their own query, key and value projections and look at one common sequence, image first.
Queries and keys are RMS-normalised per head (QK norm), which keeps the logits bounded in half precision.

*Alternating subregion attention* (ASA) cuts that sequence into `s` groups that attend only within themselves,
which divides the cost of attention by `s`. A token at position `(l, s, n)` of the regrouping `(l s n)` goes to
group `s`: chunk size `n = 1` gives strided groups (every s-th token), `n = 4` gives blocks of 4. The groups change
from block to block (full, strided, blocks, full, ...), so information still reaches every token.

Normalising, regrouping and joining the two streams is one step here, `join_heads`: each is a pass over memory, and
on a CPU passes over memory, not matrix products, are what attention can save.

Source: Stable Diffusion 3 (MM-DiT); Nitro-E (E-MMDiT), alternating subregion attention.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.cpu_kernels import Linear, RMSNorm

KERNELS = ("auto", "sdpa", "math")
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


def scaled_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: str = "auto", backend: AttentionBackendName | None = None
) -> Tensor:
    """Softmax attention.

    Args:
        query: `(B, M, S, E)`.
        key: `(B, M, S', E)`.
        value: `(B, M, S', E)`.
        kernel: "sdpa" is torch's fused kernel; "math" is two matrix products and a softmax, which forward-mode and
            double differentiation need; "auto" is the faster of the two that works.
        backend: one of diffusers' attention backends instead; None: that of its context manager `attention_backend`, or
            of the environment, where it names another than torch's own.

    Returns:
        `(B, M, S, E)`.
    """
    if backend is not None or _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE:
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))  # (B, S, M, E)
        return dispatch_attention_fn(query, key, value, backend=backend).transpose(1, 2)
    if kernel == "math" or (kernel == "auto" and _math_is_better(query)):
        return joint_attention_probabilities(query, key) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _math_is_better(query: Tensor) -> bool:
    """The fused kernel has no forward mode; on a CPU its backward is slow in half precision."""
    if cpu_kernels.forward_mode():
        return True
    half_precision = query.dtype in (torch.float16, torch.bfloat16)
    trains = torch.is_grad_enabled() and query.requires_grad
    return query.device.type == "cpu" and half_precision and trains


def group_multiple(pattern: Iterable[tuple[int, int]]) -> int:
    """What the number of tokens must be a multiple of for every `(ratio, chunk)` of an attention pattern."""
    return math.lcm(*(ratio * chunk for ratio, chunk in pattern))


def _check_divisible(tokens: int, ratio: int, chunk: int) -> None:
    if tokens % (ratio * chunk):
        raise InvalidValue(
            f"{tokens} tokens cannot be split into {ratio} groups of chunks of {chunk}: "
            f"the number of tokens must be a multiple of {ratio * chunk}"
        )


def join_heads(image: Tensor, text: Tensor, weights: tuple[Tensor, Tensor] | None, ratio: int, chunk: int):
    """Two projected streams to the queries, keys and values of their common (sub)sequences.

    Args:
        image: Queries, keys and values of the image `(B, N, 3, M, E)`.
        text: The same of the text `(B, L, 3, M, E)`.
        weights: RMS norm weights (query, key) of image and of text, `(2, E)` each; None does not normalise.
        ratio: ASA groups `s`.
        chunk: ASA chunk `n`.

    Returns:
        Queries, keys and values `(B * s, M, S, E)`, `S = (N + L) / s`, image tokens first.
    """
    for stream in (image, text):
        _check_divisible(stream.shape[1], ratio, chunk)
    if weights is not None and cpu_kernels.usable(image):
        joined = cpu_kernels.JoinHeads.apply(image, text, *weights, ratio, chunk, EPS)
    else:
        joined = _join_heads_plain(image, text, weights, ratio, chunk)
    return tuple(part.transpose(1, 2) for part in joined)  # (B*s, M, S, E)


def _join_heads_plain(image, text, weights, ratio, chunk):
    joined = []
    for stream, weight in zip((image, text), weights or (None, None), strict=True):
        heads = stream.shape[2:]
        groups = subregion_split(stream.flatten(2), ratio, chunk).unflatten(2, heads)  # (B*s, N/s, 3, M, E)
        query, key, value = groups.unbind(2)
        if weight is not None:
            query, key = (cpu_kernels.rms_norm(x, w, EPS) for x, w in zip((query, key), weight, strict=True))
        joined.append((query, key, value))
    return [torch.cat(parts, dim=1) for parts in zip(*joined, strict=True)]  # (B*s, S, M, E)


class JointAttention(nn.Module):
    """Attention of image and text tokens over their common sequence.

    Args:
        num_heads: `M`.
        head_dim: `E`; the width is `D = M * E`.
        pattern: ASA pattern `(ratio, chunk)`; `(1, 1)` is full attention.
        context_pre_only: The text stream ends here: it has no output.
        qk_norm: Queries and keys are normalised.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: tuple[int, int] = (1, 1),
        context_pre_only: bool = False,
        qk_norm: bool = True,
    ):
        super().__init__()
        dim = num_heads * head_dim
        self.heads, self.pattern, self.context_pre_only = (num_heads, head_dim), pattern, context_pre_only
        self.kernel, self.backend = "auto", None  # see `scaled_attention`
        self.qkv = Linear(dim, 3 * dim)
        self.qkv_context = Linear(dim, 3 * dim)
        self.qk_norm = qk_norm
        if qk_norm:
            self.norm_q, self.norm_k = RMSNorm(head_dim, eps=EPS), RMSNorm(head_dim, eps=EPS)
            self.norm_q_context, self.norm_k_context = RMSNorm(head_dim, eps=EPS), RMSNorm(head_dim, eps=EPS)
        self.out = Linear(dim, dim)
        self.out_context = None if context_pre_only else Linear(dim, dim)

    def joint_heads(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised, and values `(B * s, M, (N + L) / s, E)` of tokens `(B, N, D)` and `(B, L, D)`.

        `joint_attention_probabilities(query, key)` of them are the attention maps.
        """
        qkv = self.qkv(image).unflatten(-1, (3, *self.heads))  # (B, N, 3, M, E)
        qkv_context = self.qkv_context(text).unflatten(-1, (3, *self.heads))  # (B, L, 3, M, E)
        weights = None
        if self.qk_norm:
            weights = (
                torch.stack([self.norm_q(), self.norm_k()]),
                torch.stack([self.norm_q_context(), self.norm_k_context()]),
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
        mixed = scaled_attention(query, key, value, self.kernel, self.backend).transpose(1, 2).flatten(2)  # (B*s, S, D)
        border = image.shape[1] // self.pattern[0]
        mixed_image, mixed_text = mixed.tensor_split([border], dim=1)
        image = self.out(subregion_merge(mixed_image, *self.pattern).contiguous())
        if self.out_context is None:
            return image, None
        return image, self.out_context(subregion_merge(mixed_text, *self.pattern).contiguous())
