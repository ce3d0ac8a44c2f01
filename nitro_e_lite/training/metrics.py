"""What a run says of itself: the metrics file, trackers, speed and utilisation, and the bar on the terminal.

`metrics.jsonl` is the record that everything else reads, one row a logging interval. The same rows go to trackers
through accelerate: tensorboard when it is installed, or another by name. Speed is the mean over the interval, with the
waiting for data in it and without validation, pictures and checkpoints. Model FLOPs utilisation is 3 forward passes a
sample (one forward, two for the gradients) over what the devices could do at best. Where the seconds of a step went is
in `data_seconds`, `communication_seconds` and `compute_seconds`, means over the processes; with several processes
`seconds_by_rank` has each one's, and `slowest_rank` names the one that the others wait for (`config.json`: on which
machine it is).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from nitro_e_lite.config import RunConfig
from nitro_e_lite.errors import InvalidValue, NotWritten
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.model.flops import TRAINING_PASSES, find_peak
from nitro_e_lite.runtime import device_name, memory_used
from nitro_e_lite.training.clock import Clock, Heartbeat, forget_others, step_times, straggler


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
        raise InvalidValue(f"tracker={asked!r}: not installed here; pip install {asked}, or choose tracker=none")
    return package


class Progress:
    """Reports of one run; only the main process writes.

    Args:
        accelerator: of the run.
        config: of the run.
        run_dir: folder of the run.
        flops: of one forward pass of one sample; None: unknown, there is no utilisation then.
        clock: of this process.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, run_dir: Path, flops: float | None, clock: Clock):
        self.accelerator, self.config, self.run_dir, self.clock = accelerator, config, run_dir, clock
        self.heartbeat = Heartbeat(run_dir, accelerator.process_index)
        peak = config.peak_tflops * 1e12 or find_peak(device_name(accelerator.device))
        work = TRAINING_PASSES * flops if flops else None
        self._share_of_peak = work / (peak * accelerator.num_processes) if peak and work else None
        self.seconds = 0.0  # in steps, over the whole run
        self.validation_seconds = 0.0  # beside them
        self._interval = [0, 0.0]  # steps and seconds since the last report
        self._values: dict[str, list[float | Tensor]] = {}  # by name, since the last report
        self._metrics = self._bar = None

    def start(self, step: int) -> None:
        """Opens the files at `step`; rows of later steps, which a kill has undone, are removed."""
        if self.accelerator.is_main_process:
            self._metrics = MetricsWriter(self.run_dir / "metrics.jsonl")
            self._metrics.truncate_after(step)
            forget_others(self.run_dir, self.accelerator.num_processes)
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

    def end_step(self, step: int, row: dict[str, float | Tensor], wait: bool) -> None:
        """Stops it and notes what the step measured; `wait`: the device has to catch up first."""
        if wait and self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - self._clock
        self.heartbeat.beat(step)
        self.seconds += seconds
        self._interval = [self._interval[0] + 1, self._interval[1] + seconds]
        for name, value in row.items():
            self._values.setdefault(name, []).append(value)
        self._bar.update()

    def means(self) -> dict[str, float]:
        """The mean of each number over the steps since the last report in which it was measured."""
        return {name: sum(map(float, values)) / len(values) for name, values in self._values.items()}

    def report(self, step: int, row: dict[str, float]) -> None:
        """One row about the training since the last one; all processes call it."""
        steps, seconds = self._interval
        self._interval, self._values = [0, 0.0], {}
        times = step_times(self.clock.take(), seconds, steps, self.accelerator.device)
        speed = steps * self.config.batch_size / seconds
        row = {"seconds": round(self.seconds, 3), "samples_per_second": round(speed, 2), **row}
        row["memory"] = round(memory_used(self.accelerator.device) / 1e9, 4)  # GB of the main process
        row |= {f"{name}_seconds": sum(each) / len(each) for name, each in times.items()}
        by_rank = {}
        if self.accelerator.num_processes > 1:
            row["slowest_rank"] = straggler(times)
            by_rank["seconds_by_rank"] = {name: [round(one, 4) for one in each] for name, each in times.items()}
        if self._share_of_peak:
            row["mfu"] = speed * self._share_of_peak
        losses = {name: f"{value:.3f}" for name, value in row.items() if name.endswith("loss")}
        self._bar.set_postfix(losses, speed=f"{speed:.3g}/s", refresh=False)
        self.write(step, row, by_rank)

    def write(self, step: int, row: dict[str, float], more: dict[str, Any] | None = None) -> None:
        """One row to the metrics file and the trackers; `more` is for the file alone."""
        if self._metrics is not None:
            self._metrics.write(step=step, samples=step * self.config.batch_size, **finite(row), **(more or {}))
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


class MetricsWriter:
    """Appends one JSON object a line to `path`, flushed at once; safe to reopen after a kill.

    Args:
        path: the JSONL file; its folder is made when missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(list(read_jsonl(self.path)) if self.path.is_file() else [])

    def write(self, **row: Any) -> None:
        """Writes one row; values must be JSON types, numbers finite.

        Raises:
            ValueError: for a value that is NaN or infinite.
            TypeError: for a value JSON has no form for.
            OSError: it could not be written, for example because the disk is full.
        """
        text = json.dumps(row, allow_nan=False) + "\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise NotWritten(
                f"{self.path}: could not be written ({error}); what was written before is intact"
            ) from error

    def truncate_after(self, step: int) -> None:
        """Drops the rows whose `step` lies after `step`: call it when a run resumes from that step."""
        self._file.close()
        self._rewrite([row for row in read_jsonl(self.path) if row.get("step", 0) <= step])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file's contents in one atomic move, then reopens it for appending."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # every row was flushed; one that could not be was reported
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
