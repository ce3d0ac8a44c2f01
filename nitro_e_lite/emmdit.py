"""E-MMDiT: the transformer of Nitro-E.

Latents become tokens, three groups of joint blocks work on them together with the text tokens, and a linear layer reads
the velocity off. The middle group, which holds most of the blocks, sees 80 tokens where the outer ones see 256.

    latents -> tokens + positions -> group 1 -> compress -> group 2 -> reconstruct + positions -> group 3 -> velocity

Source: Nitro-E (E-MMDiT). Differs from the published code: `forward` returns one type in training and evaluation, latents
need not be square, and queries, keys and values of a stream are one matrix.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from nitro_e_lite.attention import BACKENDS, JointAttention
from nitro_e_lite.blocks import MODULATIONS, JointBlock, TimeEmbedding
from nitro_e_lite.tokens import (
    TokenCompressor,
    TokenReconstructor,
    crop_positions,
    patchify,
    position_table,
    unpatchify,
)


@dataclass
class EMMDiTOutput(BaseOutput):
    """What the transformer returns.

    Attributes:
        sample: Velocity `(B, C, H, W)`.
        features: The REPA tap, tokens after group 1 through the REPA projector `(B, N, repa_channels)`; None without one.
    """

    sample: Tensor
    features: Tensor | None = None


class EMMDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Efficient multimodal diffusion transformer. The defaults are the published 512 px model.

    Args:
        sample_size: Side of the latent grid in training; sets the scale of positions.
        patch_size: Side of a patch `p`.
        in_channels: Latent channels `C`.
        num_attention_heads: `M`.
        attention_head_dim: `E`; the width is `D = M * E`, a multiple of 16.
        caption_channels: Width `Dc` of the text features.
        block_groups: Blocks before compression, between, and after reconstruction.
        mlp_ratio: Inner width of the MLPs over `D`.
        attention_pattern: Cycle of ASA patterns `(ratio, chunk)`, one a block; `((1, 1),)` is full attention throughout.
        modulation: "adaln_affine", "adaln_single" or "adaln".
        compression: Compress tokens for the middle group. Without it `block_groups` may have any number of groups.
        position_reinforcement: Add the positions again after the reconstruction.
        pos_embed_max_size: Side of the stored position table; images take their positions from its centre.
        repa_channels: Width of the vision features to align with; builds the REPA projector.
        repa_hidden: Inner width of the REPA projector.

    Raises:
        ValueError: A value outside what the architecture can do.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        num_attention_heads: int = 24,
        attention_head_dim: int = 32,
        caption_channels: int = 2048,
        block_groups: tuple[int, ...] = (4, 16, 4),
        mlp_ratio: float = 3.0,
        attention_pattern: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (4, 4)),
        modulation: str = "adaln_affine",
        compression: bool = True,
        position_reinforcement: bool = True,
        pos_embed_max_size: int = 96,
        repa_channels: int | None = None,
        repa_hidden: int = 2048,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        _check_config(dim, block_groups, attention_pattern, modulation, compression)
        self.gradient_checkpointing = False

        scale = max(sample_size // 16, 1)
        table = position_table(dim, pos_embed_max_size, sample_size // patch_size, scale)
        self.register_buffer("positions", table)
        self.patch_embed = nn.Linear(in_channels * patch_size * patch_size, dim)
        self.text_embed = nn.Linear(caption_channels, dim)
        self.time_embed = TimeEmbedding(dim, modulation)

        self.groups, index, last = nn.ModuleList(), 0, sum(block_groups) - 1
        for count in block_groups:
            group = nn.ModuleList()
            for index in range(index, index + count):
                pattern = tuple(attention_pattern[index % len(attention_pattern)])
                group.append(
                    JointBlock(
                        num_attention_heads, attention_head_dim, mlp_ratio, pattern, modulation, index == last
                    )
                )
            index += 1
            self.groups.append(group)

        self.compressor = TokenCompressor(dim) if compression else None
        self.reconstructor = TokenReconstructor(dim) if compression else None
        self.projector = None
        if repa_channels is not None:
            self.projector = nn.Sequential(
                nn.Linear(dim, repa_hidden),
                nn.SiLU(),
                nn.Linear(repa_hidden, repa_hidden),
                nn.SiLU(),
                nn.Linear(repa_hidden, repa_channels),
            )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * in_channels)

    def set_attention_backend(self, backend: str) -> None:
        """Choose how attention is computed: "auto" (default), "sdpa" or "math" (see `attention.scaled_attention`)."""
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        for module in self.modules():
            if isinstance(module, JointAttention):
                module.backend = backend

    def run_group(
        self, group: nn.ModuleList, image: Tensor, text: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both streams through one group of blocks."""
        for block in group:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text = self._gradient_checkpointing_func(block, image, text, time)
            else:
                image, text = block(image, text, time)
        return image, text

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor | float,
        return_dict: bool = True,
    ) -> EMMDiTOutput | tuple:
        """Predict the velocity.

        Args:
            hidden_states: Noisy latents `(B, C, H, W)`.
            encoder_hidden_states: Text features `(B, L, Dc)`; padding is attended to.
            timestep: Noise level in [0, 1000], `(B,)` or one for all.
            return_dict: False gives a plain tuple.

        Returns:
            `EMMDiTOutput` with `sample` `(B, C, H, W)` and `features` (see there).
        """
        batch, _, height, width = hidden_states.shape
        size = self.config.patch_size
        height, width = height // size, width // size
        positions = crop_positions(self.positions, height, width)  # (1, N, D)

        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)  # (B,)
        time = self.time_embed(timestep)  # (B, 6, D)
        text = self.text_embed(encoder_hidden_states)  # (B, L, D)
        image = self.patch_embed(patchify(hidden_states, size)) + positions  # (B, N, D)

        features = None
        for index, group in enumerate(self.groups):
            image, text = self.run_group(group, image, text, time)
            if index == 0 and self.projector is not None:
                features = self.projector(image)  # (B, N, repa_channels)
            if index == 0 and self.compressor is not None:
                saved, image = image, self.compressor(image, height, width)  # (B, N/4 + N/16, D)
            elif index == 1 and self.reconstructor is not None:
                image = self.reconstructor(image, saved, height, width)  # (B, N, D)
                if self.config.position_reinforcement:
                    image = image + positions

        velocity = unpatchify(self.proj_out(self.norm_out(image)), height, width, size)  # (B, C, H, W)
        return EMMDiTOutput(velocity, features) if return_dict else (velocity, features)


def _check_config(dim: int, block_groups, attention_pattern, modulation: str, compression: bool) -> None:
    if dim % 16:
        raise ValueError(f"num_attention_heads * attention_head_dim must be a multiple of 16, got {dim}")
    if modulation not in MODULATIONS:
        raise ValueError(f"modulation must be one of {MODULATIONS}, got {modulation!r}")
    if compression and len(block_groups) != 3:
        raise ValueError(
            f"block_groups must have 3 entries when compression is on, got {tuple(block_groups)}"
        )
    if not block_groups or min(block_groups) < 1:
        raise ValueError(
            f"block_groups must name at least one block in each group, got {tuple(block_groups)}"
        )
    if not attention_pattern or any(len(p) != 2 or min(p) < 1 for p in attention_pattern):
        raise ValueError(f"attention_pattern must be pairs (ratio >= 1, chunk >= 1), got {attention_pattern}")
