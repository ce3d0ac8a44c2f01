"""Tokens against the library modules they replace: convolutions, PixelUnshuffle, PixelShuffle, PatchEmbed."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from nitro_e_lite.model import tokens


def to_grid(x, height, width):
    return x.transpose(1, 2).unflatten(2, (height, width))  # (B, N, D) -> (B, D, H, W)


def to_tokens(grid):
    return grid.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 6)])
def test_positions_and_patches_equal_patch_embed(height, width):
    embed = PatchEmbed(8, 8, 1, in_channels=4, embed_dim=32, interpolation_scale=2, pos_embed_max_size=12)
    latents = torch.randn(2, 4, height, width)
    table = tokens.position_table(32, 12, base_size=8, interpolation_scale=2)
    mine = F.linear(tokens.patchify(latents), embed.proj.weight.flatten(1), embed.proj.bias)
    mine = mine + tokens.crop_positions(table, height, width)
    torch.testing.assert_close(mine, embed(latents))


def test_patchify_is_a_strided_convolution():
    latents, weight = torch.randn(2, 3, 8, 4), torch.randn(5, 3, 2, 2)
    expected = to_tokens(F.conv2d(latents, weight, stride=2))
    torch.testing.assert_close(tokens.patchify(latents, 2) @ weight.flatten(1).t(), expected)


def test_unpatchify_inverts_patchify():
    latents = torch.randn(2, 3, 8, 4)
    assert torch.equal(tokens.unpatchify(tokens.patchify(latents), 8, 4), latents)
    patches = tokens.patchify(latents, 2).unflatten(2, (3, 4)).transpose(2, 3).flatten(2)  # channel last
    assert torch.equal(tokens.unpatchify(patches, 4, 2, patch_size=2), latents)


def test_grid_larger_than_table_is_refused():
    with pytest.raises(ValueError, match="pos_embed_max_size is 12"):
        tokens.crop_positions(tokens.position_table(32, 12, 8), 8, 13)


@pytest.mark.parametrize("ratio", [2, 4])
def test_squares_are_pixel_shuffles(ratio):
    x = torch.randn(2, 8 * 16, 32)
    unshuffled = to_tokens(F.pixel_unshuffle(to_grid(x, 8, 16), ratio))  # features (D, r, r)
    expected = unshuffled.unflatten(2, (32, -1)).transpose(2, 3).flatten(2)  # (r, r, D)
    assert torch.equal(tokens.gather_squares(x, 8, 16, ratio), expected)
    coarse = torch.randn(2, 2 * 4, 32)
    expected = to_tokens(F.pixel_shuffle(to_grid(coarse, 2, 4), ratio))
    assert torch.equal(tokens.scatter_squares(coarse, 2 * ratio, 4 * ratio, ratio), expected)


def convolutions(shuffle, path, weight):
    """The published form of a path: shuffle, 1x1 convolution, GELU, 1x1 convolution."""
    width = path[2].out_features
    body = nn.Sequential(shuffle, nn.Conv2d(weight.shape[1], width, 1), nn.GELU("tanh"), nn.Conv2d(width, width, 1))
    body[1].weight.data, body[1].bias.data = weight[:, :, None, None], path[0].bias.data
    body[3].weight.data, body[3].bias.data = path[2].weight.data[:, :, None, None], path[2].bias.data
    return body


def test_compressor_equals_convolutions():
    compressor, x = tokens.TokenCompressor(32), torch.randn(2, 256, 32)
    expected = []
    for path, ratio in zip(compressor.paths, (2, 4), strict=True):
        weight = path[0].weight.data.unflatten(1, (-1, 32)).transpose(1, 2).flatten(1)  # (r, r, D) -> (D, r, r)
        expected.append(to_tokens(convolutions(nn.PixelUnshuffle(ratio), path, weight)(to_grid(x, 16, 16))))
    mine = compressor(x, 16, 16)
    assert mine.shape == (2, 64 + 16, 32)
    torch.testing.assert_close(mine, torch.cat(expected, 1))


def test_reconstructor_equals_convolutions():
    reconstructor, x, saved = tokens.TokenReconstructor(32), torch.randn(2, 80, 32), torch.randn(2, 256, 32)
    expected = []
    for path, part, side in zip(reconstructor.paths, x.split([64, 16], 1), (8, 4), strict=True):
        body = convolutions(nn.PixelShuffle(16 // side), path, path[0].weight.data)
        expected.append(to_tokens(body(to_grid(part, side, side))))
    expected = reconstructor.merge(torch.cat([*expected, saved], 2))
    torch.testing.assert_close(reconstructor(x, saved, 16, 16), expected)
