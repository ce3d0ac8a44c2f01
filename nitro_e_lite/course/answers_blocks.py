"""What the exercises of notebooks 06 to 10 and 17 are checked against: see `answers`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nitro_e_lite.course.lessons import Hidden

# 06

row_bands = Hidden(lambda side: (4, side * side // 4), ((16,), (8,), (32,)))
plateau = Hidden(lambda known, values: known + (1 - known) / values, ((1 / 4, 8), (1 / 4, 2), (1 / 16, 20)))
halving_length = Hidden(lambda width: 4 * width, ((768,), (192,), (64,)))


# 07

affine_parameters = Hidden(lambda dim, blocks: 12 * dim * (2 * blocks - 1), ((768, 24), (192, 10), (64, 1)))


# 08


def _block_parameters(width: int, head_dim: int) -> int:
    attention = 4 * width * width + 4 * width
    mlp = 6 * width * width + 4 * width
    return 2 * (attention + mlp + 2 * width + 2 * head_dim + 12 * width)


tokens_at = Hidden(lambda grid: [grid * grid, grid * grid // 4 + grid * grid // 16], ((32,), (16,), (64,)))
block_parameters = Hidden(_block_parameters, ((768, 32), (192, 48), (64, 16)))


# 09


def _projector_cost(width: int, hidden: int, channels: int) -> list[int]:
    matrices = width * hidden + hidden * hidden + hidden * channels
    return [matrices + 2 * hidden + channels, 512 * matrices]


def _cosine_gradient(p: Tensor, f: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    return torch.autograd.grad(F.cosine_similarity(p, f, dim=-1).sum(), p)[0]


def _shuffled_loss(projected: Tensor, features: Tensor) -> Tensor:
    """The mean over all cyclic shifts of the places, (B,)."""
    count = features.shape[1]
    cosines = [F.cosine_similarity(projected, features.roll(k, 1), dim=-1).mean(1) for k in range(count)]
    return -sum(cosines) / count


def _draw(*shapes: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Pairs of tensors that lean to one side, as features do."""
    generator = torch.Generator().manual_seed(0)
    return tuple(tuple(torch.randn(2, *shape, generator=generator).double() + 0.3) for shape in shapes)


cosine_gradient = Hidden(_cosine_gradient, _draw((5, 16), (2, 3, 8), (4,)))
shuffled_loss = Hidden(_shuffled_loss, _draw((3, 64, 8), (2, 16, 4), (1, 5, 6)))
projector_cost = Hidden(_projector_cost, ((768, 2048, 768), (192, 256, 128), (64, 32, 16)))


# 10


def _forgotten(decay: float) -> list[int]:
    """Updates until the start weighs less than 1 %, without and with the warm-up."""
    left, count = 1.0, 0
    while left >= 0.01:
        left *= min(decay, (1 + count) / (10 + count))
        count += 1
    return [math.ceil(math.log(0.01) / math.log(decay)), count]


half_life_samples = Hidden(
    lambda decay, batch: batch * math.log(0.5) / math.log(decay), ((0.9999, 2048), (0.998, 32), (0.9, 1))
)
variance_left = Hidden(lambda decay: (1 - decay) / (1 + decay), ((0.5,), (0.9,), (0.999,)))
forgotten = Hidden(_forgotten, ((0.9999,), (0.99,), (0.2,)))


# 17

hours = Hidden(
    lambda work, devices, peak, share: work / (devices * peak * share) / 3600,
    ((1e20, 8, 989.4e12, 0.3), (3e19, 1, 165e12, 0.5), (2e20, 64, 1307.4e12, 0.2)),
)
best_interval = Hidden(lambda save, between: (2 * save * between) ** 0.5, ((10.0, 86_400.0), (15.0, 6000.0)))
