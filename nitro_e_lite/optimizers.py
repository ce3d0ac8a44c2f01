"""Master weights and optimisers.

**Float32 masters.** A network may compute in bf16, but an update smaller than a bf16 rounding step would be lost in it.
Optimiser and EMA therefore work on float32 masters, which are copied into the network after each step. Autocast would
instead cast every weight again in every forward pass.

**Muon.** The matrices inside the blocks are updated along orthogonalised momentum, everything else by AdamW.
Differs: the paper trains with AdamW alone; ``OptimizerConfig(name="adamw")`` does too. Source: Jordan et al., 2024.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nitro_e_lite.config import OptimizerConfig
from nitro_e_lite.emmdit import EMMDiTTransformer2DModel


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
            model.to(dtype)
        self._trained = trained

    def collect_gradients(self) -> None:
        """Moves the gradients of the computing copy to the masters."""
        for name, master in self.masters.items():
            parameter = self._trained[name]
            if parameter is not master and parameter.grad is not None:  # the last block never asks text queries
                master.grad = parameter.grad.float()
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
        optimizers["muon"] = torch.optim.Muon(
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
    """Factor on the learning rates at ``step`` (from 0): linear warm-up, constant, linear decay over the last steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (steps - step) / config.decay_steps if config.decay_steps else 1.0
    return warm * min(1.0, left)
