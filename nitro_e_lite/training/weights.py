"""Master weights in float32, and layers that learn as if their input were white.

**Float32 masters.** A network may compute in bf16, but an update smaller than a bf16 rounding step would be lost in it.
Optimiser and EMA therefore work on float32 masters, which are copied into the network after each step. Autocast would
instead cast every weight again in every forward pass.

**Whitened text.** A frozen language model may say what matters very softly: exchange "left" for "right" in a caption,
and the features of the lite one move by a twentieth of their length (`nitro-e sensitivity`). The layer that takes
them in learns the rest first, since its gradient along a direction is in proportion to how much the features vary
there. `whiten_input` lets it learn as if they varied equally in all directions. The function it computes and the file
it is kept in stay the same.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class MasterWeights:
    """Float32 masters of a model that computes in another number type.

    Args:
        model: in float32; converted to `dtype` in place. With float32 the masters are the model's own parameters.
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
        self.parameters = list(trained.values())  # what gradients are computed for

    def collect_gradients(self) -> None:
        """Moves the gradients of the computing copy to the masters, adding to what is there, in float32."""
        for name, master in self.masters.items():
            parameter = self._trained[name]
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def copy_to_model(self, values: dict[str, Tensor] | None = None) -> None:
        """Copies the masters, or other `values`, into the computing copy."""
        if values is None:
            values = self.masters
        if values is self._trained:
            return  # the masters are the model's own parameters
        torch._foreach_copy_([self._trained[name] for name in values], list(values.values()))

    @contextmanager
    def swapped_in(self, values: dict[str, Tensor]):
        """Lets the model compute with `values` for a while."""
        kept = {name: p.detach().clone() for name, p in self._trained.items()}
        self.copy_to_model(values)
        try:
            yield
        finally:
            self.copy_to_model(kept)


class _White(nn.Module):
    """`weight = learned @ root`; `root` (in, in) is symmetric and so, up to rounding, the same everywhere."""

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
    """From now on the layer's trained parameter is its weight in coordinates in which `inputs` are white.

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
    """Trained `values` by the names and in the coordinates of the model's files: on the CPU, whitening undone."""
    plain = {}
    for name, value in values.items():
        owner, learned, _ = name.partition(".parametrizations.weight.original")
        if learned:
            white = model.get_submodule(owner).parametrizations.weight[0]
            name, value = f"{owner}.weight", value.cpu() @ white.exact
        plain[name] = value.cpu()
    return plain
