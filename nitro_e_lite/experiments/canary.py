"""The first steps of a run, with a kill in the middle, before anybody trusts it with days: GO or STOP.

A preflight says that everything is there. Whether it works together only a run can say: the real size, the real shards,
all processes, for `STEPS` steps. In the middle everything is killed at once, as when a machine goes down, and resumed.
Then bands decide, each with what was measured and what it must be: the loss falls (of a student with a judge beside it
it need not) and is finite, the repeated steps repeat their losses, the speed is steady and not far below the published
run's, memory stays below the device's and does not grow, the disk holds what is to come, and no row had to be put into
quarantine.

The run lies in a folder of its own beside the real one and may be deleted afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nitro_e_lite.config import RewardConfig, RunConfig, TrainConfig
from nitro_e_lite.data.shards import QUARANTINE
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.experiments import launch
from nitro_e_lite.experiments.plan import snapshot_bytes
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.model.flops import (
    HARDWARE,
    PUBLISHED_DEVICES,
    PUBLISHED_HARDWARE,
    find_peak,
    published_samples_per_second,
)
from nitro_e_lite.runtime import device_name, memory_there, pick_device
from nitro_e_lite.training.checkpoints import list_checkpoints

STEPS = 500
REPEATED = {"cpu": 1e-5, "accelerator": 0.02}  # of a loss: an accelerator may sum in another order
STEADY = {"cpu": 0.2, "accelerator": 0.5}  # of the median speed, for the slowest interval; a CPU is shared
PUBLISHED_SHARE = 0.5  # of the published run's speed, by peak and number of devices
ROOM = 0.9  # of the memory
GROWTH = 0.05  # of the memory, from the middle to the end


@dataclass(frozen=True)
class Band:
    """One thing that decides: what was measured, between which bounds it must lie."""

    name: str
    measured: float
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""

    @property
    def fine(self) -> bool:
        """Whether it lies inside; NaN does not."""
        return self.low <= self.measured <= self.high

    def __str__(self) -> str:
        bounds = [f"at least {self.low:.4g}"] * (self.low > -math.inf) + [f"at most {self.high:.4g}"] * (
            self.high < math.inf
        )
        bound = ", ".join(bounds) or "no bound here"
        return f"{'ok  ' if self.fine else 'STOP'} {self.name:34} {self.measured:12.5g} {self.unit:10} {bound}"


def canary(
    config: RunConfig,
    run_dir: str | Path,
    processes: int = 1,
    device: str | None = None,
    on_line: Callable[[str], None] = print,
) -> list[Band]:
    """Runs the first steps of `config`, kills and resumes them, prints the bands and GO or STOP.

    Args:
        config: of the real run; its first `STEPS` steps are made, or all where there are fewer.
        run_dir: of the real run; the canary's lies beside it and is made anew.
        processes: as in the real run.
        device: likewise.
        on_line: gets what the processes print, the bands and the verdict.

    Returns:
        The bands; all are fine when it says GO.

    Raises:
        ValueError: fewer than 10 steps.
        LaunchError: the run failed before it was killed, or after it was resumed.
    """
    steps = min(STEPS, config.steps)
    if steps < 10:
        raise InvalidValue(f"steps={steps}: a canary needs 10 at least")
    short = dataclasses.replace(
        config,
        steps=steps,
        log_every=max(1, steps // 50),
        checkpoint_every=max(1, steps // 5),
        validate_every=steps,
        sample_every=steps,
        keep_checkpoints=max(2, config.keep_checkpoints),
    )
    folder = Path(run_dir).with_name(f"{Path(run_dir).name}-canary")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    quarantined = _quarantined(config)
    killer = threading.Thread(target=_kill_at, args=(folder / "metrics.jsonl", steps // 2), daemon=True)
    killer.start()
    try:
        launch.launch(short, folder, processes=processes, device=device, on_line=on_line, apart=True)
    except launch.LaunchError:
        if not (killed := _rows(folder)) or killed[-1]["step"] < steps // 2:
            raise  # it failed by itself
    before = _rows(folder)
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]
    on_line(f"killed after step {before[-1]['step']}; resumes from step {saved[-1] if saved else 0}")
    launch.launch(short, folder, processes=processes, resume=True, device=device, on_line=on_line, apart=True)
    bands = judge(config, before, _rows(folder), saved[-1] if saved else 0, processes, device)
    bands += [
        *_disk(config, folder, steps),
        Band("rows put into quarantine", _quarantined(config) - quarantined, high=0),
    ]
    for band in bands:
        on_line(str(band))
    bad = [band.name for band in bands if not band.fine]
    on_line(f"STOP: {'; '.join(bad)}" if bad else f"GO: {steps} steps, one kill, {len(bands)} bands")
    return bands


def judge(
    config: RunConfig,
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    saved: int,
    processes: int,
    device: str | None = None,
) -> list[Band]:
    """The bands of loss, repetition, speed and memory.

    Args:
        config: of the real run.
        before: rows of the metrics when the run was killed.
        after: those of the whole run, in which the steps after `saved` were made again.
        saved: step of the checkpoint that it was resumed from.
        processes: that trained.
        device: that they trained on.
    """
    chosen = pick_device(device)
    beside_heads = not any("loss" in row for row in after)
    judged = beside_heads or isinstance(config, RewardConfig)  # such a loss need not fall
    name = "student_loss" if beside_heads else "loss"
    rows = [row for row in after if row.get(name) is not None]
    losses = [row[name] for row in rows]
    part = max(1, len(losses) // 10)
    first, last = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    missing = sum(name in row and row[name] is None for row in after)
    again = {row["step"]: row[name] for row in rows if row["step"] > saved}
    pairs = [(row[name], again[row["step"]]) for row in before if row.get(name) and row["step"] in again]
    apart = max((abs(one - other) / abs(one) for one, other in pairs), default=math.nan)
    speeds = [row["samples_per_second"] for row in rows]
    speed, resumed = statistics.median(speeds), next((k for k, row in enumerate(rows) if row["step"] > saved), 0)
    steady = [value for k, value in enumerate(speeds) if k not in (0, resumed, len(speeds) - 1)] or speeds
    memory = [row["memory"] for row in rows if row["step"] > saved and row.get("memory")]
    peak, least = find_peak(device_name(chosen)), -math.inf
    if isinstance(config, TrainConfig) and config.preset == "full" and peak:  # whose speed is published
        share = processes * peak / (PUBLISHED_DEVICES * HARDWARE[PUBLISHED_HARDWARE].peak)
        least = PUBLISHED_SHARE * share * published_samples_per_second()
    around_zero = isinstance(config, RewardConfig) and chosen.type != "cpu"  # where a share of it says nothing
    kind = "cpu" if chosen.type == "cpu" else "accelerator"
    half = len(memory) // 2  # the first checkpoint after the resume is a copy that is kept: the middle comes after it
    middle = statistics.median(memory[max(0, half - 1) : half + 2]) if memory else math.nan
    return [
        Band("loss, last tenth / first tenth", last / first, high=math.inf if judged else 1.0),
        Band("losses that are not finite", missing, high=0),
        Band("steps skipped", rows[-1].get("skipped", 0), high=0),
        Band("repeated steps, loss differs by", apart, high=math.inf if around_zero else REPEATED[kind]),
        Band("speed, median", speed, low=least, unit="samples/s"),
        Band("slowest interval / median", min(steady) / speed, low=STEADY[kind]),
        Band(
            "memory of a process, peak",
            max(memory, default=math.nan),
            high=ROOM * memory_there(chosen) / 1e9,
            unit="GB",
        ),
        Band("memory, end / middle", memory[-1] / middle if memory else math.nan, high=1 + GROWTH),
    ]


def _disk(config: RunConfig, folder: Path, steps: int) -> list[Band]:
    """Room for checkpoints, snapshots and metrics that the real run will write, by what these steps have written."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    one = sum(path.stat().st_size for path in newest.iterdir())
    snapshots = config.steps // config.snapshot_every if config.snapshot_every else 0
    half = (newest / "weights.safetensors").stat().st_size / 2  # the average of these, in bf16
    snapshot = snapshot_bytes(config) if isinstance(config, TrainConfig) else half
    metrics = (folder / "metrics.jsonl").stat().st_size * config.steps / steps
    wanted = (config.keep_checkpoints + 1) * one + snapshots * snapshot + metrics
    return [Band("disk to come / disk free", wanted / shutil.disk_usage(folder).free, high=ROOM)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return list(read_jsonl(path)) if path.is_file() else []


def _quarantined(config: RunConfig) -> int:
    folders = getattr(getattr(config, "data", None), "folders", ())
    files = [Path(one) / QUARANTINE for one in folders]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files if path.is_file())


def _kill_at(metrics: Path, step: int) -> None:
    """SIGKILL to all processes of the run, torchrun's too, as soon as its metrics reach `step`."""
    while not (metrics.is_file() and any(row["step"] >= step for row in read_jsonl(metrics))):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        try:
            if launch.WORKER in process.cmdline():
                process.kill()
        except psutil.NoSuchProcess:
            pass
