"""E-MMDiT: the transformer of Nitro-E.

Latents become tokens, three groups of joint blocks work on them together with the text tokens, and a linear layer
reads the velocity off. The middle group, which holds most of the blocks, sees 80 tokens where the others see 256.

    latents -> tokens + positions -> group 1 -> compress
            -> group 2 -> reconstruct + positions
            -> group 3 -> velocity

Source: Nitro-E (E-MMDiT). Differs from the published code: `forward` returns one type in training and evaluation,
latents need not be square, and the query, key and value projections of a stream are one matrix.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from nitro_e_lite.config import MODULATIONS
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import fp8
from nitro_e_lite.model.adapters import AdapterMixin, with_lora_scale
from nitro_e_lite.model.attention import KERNELS, JointAttention
from nitro_e_lite.model.blocks import JointBlock, TimeEmbedding
from nitro_e_lite.model.cpu_kernels import LayerNorm, Linear
from nitro_e_lite.model.tokens import (
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
        features: The REPA tap, tokens after group 1 through the REPA projector `(B, N, repa_channels)`; None
            without one.
    """

    sample: Tensor
    features: Tensor | None = None


class EMMDiTTransformer2DModel(AdapterMixin, ModelMixin, ConfigMixin):
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
        attention_pattern: Cycle of ASA patterns `(ratio, chunk)`, one a block; `((1, 1),)` is full attention.
        modulation: "adaln_affine", "adaln_single" or "adaln".
        compression: Compress tokens for the middle group. Without it `block_groups` may have any length.
        position_reinforcement: Add the positions again after the reconstruction.
        pos_embed_max_size: Side of the stored position table; images take their positions from its centre.
        repa_channels: Width of the vision features to align with; builds the REPA projector.
        repa_hidden: Inner width of the REPA projector.
        dense_time: The time embedding is dense, see `blocks.TimeEmbedding`; timesteps lie in [0, 1000] either way.
        guidance_embedding: `forward` is told a strength of guidance, in place of being asked twice.
        qk_norm: Queries and keys are normalised; without it logits grow with the weights.

    Raises:
        ValueError: A value outside what the architecture can do.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointBlock"]
    _repeated_blocks = ["JointBlock"]
    _group_offload_block_modules = ["groups"]

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
        dense_time: bool = False,
        guidance_embedding: bool = False,
        qk_norm: bool = True,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        _check_config(dim, block_groups, attention_pattern, modulation, compression)
        self.gradient_checkpointing = False

        scale = max(sample_size // 16, 1)
        table = position_table(dim, pos_embed_max_size, sample_size // patch_size, scale)
        self.register_buffer("positions", table)
        self.patch_embed = Linear(in_channels * patch_size * patch_size, dim)
        self.text_embed = Linear(caption_channels, dim)
        self.time_embed = TimeEmbedding(dim, modulation, dense_time, guidance_embedding)

        shape = (num_attention_heads, attention_head_dim, mlp_ratio)
        block = partial(JointBlock, *shape, modulation=modulation, qk_norm=qk_norm)
        self.groups = _build_groups(block, block_groups, attention_pattern)
        self.compressor = TokenCompressor(dim) if compression else None
        self.reconstructor = TokenReconstructor(dim) if compression else None
        self.projector = None if repa_channels is None else _repa_projector(dim, repa_hidden, repa_channels)
        self.norm_out = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = Linear(dim, patch_size * patch_size * in_channels)

    def set_attention_kernel(self, kernel: str) -> None:
        """Choose how attention is computed where no backend is set: "auto", "sdpa" or "math", see `scaled_attention`.

        Raises:
            ValueError: Another name.
        """
        if kernel not in KERNELS:
            raise InvalidValue(f"kernel must be one of {KERNELS}, got {kernel!r}")
        for module in self._attentions():
            module.kernel = kernel

    def set_attention_backend(self, backend: str) -> None:
        """As in diffusers: "native", "flash", "_native_math", ..."""
        super().set_attention_backend(backend)
        for module in self._attentions():
            module.backend = AttentionBackendName(backend.lower())

    def reset_attention_backend(self) -> None:
        """As in diffusers: back to the kernel of `set_attention_kernel`."""
        super().reset_attention_backend()
        for module in self._attentions():
            module.backend = None

    def _attentions(self) -> list[JointAttention]:
        return [module for module in self.modules() if isinstance(module, JointAttention)]

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines read in its signature what it takes, such as `variant`
    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As in diffusers; a model in FP8 is written as codes and scales, see `fp8.save`.

        Raises:
            ValueError: adapters are in it, with which no folder can be loaded.
        """
        if any(".lora_" in name for name, _ in self.named_parameters()):
            hint = "save them by save_lora_adapter, or merge them: fuse_lora, then unload_lora_weights"
            raise InvalidValue(f"save_pretrained: LoRA adapters are loaded; {hint}")
        if fp8.is_quantized(self):
            if options.get("push_to_hub"):
                raise InvalidValue("push_to_hub: a model in FP8 is saved to a folder; upload that folder")
            fp8.save(self, save_directory)
        else:
            super().save_pretrained(save_directory, **options)

    @wraps(ModelMixin.to, assigned=())
    def to(self, *arguments: Any, **options: Any) -> "EMMDiTTransformer2DModel":
        """As in diffusers; a model in FP8 keeps the number type that its codes are for, and says so."""
        device, dtype, _, _ = torch._C._nn._parse_to(*arguments, **options)
        if dtype in (None, self.dtype) or not fp8.is_quantized(self):
            return super().to(*arguments, **options)
        warnings.warn(f"FP8: the transformer stays in {self.dtype}; load it again for {dtype}", stacklevel=2)
        return self if device is None else super().to(device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any):
        """As in diffusers; a folder that `save_pretrained` wrote in FP8 is read in FP8, weight-only, see `fp8.load`."""
        folder = Path(pretrained_model_name_or_path, options.get("subfolder") or "")
        if not fp8.holds_fp8(folder):
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        if options.get("quantization_config") is not None:
            raise InvalidValue(f"quantization_config: {folder} is in FP8 already")
        with torch.device("meta"):
            model = cls.from_config(cls.load_config(folder))
        fp8.load(model, folder, options.get("dtype") or options.get("torch_dtype"))
        return model.eval()

    @classmethod
    def like(cls, model: "EMMDiTTransformer2DModel", **changes: Any) -> "EMMDiTTransformer2DModel":
        """A fresh model of the shape of another, but for some arguments.

        `from_config` would drop those that the other's file was too old to name: diffusers takes them for defaults.
        """
        return cls(**{name: value for name, value in model.config.items() if not name.startswith("_")} | changes)

    def _check_inputs(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None:
        config = self.config
        if hidden_states.ndim != 4 or hidden_states.shape[1] != config.in_channels:
            shape = tuple(hidden_states.shape)
            raise InvalidValue(f"hidden_states must be (B, {config.in_channels}, H, W), got {shape}")
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[2] != config.caption_channels:
            shape = tuple(encoder_hidden_states.shape)
            raise InvalidValue(f"encoder_hidden_states must be (B, L, {config.caption_channels}), got {shape}")
        square = config.patch_size * (4 if config.compression else 1)
        if any(side % square for side in hidden_states.shape[2:]):
            raise InvalidValue(
                f"height and width of hidden_states must be multiples of {square}, got {tuple(hidden_states.shape)}"
            )

    def run_group(self, group: nn.ModuleList, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams through one group of blocks."""
        for block in group:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text = self._gradient_checkpointing_func(block, image, text, time)
            else:
                image, text = block(image, text, time)
        return image, text

    @with_lora_scale
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor | float,
        return_dict: bool = True,
        guidance: Tensor | float | None = None,
        *,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> EMMDiTOutput | tuple:
        """Predict the velocity.

        Args:
            hidden_states: Noisy latents `(B, C, H, W)`.
            encoder_hidden_states: Text features `(B, L, Dc)`; padding is attended to.
            timestep: Noise level in [0, 1000], `(B,)` or one for all.
            return_dict: False gives a plain tuple.
            guidance: Strength of guidance that the answer shall stand for, `(B,)` or one for all; for models with
                `guidance_embedding`, which need it, and no others.
            attention_kwargs: `{"scale": s}` multiplies what LoRA adapters add by `s`.

        Returns:
            `EMMDiTOutput` with `sample` `(B, C, H, W)` and `features` (see there).

        Raises:
            ValueError: A shape the model cannot take.
        """
        if attention_kwargs:  # the decorator took the scale out
            raise InvalidValue(f"attention_kwargs: {sorted(attention_kwargs)} unknown; only 'scale' is")
        self._check_inputs(hidden_states, encoder_hidden_states)
        batch, size = len(hidden_states), self.config.patch_size
        height, width = (side // size for side in hidden_states.shape[2:])
        positions = crop_positions(self.positions, height, width)  # (1, N, D)

        if (guidance is not None) != self.config.guidance_embedding:
            told = "needs" if self.config.guidance_embedding else "takes no"
            raise InvalidValue(f"guidance={guidance!r}: this model {told} strength of guidance")
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)  # (B,)
        if guidance is not None:
            guidance = torch.as_tensor(guidance, device=hidden_states.device).expand(batch)  # (B,)
        time = self.time_embed(timestep, hidden_states.dtype, guidance)  # (B, 6, D)
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


def _build_groups(block: Callable[..., JointBlock], block_groups, attention_pattern) -> nn.ModuleList:
    groups, index, last = nn.ModuleList(), 0, sum(block_groups) - 1
    for count in block_groups:
        numbers = range(index, index + count)
        patterns = [tuple(attention_pattern[i % len(attention_pattern)]) for i in numbers]
        groups.append(
            nn.ModuleList(
                block(pattern=pattern, context_pre_only=i == last) for i, pattern in zip(numbers, patterns, strict=True)
            )
        )
        index += count
    return groups


def _repa_projector(dim: int, hidden: int, channels: int) -> nn.Sequential:
    inner = Linear(dim, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU()
    return nn.Sequential(*inner, Linear(hidden, channels))


def _check_config(dim: int, block_groups, attention_pattern, modulation: str, compression: bool) -> None:
    if dim % 16:
        raise InvalidValue(f"num_attention_heads * attention_head_dim must be a multiple of 16, got {dim}")
    if modulation not in MODULATIONS:
        raise InvalidValue(f"modulation must be one of {MODULATIONS}, got {modulation!r}")
    if compression and len(block_groups) != 3:
        raise InvalidValue(f"block_groups must have 3 entries with compression, got {tuple(block_groups)}")
    if not block_groups or min(block_groups) < 1:
        raise InvalidValue(f"block_groups must be positive, got {tuple(block_groups)}")
    if not attention_pattern or any(len(p) != 2 or min(p) < 1 for p in attention_pattern):
        raise InvalidValue(f"attention_pattern must be pairs (ratio, chunk) of at least 1, got {attention_pattern}")
