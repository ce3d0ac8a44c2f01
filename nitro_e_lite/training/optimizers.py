"""Master weights and optimisers.

**Float32 masters.** A network may compute in bf16, but an update smaller than a bf16 rounding step would be lost in it.
Optimiser and EMA therefore work on float32 masters, which are copied into the network after each step. Autocast would
instead cast every weight again in every forward pass.

**Muon.** The matrices inside the blocks are updated along orthogonalised momentum, everything else by AdamW.
``Muon`` below is torch's with another ``step``: on a CPU without matrix units bf16 is the slow type, and each process
would repeat the work of all. Differs: the paper trains with AdamW alone; ``OptimizerConfig(name="adamw")`` does too.
Source: Jordan et al., 2024.

**White text.** A frozen language model may say what matters in a whisper: swap "left" for "right" in a caption, and the
features of the lite one move by a twentieth of their length (``nitro-e sensitivity``). The layer that takes them in
hears the rest first, since its gradient along a direction is in proportion to how much the features vary there.
``whiten_input`` lets it learn as if they varied equally in all directions. The function it computes and the file it is
kept in stay the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nitro_e_lite.config import OptimizerConfig
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.products import multiply


class MasterWeights:
    """Float32 masters of a model that computes in another number type.

    Args:
        model: in float32; converted to ``dtype`` in place. With float32 the masters are the model's own parameters.
        dtype: of the computation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model = model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if dtype == torch.float32:
            self.masters = trained
        else:
            self.masters = {name: nn.Parameter(p.detach().clone()) for name, p in trained.items()}
            nn.Module.to(model, dtype)  # diffusers' own `to` warns of layers kept in float32, where there are none too
        self._trained = trained

    def collect_gradients(self) -> None:
        """Moves the gradients of the computing copy to the masters, adding to what is there, in float32."""
        for name, master in self.masters.items():
            parameter = self._trained[name]
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def publish(self, values: dict[str, Tensor] | None = None) -> None:
        """Copies the masters, or other ``values``, into the computing copy."""
        values = values or self.masters
        torch._foreach_copy_([self._trained[name] for name in values], list(values.values()))

    @contextmanager
    def showing(self, values: dict[str, Tensor]):
        """Lets the model compute with ``values`` for a while."""
        kept = {name: p.detach().clone() for name, p in self.masters.items()}
        self.publish(values)
        try:
            yield
        finally:
            self.publish(kept)


class _White(nn.Module):
    """``weight = learned @ root``; ``root`` (in, in) is symmetric and so, up to rounding, the same everywhere."""

    def __init__(self, root: Tensor):
        super().__init__()
        self.register_buffer("root", root, persistent=False)  # in the number type of the computation
        self.set(root)

    def set(self, root: Tensor) -> None:
        self.exact, self.inverse = root.clone(), torch.linalg.inv(root.double()).float()
        self.root = root.to(self.root)

    def forward(self, learned: Tensor) -> Tensor:
        return learned @ self.root

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight @ self.inverse


def whiten_input(linear: nn.Linear, inputs: Tensor, floor: float = 1e-3) -> None:
    """From now on the layer's trained parameter is its weight in coordinates in which ``inputs`` are white.

    Args:
        linear: on the CPU, in float32; computes the same as before.
        inputs: examples (N, in) of what it gets.
        floor: least variance of a direction, as a share of the mean variance.
    """
    inputs = inputs.double()
    moment = inputs.T @ inputs / len(inputs)  # about zero: the mean is a direction like others
    moment /= moment.diagonal().mean()
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * (values.clamp(min=0) + floor).rsqrt()) @ vectors.T
    parametrize.register_parametrization(linear, "weight", _White(root.float()))


def white_roots(model: nn.Module) -> dict[str, Tensor]:
    """By the name of each whitened layer: what its trained parameter is multiplied with; belongs to a checkpoint."""
    owners = {name.removesuffix(".parametrizations.weight.0"): m for name, m in model.named_modules()}
    return {name: module.exact for name, module in owners.items() if isinstance(module, _White)}


def set_white_roots(model: nn.Module, roots: dict[str, Tensor]) -> None:
    """Back to the coordinates of a checkpoint: other examples would have given others."""
    for name, root in roots.items():
        model.get_submodule(name).parametrizations.weight[0].set(root)


def plain_weights(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained ``values`` by the names and in the coordinates of the model's files: on the CPU, whitening undone."""
    plain = {}
    for name, value in values.items():
        owner, learned, _ = name.partition(".parametrizations.weight.original")
        if learned:
            white = model.get_submodule(owner).parametrizations.weight[0]
            name, value = f"{owner}.weight", value.cpu() @ white.exact
        plain[name] = value.cpu()
    return plain


def orthogonalize(matrices: Tensor, coefficients=(3.4445, -4.7750, 2.0315), steps: int = 5) -> Tensor:
    """Moves the singular values of each matrix `(K, rows, columns)` to about 0.7 ... 1.2 by Newton-Schulz iterations.

    Source: coefficients by Jordan et al., 2024.
    """
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(steps):
        gram = multiply(x, x.mT)
        x = multiply(torch.add(b * gram, multiply(gram, gram), alpha=c), x).add_(x, alpha=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon with the work divided among the processes, and in float32 on a CPU.

    Each of N processes orthogonalises every N-th matrix, equal shapes together; the directions are then summed, so that
    all processes hold the same weights, bit for bit.
    """

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
                stack = stack.float() if stack.device.type == "cpu" else stack.bfloat16()
                for k, direction in zip(members, orthogonalize(stack, group["ns_coefficients"]), strict=True):
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


def build_optimizers(masters: dict[str, Tensor], matrices: set[str], config: OptimizerConfig):
    """The optimisers of a run.

    Args:
        masters: parameters by name.
        matrices: names of the weights of Linear layers inside blocks, compressor and reconstructor.
        config: which optimiser, learning rates, decay.

    Returns:
        name -> optimiser; every parameter is in exactly one.
    """
    chosen = matrices if config.name == "muon" else set()
    rest = [p for name, p in masters.items() if name not in chosen]
    optimizers = {
        "adamw": torch.optim.AdamW(
            rest, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=True
        )
    }
    if chosen:
        optimizers["muon"] = Muon(
            [p for name, p in masters.items() if name in chosen],
            lr=config.muon_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return optimizers


def hidden_matrices(model: EMMDiTTransformer2DModel) -> set[str]:
    """Names of the matrices Muon is for: the Linear layers between the embeddings and the output."""
    inner = ("groups.", "compressor.", "reconstructor.")
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inner) and ".modulation" not in name
    }


def learning_rate_scale(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the learning rates at ``step`` (from 0): linear warm-up, constant, linear decay over the last steps.

    The decay takes half of the run at most, so that a run shortened by ``steps`` alone is not all decay.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (steps - step) / min(config.decay_steps, max(1, steps / 2)) if config.decay_steps else 1.0
    return warm * min(1.0, left)
