"""The runbook: commands as they are printed, signals to papermill, what is looked at first, the canary."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nitro_e_lite.config import override
from nitro_e_lite.course import notebooks
from nitro_e_lite.errors import Unusable
from nitro_e_lite.experiments import canary, launch, preflight, stage_run
from nitro_e_lite.presets import preset
from nitro_e_lite.training.checkpoints import list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
CELL = """from pathlib import Path
from nitro_e_lite.config import override
from nitro_e_lite.experiments.launch import launch
from nitro_e_lite.presets import preset
never = [f"{name}=100000" for name in ("steps", "validate_every", "sample_every", "checkpoint_every")]
launch(override(preset("base", "smoke"), never), Path("run"), resume=True, device="cpu", apart=True)"""


# Signals


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with a notebook that trains for ever; each case goes on where the one before was stopped."""
    folder = tmp_path_factory.mktemp("clone")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": CELL}
    book = {"cells": [cell], "metadata": notebooks.METADATA, "nbformat": 4, "nbformat_minor": 5}
    (folder / "long.ipynb").write_text(json.dumps(book))
    return folder


def trained(run: Path) -> int:
    path = run / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["step"] if path.is_file() and path.read_text() else 0


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "target"),
    [("SIGTERM", "papermill"), ("SIGINT", "papermill"), ("SIGHUP", "papermill"), ("SIGTERM", "worker")],
)
def test_a_signal_ends_in_a_checkpoint_without_orphans_and_the_same_command_continues(clone, name, target):
    """Papermill and its kernel die at once; the training once ran on for half a minute and died without saving."""
    run = clone / "run"
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]
    environment = {**os.environ, "NITRO_E_CACHE": str(clone / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["papermill", "long.ipynb", "out.ipynb", "--no-progress-bar"]
    log = (clone / "papermill.log").open("w")
    papermill = subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=subprocess.STDOUT)
    begun = max(saved, default=0)
    until(lambda: trained(run) > begun or papermill.poll() is not None)
    family = psutil.Process(papermill.pid).children(recursive=True)
    (worker,) = (one for one in family if launch.WORKER in one.cmdline())
    (papermill if target == "papermill" else worker).send_signal(getattr(signal, name))
    assert psutil.wait_procs(family, timeout=60)[1] == [], "an orphan"
    assert papermill.wait(60) != 0
    now = int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    assert now == trained(run) > begun, "the last step is saved, and it went on from the one before"
