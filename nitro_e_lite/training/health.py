"""Which steps are left out: those whose gradient is not finite, and those whose loss jumps far above its mean.

A single bad batch should cost one step and not the run; a run that has gone wrong should end, with its last state on
disk, and not burn days. So a step is left out when a gradient holds NaN or infinity, or when a loss is more than
`spike_factor` times its running mean, and the run gives up after more than `max_skipped` such steps *in a row*.

All of it is decided by tensors where the losses are. On an accelerator the host need not wait for the answer: the
optimiser is told to do nothing (`found_inf` of torch's fused AdamW) and the counts are read once a logging interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nitro_e_lite.config import RunConfig
from nitro_e_lite.errors import NotFinite

RATE = 0.01  # at which the running mean forgets
KNOWN = 0.5  # of its weight that the running mean must have before a loss counts as a spike: 69 steps


class Health:
    """Judges steps, and counts those that were left out.

    Args:
        config: of the run.
        device: where losses are.
    """

    def __init__(self, config: RunConfig, device: torch.device):
        self.limit, self.factor = config.max_skipped, config.spike_factor
        self._counts = torch.zeros(3, device=device)  # not finite, spikes, left out in a row
        self._means: dict[str, Tensor] = {}  # by loss: its weighted sum, and the sum of the weights

    def judge(self, norms: Sequence[Tensor], losses: Mapping[str, Tensor]) -> Tensor:
        """Whether this step is to be left out, () float32: 0 or 1. All processes must give the same numbers.

        Args:
            norms: of the gradients, () each.
            losses: by name, () each.
        """
        broken = ~torch.stack(list(norms)).isfinite().all()
        spike = torch.zeros_like(broken)
        for name, loss in losses.items() if self.factor else ():
            mean = self._means.setdefault(name, torch.zeros(2, device=loss.device))
            spike = spike | (mean[1] > KNOWN) & (loss > self.factor * (mean[0] / mean[1]).abs())
        left_out = broken | spike
        for name, loss in losses.items() if self.factor else ():
            mean = self._means[name]
            moved = mean.lerp(torch.stack([loss.float(), torch.ones_like(loss)]), RATE)
            self._means[name] = torch.where(left_out, mean, moved)
        self._counts += torch.stack([broken, spike & ~broken, left_out]).float()
        self._counts[2] *= left_out
        return left_out.float()

    @property
    def skipped(self) -> int:
        """Steps left out because a gradient was not finite."""
        return int(self._counts[0])

    @property
    def spikes(self) -> int:
        """Steps left out because a loss was too high."""
        return int(self._counts[1])

    def check(self) -> None:
        """Gives up after too many steps in a row; the host waits for the device.

        Raises:
            FloatingPointError: it is time to.
        """
        if (in_a_row := int(self._counts[2])) > self.limit:
            error = NotFinite(
                f"{in_a_row} steps had non-finite gradients or a loss that jumped, one after the other "
                f"(max_skipped={self.limit}, spike_factor={self.factor:g}); lower the learning rate or train in fp32"
            )
            error.everywhere = True  # the counts are those of all processes
            raise error

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"counts": self._counts.tolist(), "means": {name: mean.tolist() for name, mean in self._means.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self._counts.copy_(torch.tensor(state["counts"]))
        self._means = {name: self._counts.new_tensor(mean) for name, mean in state["means"].items()}
