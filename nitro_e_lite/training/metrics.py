"""What a run says of itself: the metrics file, trackers, speed and utilisation, and the bar on the terminal.

It begins with the processes finding each other, since accelerate joins them and holds their trackers.

``metrics.jsonl`` is the record that everything else reads, one row a logging interval. The same rows go to trackers
through accelerate: tensorboard when it is installed, or another by name. Speed is the mean over the interval, with the
waiting for data in it and without validation, pictures and checkpoints. Model FLOPs utilisation is 3 forward passes a
sample (one forward, two for the gradients) over what the devices could do at best.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm.auto import tqdm

from nitro_e_lite.config import TrainConfig
from nitro_e_lite.evaluation.benchmark import count_flops
from nitro_e_lite.model.hardware import find_peak
from nitro_e_lite.runtime import MetricsWriter, device_name, pick_device

PATIENCE = timedelta(hours=6)  # the first run of several processes encodes all scenes in one: an hour on two cores


def tracker_name(asked: str) -> str | None:
    """The tracker to use: the one asked for, or what "auto" means here, or None.

    Raises:
        ValueError: it is not installed.
    """
    if asked in ("none", ""):
        return None
    package = {"auto": "tensorboard", "comet_ml": "comet_ml"}.get(asked, asked)
    if importlib.util.find_spec(package) is None:
        if asked == "auto":
            return None
        raise ValueError(f"tracker={asked!r}: not installed here; pip install {asked}, or choose tracker=none")
    return package


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


class Progress:
    """Reports of one run; only the main process writes.

    Args:
        accelerator: of the run.
        config: of the run.
        run_dir: folder of the run.
        flops: of one forward pass of one sample.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, run_dir: Path, flops: float):
        self.accelerator, self.config, self.run_dir = accelerator, config, run_dir
        peak = config.peak_tflops * 1e12 or find_peak(device_name(accelerator.device))
        self._share_of_peak = 3 * flops / (peak * accelerator.num_processes) if peak else None
        self.seconds = 0.0  # in steps, over the whole run
        self._interval = [0, 0.0]  # steps and seconds since the last report
        self._metrics = self._bar = None

    def start(self, step: int) -> None:
        """Opens the files at ``step``; rows of later steps, which a kill has undone, are removed."""
        if self.accelerator.is_main_process:
            self._metrics = MetricsWriter(self.run_dir / "metrics.jsonl")
            self._metrics.truncate_after(step)
            if self.accelerator.log_with:
                self.accelerator.init_trackers("tracker")
        self._bar = tqdm(
            total=self.config.steps,
            initial=step,
            disable=not self.accelerator.is_main_process,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        self._clock = time.perf_counter()

    def begin_step(self) -> None:
        """Starts the clock of a step."""
        self._clock = time.perf_counter()

    def end_step(self) -> None:
        """Stops it."""
        seconds = time.perf_counter() - self._clock
        self.seconds += seconds
        self._interval = [self._interval[0] + 1, self._interval[1] + seconds]
        self._bar.update()

    def report(self, step: int, skipped: int, row: dict[str, float]) -> None:
        """One row about the training since the last one."""
        steps, seconds = self._interval
        self._interval = [0, 0.0]
        speed = steps * self.config.batch_size / seconds
        row = {"seconds": round(self.seconds, 3), "samples_per_second": round(speed, 2), "skipped": skipped, **row}
        if self._share_of_peak:
            row["mfu"] = speed * self._share_of_peak
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", speed=f"{speed:.3g}/s", refresh=False)
        self.write(step, row)

    def write(self, step: int, row: dict[str, float]) -> None:
        """One row to the metrics file and the trackers."""
        if self._metrics is not None:
            self._metrics.write(step=step, samples=step * self.config.batch_size, **finite(row))
        self.accelerator.log({name: value for name, value in row.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Closes files and trackers."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def finite(row: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: non-finite numbers become None."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def model_flops(config: dict, text_tokens: int) -> float:
    """FLOPs of one forward pass of one sample, attention included."""
    flops = count_flops(config, 1, text_tokens)
    return flops.weights + flops.attention
