"""Optimisers and learning-rate schedules: Muon for the matrices inside the blocks, AdamW for the rest.

**Muon** updates along orthogonalised momentum. `Muon` below is torch's with another `step`: each process would repeat
the work of all, and a CPU without instructions for bf16 is slow in it. Differs: the paper trains with AdamW alone;
`OptimizerConfig(name="adamw")` does too. Source: Jordan et al., 2024.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nitro_e_lite.config import OptimizerConfig
from nitro_e_lite.model.cpu_kernels import multiply
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel

FUSED = ("cuda", "xpu")  # devices for which torch has one kernel for all of AdamW; ROCm is "cuda"


def orthogonalize(
    matrices: Tensor,
    coefficients=(3.4445, -4.7750, 2.0315),
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Moves the singular values of each matrix `(K, rows, columns)` to about 0.7 ... 1.2 by Newton-Schulz iterations.

    The products are computed in `dtype`; the result has that type too.

    Source: coefficients by Jordan et al., 2024.
    """
    a, b, c = coefficients
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(steps):
        gram = multiply(x, x.mT)
        x = multiply(torch.add(b * gram, multiply(gram, gram), alpha=c), x).add_(x, alpha=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon with the work divided among the processes, and its products in `dtype`.

    Each of N processes orthogonalises every N-th matrix, equal shapes together; the directions are then summed, so that
    all processes hold the same weights, bit for bit.
    """

    def __init__(self, parameters, dtype: torch.dtype = torch.float32, **settings):
        super().__init__(parameters, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        shared = dist.is_initialized() and dist.get_world_size() > 1
        rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
            sizes = [p.numel() for p in parameters]
            flat = torch.zeros(sum(sizes), device=parameters[0].device)
            directions = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters, strict=True)]
            for members in _equal_shapes(parameters, range(rank, len(parameters), world)):
                stack = torch.stack([nesterov[k] for k in members])
                found = orthogonalize(stack, group["ns_coefficients"], dtype=self.dtype)
                for k, direction in zip(members, found, strict=True):
                    directions[k].copy_(direction)
            if shared:
                dist.all_reduce(flat)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for p, direction in zip(parameters, directions, strict=True):
                p.sub_(direction, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def _equal_shapes(parameters: list[Tensor], chosen: Iterable[int]) -> Iterator[list[int]]:
    """The chosen positions in lists of equal shape, each list small enough (about 4 MB) for a cache."""
    by_shape = defaultdict(list)
    for k in chosen:
        by_shape[parameters[k].shape].append(k)
    for shape, members in by_shape.items():
        length = max(1, 2**20 // shape.numel())
        yield from (members[first : first + length] for first in range(0, len(members), length))


def build_optimizers(
    masters: dict[str, Tensor], matrices: set[str], config: OptimizerConfig, dtype: torch.dtype = torch.float32
):
    """The optimisers of a run.

    Args:
        masters: parameters by name.
        matrices: names of the weights of Linear layers inside blocks, compressor and reconstructor.
        config: which optimiser, learning rates, decay.
        dtype: of Muon's products.

    Returns:
        name -> optimiser; every parameter is in exactly one.
    """
    chosen = matrices & masters.keys() if config.name == "muon" else set()
    rest = [p for name, p in masters.items() if name not in chosen]
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    optimizers = {"adamw": adamw(rest, **settings, foreach=True)}
    if chosen:
        optimizers["muon"] = Muon(
            [p for name, p in masters.items() if name in chosen],
            dtype=dtype,
            lr=config.muon_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return optimizers


def adamw(parameters: Iterable[Tensor], **settings) -> torch.optim.AdamW:
    """AdamW: on an accelerator one fused kernel, which leaves a step out without asking the host, see `health.py`."""
    parameters = list(parameters)
    if parameters[0].device.type in FUSED:
        settings |= {"fused": True, "foreach": False}
    return torch.optim.AdamW(parameters, **settings)


def hidden_matrices(model: EMMDiTTransformer2DModel) -> set[str]:
    """Names of the matrices Muon is for: the Linear layers between the embeddings and the output."""
    inner = ("groups.", "compressor.", "reconstructor.")
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inner) and ".modulation" not in name
    }


def cosine_scale(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rates at `step` (from 0): linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def learning_rate_scale(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the learning rates at `step` (from 0): linear warm-up, constant, linear decay over the last steps.

    The decay takes half of the run at most, so that a run shortened by `steps` alone is not all decay.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (steps - step) / min(config.decay_steps, max(1, steps / 2)) if config.decay_steps else 1.0
    return warm * min(1.0, left)
