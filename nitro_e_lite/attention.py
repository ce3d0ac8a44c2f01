"""Joint attention over image and text tokens, whole or in subregions.

Image and text have their own query, key and value projections and look at one common sequence `[image, text]`. Queries
and keys are RMS-normalised per head, which keeps the logits bounded in half precision.

*Alternating subregion attention* (ASA) cuts that sequence into `s` groups that attend only within themselves, which
divides the cost of attention by `s`. A token at position `(l, s, n)` of the regrouping `(l s n)` goes to group `s`:
chunk size `n = 1` gives strided groups (every s-th token), `n = 4` gives blocks of 4. The groups change from block to
block: full, strided, blocks, full, ... so that information still reaches every token.

Source: Stable Diffusion 3 (MM-DiT); Nitro-E (E-MMDiT), alternating subregion attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "sdpa", "math")


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
    if tokens.shape[1] % (ratio * chunk):
        raise ValueError(
            f"{tokens.shape[1]} tokens cannot be split into {ratio} groups of chunks of {chunk}: "
            f"the number of tokens must be a multiple of {ratio * chunk}"
        )
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
    """Softmax attention probabilities `(..., S, S)` of normalised queries and keys `(..., S, E)`."""
    return torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention over `(B, M, S, E)`.

    Args:
        query: `(B, M, S, E)`.
        key: `(B, M, S', E)`.
        value: `(B, M, S', E)`.
        backend: "sdpa" is torch's fused kernel; "math" is two matrix products and a softmax, which forward-mode
            differentiation needs; "auto" takes the faster of the two: "math" for half precision training on a CPU,
            where the backward of the fused kernel is slow, "sdpa" everywhere else.

    Returns:
        `(B, M, S, E)`.
    """
    if backend == "auto":
        trains = torch.is_grad_enabled() and query.requires_grad
        slow = query.device.type == "cpu" and query.dtype != torch.float32 and trains
        backend = "math" if slow else "sdpa"
    if backend == "math":
        return joint_attention_probabilities(query, key) @ value
    return F.scaled_dot_product_attention(query, key, value)


class JointAttention(nn.Module):
    """Attention of image and text tokens over their common sequence.

    Args:
        num_heads: `M`.
        head_dim: `E`; the width is `D = M * E`.
        pattern: ASA pattern `(ratio, chunk)`; `(1, 1)` is full attention.
        context_pre_only: The text stream ends here: no text queries, no text output.
    """

    def __init__(self, num_heads: int, head_dim: int, pattern=(1, 1), context_pre_only: bool = False):
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads, self.head_dim, self.context_pre_only = num_heads, head_dim, context_pre_only
        self.ratio, self.chunk = pattern
        self.backend = "auto"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_context = nn.Linear(dim, 3 * dim)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_q_context, self.norm_k_context = (
            nn.RMSNorm(head_dim, eps=1e-6),
            nn.RMSNorm(head_dim, eps=1e-6),
        )
        self.out = nn.Linear(dim, dim)
        self.out_context = None if context_pre_only else nn.Linear(dim, dim)

    def project(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised joint queries, keys and values `(B, M, N + L, E)` of tokens `(B, N, D)` and `(B, L, D)`."""
        heads = (3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(image).unflatten(-1, heads).unbind(2)  # (B, N, M, E) each
        q_text, k_text, v_text = self.qkv_context(text).unflatten(-1, heads).unbind(2)
        query = torch.cat([self.norm_q(q), self.norm_q_context(q_text)], dim=1)
        key = torch.cat([self.norm_k(k), self.norm_k_context(k_text)], dim=1)
        value = torch.cat([v, v_text], dim=1)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, M, N+L, E)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            image: `(B, N, D)`, normalised and modulated.
            text: `(B, L, D)`, normalised and modulated.

        Returns:
            `(B, N, D)` and `(B, L, D)`, or None for the text when `context_pre_only`.
        """
        image = subregion_split(image, self.ratio, self.chunk)  # (B*s, N/s, D)
        text = subregion_split(text, self.ratio, self.chunk)  # (B*s, L/s, D)
        query, key, value = self.project(image, text)
        mixed = scaled_attention(query, key, value, self.backend)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B*s, (N+L)/s, D)
        sizes = (image.shape[1], text.shape[1])
        mixed_image, mixed_text = mixed.split(sizes, dim=1)
        image = subregion_merge(self.out(mixed_image), self.ratio, self.chunk)
        if self.out_context is None:
            return image, None
        return image, subregion_merge(self.out_context(mixed_text), self.ratio, self.chunk)
