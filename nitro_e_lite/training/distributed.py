"""The processes of a run: how they find each other, and what they must agree on."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from nitro_e_lite.config import TrainConfig
from nitro_e_lite.runtime import pick_device
from nitro_e_lite.training.metrics import tracker_name

PATIENCE = timedelta(hours=6)  # the first run of several processes encodes all scenes in one: an hour on two cores


def start_accelerator(config: TrainConfig, run_dir: Path, device: str | None) -> Accelerator:
    """The processes of the run, joined. They wait for each other up to ``PATIENCE``: one encodes scenes for all.

    Raises:
        RuntimeError: the launcher (torchrun) was asked for another number of processes than found each other, or an
            earlier run of this process was on the CPU and this one should not be.
        ValueError: a tracker that is not installed or unknown, a device that is not there, or one with a number for
            several processes.
    """
    chosen, asked = pick_device(device), int(os.environ.get("WORLD_SIZE", 1))
    cpu = chosen.type == "cpu"
    if chosen.index is not None and not cpu:
        if asked > 1:
            raise ValueError(f"device={device}: each of the {asked} processes takes one of its own; name no number")
        torch.accelerator.set_device_index(chosen.index)
    accelerator = Accelerator(
        cpu=cpu,
        log_with=tracker_name(config.tracker),
        project_dir=run_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes != asked:
        raise RuntimeError(
            f"WORLD_SIZE={asked}, but accelerate sees {accelerator.num_processes}: the processes would train "
            f"separate models; start them with torchrun, on a machine without accelerator with ACCELERATE_USE_CPU=true"
        )
    if not cpu and accelerator.device.type == "cpu":
        raise RuntimeError(
            f"device={device}: an earlier run of this process chose the CPU, and accelerate keeps it; restart"
        )
    return accelerator


def check_together(accelerator: Accelerator, step: int, run_dir: Path) -> None:
    """All processes must have found the same checkpoint.

    Raises:
        RuntimeError: they stand at different steps: the machines do not see the same folder.
    """
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"run_dir={run_dir}: the processes found checkpoints of steps {steps}; "
            "all machines must see the same folder"
        )
