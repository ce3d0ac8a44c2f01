"""From latents to tokens and back, and from 256 tokens to 80 and back.

A latent image of `H x W` positions becomes one token per position (patch size 1). Attention costs the square of
the number of tokens and everything else its first power, so Nitro-E thins the tokens out after the first group of
blocks: `TokenCompressor` looks at the grid at half and at quarter resolution (`N/4 + N/16` tokens, 256 becomes
64 + 16 = 80) and `TokenReconstructor` brings both back to `N` tokens and merges them with the tokens saved before.

Compressing and reconstructing blurs where a token stands. *Position reinforcement* therefore adds the fixed 2-D
sine-cosine table a second time, right after the reconstruction.

A 1x1 convolution over a grid is a matrix product over tokens, and PixelUnshuffle is a regrouping of tokens: both
are written that way here, so tokens never take the detour through `(B, D, H, W)`.

Source: Nitro-E (E-MMDiT), sections on token compression and position reinforcement.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model.cpu_kernels import Linear

RATIOS = (2, 4)  # the two paths of the compressor: half and quarter resolution
LITE_TEXT_LENGTH, FULL_TEXT_LENGTH = 32, 128  # tokens a caption is padded to


def text_length(encoders: str) -> int:
    """Tokens a caption is padded to: those of the full model for "full", of the lite one for any other encoders."""
    return FULL_TEXT_LENGTH if encoders == "full" else LITE_TEXT_LENGTH


def compressed_sizes(height: int, width: int) -> list[int]:
    """Tokens that each path of the compressor makes of a grid: `[N/4, N/16]`."""
    return [height * width // (ratio * ratio) for ratio in RATIOS]


def position_table(dim: int, max_size: int, base_size: int, interpolation_scale: float = 1.0) -> Tensor:
    """2-D sine-cosine positions for a `max_size x max_size` grid.

    Args:
        dim: Width `D` of a token; a multiple of 4.
        max_size: Side of the table; images take their positions from its centre.
        base_size: Side of the training grid; positions are scaled so that `max_size` table cells span it.
        interpolation_scale: Further divisor of the positions (2 for the 1024 px model).

    Returns:
        Float32 table `(1, max_size * max_size, D)`.
    """
    table = get_2d_sincos_pos_embed(
        dim, max_size, base_size=base_size, interpolation_scale=interpolation_scale, output_type="pt"
    )
    return table.float().unsqueeze(0)


def crop_positions(table: Tensor, height: int, width: int) -> Tensor:
    """The central `height x width` window of a square position table.

    Args:
        table: `(1, S * S, D)` as `position_table` makes it.
        height: Rows of the token grid.
        width: Columns of the token grid.

    Returns:
        `(1, height * width, D)`.

    Raises:
        ValueError: The grid is larger than the table.
    """
    side = int(table.shape[1] ** 0.5)
    if height > side or width > side:
        raise InvalidValue(
            f"token grid {height}x{width} does not fit: pos_embed_max_size is {side}; use smaller latents "
            "or a model with a larger pos_embed_max_size"
        )
    top, left = (side - height) // 2, (side - width) // 2
    grid = table.view(1, side, side, -1)[:, top : top + height, left : left + width]  # (1, H, W, D)
    return grid.reshape(1, height * width, -1)


def patchify(latents: Tensor, patch_size: int = 1) -> Tensor:
    """Latents `(B, C, H, W)` to tokens `(B, N, C * p * p)`, features in (channel, row, column) order."""
    if patch_size == 1:
        return latents.flatten(2).transpose(1, 2)  # (B, N, C)
    return F.pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)  # (B, N, C*p*p)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int = 1) -> Tensor:
    """Output tokens `(B, N, p * p * C)`, features in (row, column, channel) order, to latents `(B, C, H, W)`.

    Args:
        tokens: `(B, N, p * p * C)`.
        height: Rows of the token grid (`H / p`).
        width: Columns of the token grid (`W / p`).
        patch_size: `p`.
    """
    grid = tokens.unflatten(1, (height, width))  # (B, h, w, p*p*C)
    if patch_size == 1:
        return grid.permute(0, 3, 1, 2)  # (B, C, H, W)
    grid = grid.unflatten(3, (patch_size, patch_size, -1))  # (B, h, w, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)


def gather_squares(tokens: Tensor, height: int, width: int, ratio: int) -> Tensor:
    """Put each `ratio x ratio` square of neighbouring tokens into one long token.

    Args:
        tokens: `(B, H * W, D)`.
        height: `H`, a multiple of `ratio`.
        width: `W`, a multiple of `ratio`.
        ratio: Side of the square `r`.

    Returns:
        `(B, H/r * W/r, r * r * D)`; features in (row, column, channel) order.
    """
    grid = tokens.unflatten(1, (height // ratio, ratio, width // ratio, ratio))  # (B, h, r, w, r, D)
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, h*w, r*r*D)


def scatter_squares(tokens: Tensor, height: int, width: int, ratio: int) -> Tensor:
    """Spread each token over a `ratio x ratio` square (PixelShuffle on tokens).

    Args:
        tokens: `(B, h * w, D)`; features in (channel, row, column) order, as PixelShuffle reads them.
        height: Rows of the result, `H = h * r`.
        width: Columns of the result, `W = w * r`.
        ratio: Side of the square `r`; `r * r` divides `D`.

    Returns:
        `(B, H * W, D / r / r)`.
    """
    grid = tokens.unflatten(1, (height // ratio, width // ratio)).unflatten(3, (-1, ratio, ratio))
    return grid.permute(0, 1, 4, 2, 5, 3).flatten(1, 4)  # (B, h, w, C, r, r) -> (B, H*W, C)


def two_layers(in_features: int, dim: int) -> nn.Sequential:
    """Linear, GELU (tanh), Linear: the little network of every path here."""
    return nn.Sequential(Linear(in_features, dim), nn.GELU("tanh"), Linear(dim, dim))


class TokenCompressor(nn.Module):
    """`N` tokens to `N/4 + N/16`: the same picture at half and at quarter resolution.

    Args:
        dim: Width `D`.

    Source: Nitro-E, multi-path token compression (published as 68.5 % fewer tokens; 176 of 256 are 68.75 %).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.paths = nn.ModuleList(two_layers(dim * ratio * ratio, dim) for ratio in RATIOS)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens `(B, H * W, D)` to `(B, H * W / 4 + H * W / 16, D)`."""
        coarse = [
            path(gather_squares(tokens, height, width, ratio)) for path, ratio in zip(self.paths, RATIOS, strict=True)
        ]
        return torch.cat(coarse, dim=1)  # (B, N/4 + N/16, D)


class TokenReconstructor(nn.Module):
    """`N/4 + N/16` tokens back to `N`, merged with the tokens saved before compression.

    Args:
        dim: Width `D`; a multiple of 16.

    Source: Nitro-E, token reconstruction.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.paths = nn.ModuleList(two_layers(dim // (ratio * ratio), dim) for ratio in RATIOS)
        self.merge = two_layers(3 * dim, dim)

    def forward(self, tokens: Tensor, saved: Tensor, height: int, width: int) -> Tensor:
        """Compressed tokens `(B, N/4 + N/16, D)` and saved tokens `(B, N, D)` to `(B, N, D)`."""
        sizes = compressed_sizes(height, width)
        fine = [
            path(scatter_squares(part, height, width, ratio))
            for path, part, ratio in zip(self.paths, tokens.split(sizes, dim=1), RATIOS, strict=True)
        ]
        return self.merge(torch.cat([*fine, saved], dim=2))  # (B, N, 3D) -> (B, N, D)
