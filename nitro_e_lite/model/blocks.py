"""The joint transformer block and how the noise level steers it.

Each block normalises its tokens and then shifts, scales and gates them by six vectors `m` that depend on the noise
level: shift, scale, gate around attention and shift, scale, gate around the MLP. Three ways to get them:

- `adaln`: a Linear from the time embedding for each block and stream; a third of all parameters in a DiT.
- `adaln_single`: one global `t6 = Linear(SiLU(embedding))`, and `m = bias + t6` with a `bias` per block.
- `adaln_affine`: `m = bias + t6 * (1 + scale)`; a second vector per block lets it also rescale the global signal.
  This is Nitro-E's; it costs `12 D` parameters per block and stream where `adaln` costs `6 D^2`.

Source: DiT (adaLN); PixArt-alpha (adaLN-single); Nitro-E (AdaLN-affine).
"""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.attention import JointAttention
from nitro_e_lite.model.cpu_kernels import LayerNorm, Linear

GUIDANCE_SCALE = 0.1  # what a strength of guidance is multiplied by before its sinusoid


class TimeEmbedding(nn.Module):
    """Noise level to the global signal that steers every block.

    Args:
        dim: Width `D`.
        modulation: One of `config.MODULATIONS`.
        dense: The sinusoid is of the noise level in [0, 1] and not in [0, 1000]: its derivative is a thousand times
            smaller. Source: SANA-Sprint.
        guided: The signal also says how strong a guidance the answer stands for. Source: SANA-Sprint.
    """

    def __init__(self, dim: int, modulation: str, dense: bool = False, guided: bool = False):
        super().__init__()
        self.dense = dense
        self.sinusoid = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embed = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.project = None if modulation == "adaln" else nn.Linear(dim, 6 * dim)
        self.guide = TimestepEmbedding(in_channels=256, time_embed_dim=dim) if guided else None
        if guided:  # it says nothing at first; with both layers at zero it would never learn
            nn.init.normal_(self.guide.linear_1.weight, std=0.02)
            nn.init.zeros_(self.guide.linear_2.weight)
            nn.init.zeros_(self.guide.linear_2.bias)

    def forward(self, timestep: Tensor, dtype: torch.dtype | None = None, guidance: Tensor | None = None) -> Tensor:
        """Timesteps to the signal, computed in one number type.

        Args:
            timestep: `(B,)` in [0, 1000], dense or not.
            dtype: Of the computation; that of the weights when not given. They differ where weights are stored in FP8
                and cast just before use (diffusers' `enable_layerwise_casting`).
            guidance: Strength `(B,)`, where the signal is guided.

        Returns:
            `(B, 6, D)`, or `(B, D)` for the kind "adaln".
        """
        dtype = dtype or self.embed.linear_1.weight.dtype
        signal = self.embed(self.sinusoid(timestep / 1000 if self.dense else timestep).to(dtype))  # (B, D)
        if self.guide is not None:
            signal = signal + self.guide(self.sinusoid(GUIDANCE_SCALE * guidance).to(dtype))
        signal = F.silu(signal)
        return signal if self.project is None else self.project(signal).unflatten(1, (6, -1))


class Modulation(nn.Module):
    """The six vectors of one stream of one block: shift, scale, gate (attention), shift, scale, gate (MLP).

    Args:
        dim: Width `D`.
        kind: One of `config.MODULATIONS`.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "adaln":
            self.linear = nn.Linear(dim, 6 * dim)
        else:
            self.bias = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        if kind == "adaln_affine":
            self.scale = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, time: Tensor) -> Tensor:
        """Global signal `(B, 6, D)` (or `(B, D)` for "adaln") to this stream's `(B, 6, D)`."""
        if self.kind == "adaln":
            return self.linear(time).unflatten(1, (6, -1))
        if self.kind == "adaln_single":
            return self.bias + time
        return self.bias + time * (1 + self.scale)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear with `hidden` features between.

    Args:
        dim: Width `D`.
        hidden: Inner width.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        return self.down(cpu_kernels.gelu(self.up(tokens)))


class Stream(nn.Module):
    """What one kind of token (image or text) owns in a block: norms, modulation, MLP.

    Args:
        dim: Width `D`.
        hidden: Inner width of the MLP.
        modulation: One of `config.MODULATIONS`.
    """

    def __init__(self, dim: int, hidden: int, modulation: str):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(dim, modulation)
        self.mlp = FeedForward(dim, hidden)

    def before_attention(self, tokens: Tensor, six: Tensor) -> Tensor:
        """Normalised and modulated tokens `(B, N, D)`."""
        shift, scale = six[:, 0], 1 + six[:, 1]  # (B, D)
        weight, bias = self.norm1()  # the norm's own scale and shift join the modulation
        shift = torch.addcmul(shift, bias, scale)
        return cpu_kernels.modulated_norm(tokens, weight * scale, shift, self.norm1.eps)

    def after_attention(self, tokens: Tensor, mixed: Tensor, six: Tensor) -> Tensor:
        """Gated residuals of attention and MLP: `(B, N, D)`."""
        tokens = cpu_kernels.gated_residual(tokens, six[:, 2], mixed)
        inner = cpu_kernels.modulated_norm(tokens, 1 + six[:, 4], six[:, 3], self.norm2.eps)
        return cpu_kernels.gated_residual(tokens, six[:, 5], self.mlp(inner))


class JointBlock(nn.Module):
    """One E-MMDiT block: joint attention and an MLP per stream.

    Args:
        num_heads: `M`.
        head_dim: `E`; `D = M * E`.
        mlp_ratio: Inner width of the MLP over `D`.
        pattern: ASA pattern `(ratio, chunk)`.
        modulation: One of `config.MODULATIONS`.
        context_pre_only: The last block: the text stream is read (norm only, no modulation) but not continued.
        qk_norm: Queries and keys are normalised.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        mlp_ratio: float = 3.0,
        pattern: tuple[int, int] = (1, 1),
        modulation: str = "adaln_affine",
        context_pre_only: bool = False,
        qk_norm: bool = True,
    ):
        super().__init__()
        dim = num_heads * head_dim
        self.context_pre_only = context_pre_only
        self.attention = JointAttention(num_heads, head_dim, pattern, context_pre_only, qk_norm)
        self.image = Stream(dim, int(dim * mlp_ratio), modulation)
        self.text = LayerNorm(dim) if context_pre_only else Stream(dim, int(dim * mlp_ratio), modulation)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """One step of both streams.

        Args:
            image: `(B, N, D)`.
            text: `(B, L, D)`.
            time: Global time signal of `TimeEmbedding`.

        Returns:
            Image `(B, N, D)` and text `(B, L, D)` tokens; the text is untouched when `context_pre_only`.
        """
        six = self.image.modulation(time)
        image_in = self.image.before_attention(image, six)
        if self.context_pre_only:
            mixed, _ = self.attention(image_in, self.text(text))
            return self.image.after_attention(image, mixed, six), text
        six_text = self.text.modulation(time)
        mixed, mixed_text = self.attention(image_in, self.text.before_attention(text, six_text))
        image = self.image.after_attention(image, mixed, six)
        return image, self.text.after_attention(text, mixed_text, six_text)
