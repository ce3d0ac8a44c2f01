"""A training inside of a notebook: looked at first, continued first, and not lost with the notebook.

    run = stage_run.StageRun(settings, lesson.run_dir / "training", devices)
    stage_run.prepare(run, again=preset == "smoke", first=preset != "smoke")  # at the top, before any demonstration
    ...
    final = run.train()                              # where the lesson comes to it

`prepare` looks for what the run needs (`preflight.py`) and ends the notebook where something is missing. When the run
was stopped before, or is to come `first`, it trains there and then: papermill spends no minute on demonstrations while
accelerators wait, and shows them once, after the training. A run longer than `SHORT` trains in processes of its own,
which save when papermill, the kernel or the terminal is killed (`launch.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_e_lite.config import RunConfig, to_dict
from nitro_e_lite.experiments import launch
from nitro_e_lite.experiments.preflight import Finding, preflight, require
from nitro_e_lite.training.checkpoints import STATE, list_checkpoints

SHORT = 100  # steps; such a run is over before anybody could stop it, and importing everything again takes longer


@dataclass(frozen=True)
class StageRun:
    """One training of a notebook.

    Attributes:
        config: of the run, of any stage that `launch` knows.
        folder: of the run.
        processes: one for each accelerator.
        device: "cpu", "cuda" or None for the best there is.
        after: the run whose weights it starts from, where the same notebook makes both.
    """

    config: RunConfig
    folder: Path
    processes: int = 1
    device: str | None = None
    after: StageRun | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are trained and the results stand."""
        state = self._newest()
        return (self.folder / "final").is_dir() and bool(state) and state["step"] >= self.config.steps

    @property
    def stopped(self) -> bool:
        """Whether it was begun and is not finished."""
        return self._newest() is not None and not self.finished

    def _newest(self) -> dict | None:
        there = list_checkpoints(self.folder / "checkpoints")
        return json.loads((there[-1] / STATE).read_text(encoding="utf-8")) if there else None

    def findings(self) -> list[Finding]:
        """What `preflight` finds."""
        return preflight(self.config, self.folder, self.processes, self.device, self.after is not None)

    def train(self) -> Path:
        """Trains what is left of it and returns the folder with the final weights.

        Raises:
            RunStopped: it was asked to stop and has saved; the same notebook continues.
            LaunchError: a process failed.
        """
        if self.finished:
            return self.folder / "final"
        apart = self.config.steps > SHORT
        return launch.launch(
            self.config, self.folder, processes=self.processes, resume=True, device=self.device, apart=apart
        )

    def start_again(self) -> None:
        """Removes a run that is finished or was made with other settings; one that was stopped is kept and goes on."""
        state = self._newest()
        if state is None or self.finished or state["config"] != json.loads(json.dumps(to_dict(self.config))):
            shutil.rmtree(self.folder, ignore_errors=True)


def prepare(*runs: StageRun, again: bool = False, first: bool = False, findings: Sequence[Finding] = ()) -> None:
    """Looks for what the runs need, prints it, and continues first what was stopped.

    Args:
        *runs: in the order in which they train.
        again: makes a finished run anew, as lessons at smoke scale do, so that every execution is the same.
        first: trains them here and now, even where nothing was begun.
        findings: of the notebook's own.

    Raises:
        RuntimeError: something is missing that a run cannot do without.
    """
    if again:
        for run in runs:
            run.start_again()
    seen = dict.fromkeys(one for run in runs for one in run.findings())
    require([*seen, *findings])
    if first or any(run.stopped for run in runs):
        for run in runs:
            run.train()
