"""Starting a training run: here, in several processes, or on several machines.

One process trains in place. For more, torchrun is started as a child: it starts the processes, tells each its rank,
and ends all when one fails. Its output is passed on line by line, into the terminal or the notebook cell that asked,
and its failure is raised here with its last lines. A child of a notebook would inherit settings that are meant for the
kernel (`MPLBACKEND` above all); they are taken away. On a machine without accelerator `ACCELERATE_USE_CPU` is set,
because accelerate would otherwise make a separate run of every process; the engine checks that all found each other.

SIGTERM or Ctrl-C is passed on to the training processes themselves, not to torchrun, which would kill them after half a
minute. They save and end well, and so does torchrun.

Several machines need a scheduler or a person on each: `torchrun_commands` and `slurm_script` print what to run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from nitro_e_lite.config import RunConfig, to_dict
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.experiments import worker
from nitro_e_lite.presets import assignments
from nitro_e_lite.runtime import RunStopped, StopRequest

NOTEBOOK_SETTINGS = ("MPLBACKEND", "JPY_PARENT_PID", "FORCE_COLOR", "CLICOLOR_FORCE")
TORCHRUN_SAYS = "failed (exitcode"  # where torchrun's own report of a failure begins; what counts stands before it
LAST_LINES = 25  # of the output that a failure repeats
PORT = 29500


class LaunchError(RuntimeError):
    """A process of the run failed; the message ends with the last lines of output."""


def train_arguments(config: RunConfig, run_dir: str | Path, resume: bool, device: str | None) -> list[str]:
    """The words after `nitro-e` that train `config`, for a person to type or a scheduler to run."""
    arguments = ["train", config.stage, "--preset", config.preset, "--run-dir", str(run_dir)]
    arguments += [word for assignment in assignments(config) for word in ("--set", assignment)]
    return arguments + ["--resume"] * resume + ([] if device is None else ["--device", device])


def launch(
    config: RunConfig,
    run_dir: str | Path,
    *,
    processes: int = 1,
    resume: bool = False,
    device: str | None = None,
    on_line: Callable[[str], None] = print,
) -> Path:
    """Trains on this machine and returns the folder with the final weights.

    Args:
        config: what to train: of any stage in `worker.RUNS`.
        run_dir: folder of the run.
        processes: 1 trains in this process; more are started through torchrun, one for each device.
        resume: continue the run in `run_dir`.
        device: "cpu", "cuda" or None for the best there is.
        on_line: gets each line that the processes print.

    Raises:
        ValueError: fewer than one process, or more than there are accelerators.
        LaunchError: a process failed.
        RunStopped: the run was asked to stop and has saved.
    """
    check_processes(processes, device)
    name = worker.run_name(config)
    if processes == 1:
        return worker.RUNS[name][1](config, run_dir, resume, device)
    with tempfile.TemporaryDirectory() as folder:
        request, outcome = Path(folder) / "request.json", Path(folder) / "outcome.json"
        asked = {"run": name, "config": to_dict(config), "run_dir": str(run_dir), "resume": resume, "device": device}
        request.write_text(json.dumps(asked | {"outcome": str(outcome)}), encoding="utf-8")
        words = ["-m", worker.__name__, str(request)]
        try:
            run_processes(words, processes, child_environment(processes, device), on_line)
        except LaunchError:
            ended = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
            if "mistake" not in ended:
                raise
            raise InvalidValue(ended["mistake"]) from None
        ended = json.loads(outcome.read_text(encoding="utf-8"))
    if "stopped" in ended:
        raise RunStopped(ended["stopped"])
    return Path(ended["final"])


def check_processes(processes: int, device: str | None) -> None:
    """Refuses what this machine cannot run.

    Raises:
        ValueError: fewer than one process, or more than there are accelerators.
    """
    if processes < 1:
        raise InvalidValue(f"processes={processes}: must be >= 1")
    there = torch.accelerator.device_count() if device != "cpu" and torch.accelerator.is_available() else None
    if there is not None and processes > there:
        raise InvalidValue(f"processes={processes}: this machine has {there} accelerators; one process uses one")


def child_environment(processes: int, device: str | None, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of the processes: this one's, without a notebook's settings, with what accelerate needs.

    Args:
        processes: on this machine; they share its processor cores.
        device: as in `launch`.
        inherited: to start from; `os.environ` when None.
    """
    environment = dict(os.environ if inherited is None else inherited)
    for name in NOTEBOOK_SETTINGS:
        environment.pop(name, None)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if device == "cpu" or (device is None and not torch.accelerator.is_available()):
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def torchrun_words(words: Sequence[str], processes: int, nodes: int = 1, rank: int = 0, address: str = "") -> list[str]:
    """Arguments of Python that start `words` through torchrun on one machine.

    Args:
        words: what each process runs: a script, `-m module` or `--no-python program`, and its arguments.
        processes: on each machine.
        nodes: number of machines.
        rank: of this machine, from 0.
        address: `host:port` of machine 0; needed for more than one.
    """
    place = ["--standalone"]
    if nodes > 1:
        host, _, port = address.partition(":")
        place = ["--nnodes", str(nodes), "--node_rank", str(rank), "--rdzv_backend", "static"]
        place += ["--master_addr", host, "--master_port", port or str(PORT)]
    return ["-m", "torch.distributed.run", *place, "--nproc_per_node", str(processes), *words]


def run_processes(
    words: Sequence[str],
    processes: int,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] = print,
    **machines,
) -> None:
    """Runs `words` in several processes and passes their output on.

    Args:
        words: see `torchrun_words`.
        processes: on this machine.
        environment: of the processes.
        on_line: gets each line of output.
        **machines: `nodes`, `rank` and `address` for `torchrun_words`.

    Raises:
        LaunchError: torchrun ended with an error.
    """
    command = [sys.executable, *torchrun_words(words, processes, **machines)]
    last: deque[str] = deque(maxlen=LAST_LINES)
    failed = False
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the processes once, through here
    )
    with StopRequest(lambda: _terminate_children(process.pid)):
        try:
            for line in process.stdout:
                if line := line.rstrip():
                    failed = failed or TORCHRUN_SAYS in line
                    if not failed:
                        last.append(line)
                    on_line(line)
            code = process.wait()
        finally:
            if process.poll() is None:
                _terminate_children(process.pid)
                process.terminate()
                process.wait()
    if code:
        raise LaunchError(f"{processes} processes: torchrun ended with code {code}. Last lines:\n" + "\n".join(last))


def _terminate_children(pid: int) -> None:
    """SIGTERM to the training processes that torchrun has started."""
    try:
        for child in psutil.Process(pid).children():
            child.terminate()
    except psutil.NoSuchProcess:
        pass


# -- several machines


def torchrun_commands(words: Sequence[str], nodes: int, processes: int, address: str = f"HOST:{PORT}") -> list[str]:
    """The command for each of several machines.

    Args:
        words: arguments of `nitro-e`, such as those of `train_arguments`.
        nodes: number of machines.
        processes: on each, one for every accelerator.
        address: `host:port` of the first machine.
    """
    options = [torchrun_words(["nitro-e", *words], processes, nodes, rank, address) for rank in range(nodes)]
    return [shlex.join(["torchrun", "--no-python", *one[2:]]) for one in options]


def slurm_script(words: Sequence[str], nodes: int, processes: int, hours: int = 48, port: int = PORT) -> str:
    """A batch script for Slurm: one task for each accelerator, told its rank by Slurm itself.

    Ten minutes before the time limit the tasks get SIGTERM, save and end; submitting the script again continues,
    because it always resumes. When one task fails, Slurm ends the others, which would wait for it for hours. The run
    folder must be on storage that all machines share.

    Args:
        words: arguments of `nitro-e`, such as those of `train_arguments`.
        nodes: number of machines.
        processes: on each, one for every accelerator.
        hours: time limit.
        port: at which the first machine listens.
    """
    words = [*words] + ["--resume"] * ("--resume" not in words)
    ranks = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE="
    return f"""#!/bin/bash
#SBATCH --job-name=nitro-e
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={processes}
#SBATCH --gpus-per-node={processes}
#SBATCH --cpus-per-task=8
#SBATCH --time={hours}:00:00
#SBATCH --signal=TERM@600
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT={port}
srun --kill-on-bad-exit=1 bash -c '{ranks}{processes} exec nitro-e "$@"' nitro-e {shlex.join(words)}
"""
