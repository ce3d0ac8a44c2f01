"""A discriminator that needs no pictures: small heads on the features of a frozen transformer.

A student is asked for a picture; somebody has to say whether it looks like one of the teacher's. A discriminator in
pixels would have to decode every latent, and would learn from nothing what a picture is. The teacher knows already: its
blocks are features of a noisy latent *and* of the caption. So the latents are mixed with noise again, go through the
frozen teacher, and at some depths a small head looks at every token:

    x = (1 - t) x0 + t eps,    logit of a token l = head_k(block_k(x, text, t)),
    loss = softplus(-l) of what is real, softplus(l) of what is not.

The noise level decides what is judged: much noise leaves the composition, little leaves the details. Since the features
have read the caption, a picture of the teacher with another's caption can be told apart too, and counts as fake: a
discriminator that only knows good pictures from bad would let the student forget the text.

**The head** (of projected GANs): 1x1 convolution, norm, LeakyReLU, then a residual with a convolution over nine
neighbouring tokens, closed to a ring, and one logit a token. All convolutions are spectrally normalised.

Two traps. *Local batch norm* takes mean and spread over groups of eight samples, never a running average; written as a
reshape it fails for other batch sizes. Here a batch is cut into nearly equal groups of at most eight. The *ring*: after
compression the 80 tokens are two pictures, 64 tokens at half and 16 at quarter resolution. A convolution over the
joined sequence would mix the end of one with the start of the other, so a head runs on each path apart.

Source: LADD (arXiv 2403.12015) and Nitro-1 for features, misaligned pairs and logistic loss; StyleGAN-T for the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.tokens import compressed_sizes

VIRTUAL_BATCH = 8  # samples whose mean and spread are taken together
NEIGHBOURS = 9  # tokens that the convolution of a head looks at


def chosen_blocks(count: int, depths: Sequence[float]) -> list[int]:
    """Numbers of the blocks at some depths, each once, in order.

    Args:
        count: blocks of the transformer.
        depths: in [0, 1]; 1 is the last block.
    """
    return sorted({min(int(depth * count), count - 1) for depth in depths})


class FrozenFeatures:
    """What the blocks of a frozen transformer say of noisy latents.

    Args:
        transformer: it is frozen here, and used as it stands; gradients go through it to its input.
        depths: where to listen.

    Attributes:
        blocks: their numbers.
        paths: of each of them, how its image tokens divide into pictures of one resolution.
    """

    def __init__(self, transformer: EMMDiTTransformer2DModel, depths: Sequence[float]):
        self.transformer = transformer.requires_grad_(False).eval()
        size, every = transformer.config, [block for group in transformer.groups for block in group]
        side = size.sample_size // size.patch_size
        ends = [sum(size.block_groups[: k + 1]) for k in range(len(size.block_groups))]
        self.blocks = chosen_blocks(len(every), depths)
        self._listened = [every[number] for number in self.blocks]
        whole, divided = [side * side], compressed_sizes(side, side)
        middle = range(ends[0], ends[1]) if size.compression else range(0)
        self.paths = [divided if number in middle else whole for number in self.blocks]

    def __call__(self, latents: Tensor, text: Tensor, timestep: Tensor) -> list[Tensor]:
        """Image tokens (B, N, D) after each of the blocks.

        Args:
            latents: noisy (B, C, H, W).
            text: features (B, L, Dc).
            timestep: (B,), in [0, 1000].
        """
        heard: list[Tensor] = []
        with ExitStack() as stack:
            for block in self._listened:
                handle = block.register_forward_hook(lambda module, given, result: heard.append(result[0]))
                stack.callback(handle.remove)
            self.transformer(latents, text, timestep)
        return heard


class LocalBatchNorm(nn.Module):
    """Normalises channels over groups of samples and all their tokens; the same in training and evaluation.

    Args:
        channels: `C`.
        virtual_batch: most samples in a group.
    """

    def __init__(self, channels: int, virtual_batch: int = VIRTUAL_BATCH, eps: float = 1e-5):
        super().__init__()
        self.virtual_batch, self.eps = virtual_batch, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, C, N)` to `(B, C, N)`."""
        groups = tokens.tensor_split(math.ceil(len(tokens) / self.virtual_batch))
        normed = []
        for group in groups:
            spread, mean = torch.var_mean(group.float(), dim=(0, 2), keepdim=True, correction=0)  # (1, C, 1)
            normed.append(((group - mean) * torch.rsqrt(spread + self.eps)).to(tokens.dtype))
        return torch.cat(normed) * self.weight[:, None] + self.bias[:, None]


class Head(nn.Module):
    """Tokens of one picture to a logit each.

    Args:
        dim: width `D` of the tokens.
        width: of the head.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.enter = spectral_norm(nn.Conv1d(dim, width, 1))
        self.norm = LocalBatchNorm(width)
        ring = nn.Conv1d(width, width, NEIGHBOURS, padding=NEIGHBOURS // 2, padding_mode="circular")
        self.ring, self.ring_norm = spectral_norm(ring), LocalBatchNorm(width)
        self.leave = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N)`; N at least 4, so that the ring closes."""
        x = F.leaky_relu(self.norm(self.enter(tokens.transpose(1, 2))), 0.2)  # (B, W, N)
        x = (x + F.leaky_relu(self.ring_norm(self.ring(x)), 0.2)) / math.sqrt(2)
        return self.leave(x).squeeze(1)  # (B, N)


class Heads(nn.Module):
    """The heads of all depths: all of the discriminator that learns.

    Args:
        features: what they look at.
        width: of each head.
    """

    def __init__(self, features: FrozenFeatures, width: int):
        super().__init__()
        size = features.transformer.config
        self.paths = features.paths
        dim = size.num_attention_heads * size.attention_head_dim
        self.heads = nn.ModuleList(Head(dim, width) for _ in features.blocks)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (B, N, D) of each depth to logits (B, N) of each depth."""
        return [
            torch.cat([head(part) for part in tokens.split(sizes, dim=1)], dim=1)  # (B, N)
            for head, tokens, sizes in zip(self.heads, features, self.paths, strict=True)
        ]

    def once(self):
        """A context in which the spectral norms are computed once, however often the heads are called."""
        return parametrize.cached()

    def kept(self) -> dict[str, Tensor]:
        """What the norms remember beside weights: the vectors of the power iteration. A resume needs them."""
        return {f"heads.{name}": value for name, value in self.named_buffers()}

    def restore(self, kept: dict[str, Tensor]) -> None:
        """The inverse of `kept`."""
        for name, value in self.named_buffers():
            value.copy_(kept[f"heads.{name}"])


def logistic_loss(logits: Sequence[Tensor], real: bool) -> Tensor:
    """`softplus(-l)` of what should count as real, `softplus(l)` of what should not.

    Args:
        logits: (B, N) of each depth; every depth counts the same.
        real: which of the two.

    Returns:
        float32 (B,).
    """
    sign = -1 if real else 1
    return torch.stack([F.softplus(sign * each.float()).mean(1) for each in logits]).mean(0)


def hinge_loss(logits: Sequence[Tensor], real: bool) -> Tensor:
    """`relu(1 - l)` of what should count as real, `relu(1 + l)` of what should not; as `logistic_loss`."""
    sign = -1 if real else 1
    return torch.stack([F.relu(1 + sign * each.float()).mean(1) for each in logits]).mean(0)


def raised(logits: Sequence[Tensor]) -> Tensor:
    """`-l`, (B,): what a student lowers to look real to heads with a hinge."""
    return -torch.stack([each.float().mean(1) for each in logits]).mean(0)


def verdict(logits: Sequence[Tensor]) -> Tensor:
    """One number a picture, (B,): above 0 it is taken for real."""
    return torch.stack([each.float().mean(1) for each in logits]).mean(0)
