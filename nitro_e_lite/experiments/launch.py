"""Starting a training run: here, in several processes, or on several machines.

One process trains in place, or apart from this one where this one may be killed. For more, torchrun is started as a
child: it starts the processes, tells each its rank, and ends all when one fails. Their output goes to `console.log` in
the folder of the run and is passed on from there line by line, into the terminal or the notebook cell that asked; a
failure is raised here with its last lines. A child of a notebook would inherit settings that are meant for the kernel
(`MPLBACKEND` above all); they are taken away. On a machine without accelerator `ACCELERATE_USE_CPU` is set, because
accelerate would otherwise make a separate run of every process; the engine checks that all found each other.

**Stops.** SIGTERM, Ctrl-C or a closed terminal is passed on to the training processes themselves, not to torchrun,
which would kill them after half a minute. They save and end well, and so does torchrun. A launcher that is killed
outright, as the kernel of a notebook is when papermill goes, cannot pass anything on: so each process holds the end of
a pipe whose other end is here. When it closes, the process asks itself to stop, and saves (`worker.py`). A start that
comes too soon waits for the last run to be gone.

Several machines need a scheduler or a person on each: `torchrun_commands` and `slurm_script` print what to run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil
import torch

from nitro_e_lite.config import RunConfig, to_dict
from nitro_e_lite.errors import InvalidValue, Unusable
from nitro_e_lite.files import run_lock
from nitro_e_lite.presets import assignments
from nitro_e_lite.runtime import RunStopped, StopRequest, cores

NOTEBOOK_SETTINGS = ("MPLBACKEND", "JPY_PARENT_PID", "FORCE_COLOR", "CLICOLOR_FORCE")
TORCHRUN_SAYS = "failed (exitcode"  # where torchrun's own report of a failure begins; what counts stands before it
LAST_LINES = 25  # of the output that a failure repeats
WORKER = "nitro_e_lite.experiments.worker"  # what each process runs; it imports every stage, this module none
LOOK = 0.1  # seconds between looks at what the processes have written
PATIENCE = 180  # seconds that a start waits for the run before it to save and end
PORT = 29500
RESTARTS = 3  # on accelerators: a process that hangs is ended by its neighbours' patience, and all go on from there
RETRIES = 5  # times that a Slurm job which failed goes back into the queue


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
    apart: bool = False,
) -> Path:
    """Trains on this machine and returns the folder with the final weights.

    Args:
        config: what to train: of any stage in `worker.RUNS`.
        run_dir: folder of the run.
        processes: more than 1 are started through torchrun, one for each device.
        resume: continue the run in `run_dir`; one that is still saving there is waited for.
        device: "cpu", "cuda" or None for the best there is.
        on_line: gets each line that the processes print.
        apart: a single process is one of its own too, which outlives this one for as long as it needs to save.

    Raises:
        ValueError: fewer than one process, or more than there are accelerators.
        LaunchError: a process failed.
        RunStopped: the run was asked to stop and has saved.
    """
    check_processes(processes, device)
    if resume and os.environ.get("RANK", "0") == "0":  # the others of a run that torchrun has started wait for this one
        _wait_for_the_run_before(Path(run_dir), on_line)
    if processes == 1 and not apart:
        from nitro_e_lite.experiments import worker

        return worker.RUNS[worker.run_name(config)][1](config, run_dir, resume, device)
    with tempfile.TemporaryDirectory() as folder:
        request, outcome = Path(folder) / "request.json", Path(folder) / "outcome.json"
        asked = {"settings": type(config).__name__, "config": to_dict(config), "outcome": str(outcome)}
        asked |= {"run_dir": str(run_dir), "resume": resume, "device": device}
        request.write_text(json.dumps(asked), encoding="utf-8")
        words = ["-m", WORKER, str(request)]
        try:
            environment = child_environment(processes, device)
            run_processes(words, processes, environment, on_line, log=Path(run_dir) / "console.log")
        except LaunchError:
            ended = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
            if "mistake" in ended:
                raise InvalidValue(ended["mistake"]) from None
            if "stopped" in ended:
                raise RunStopped(ended["stopped"]) from None
            raise
        ended = json.loads(outcome.read_text(encoding="utf-8"))
    if "stopped" in ended:
        raise RunStopped(ended["stopped"])
    return Path(ended["final"])


def _wait_for_the_run_before(run_dir: Path, on_line: Callable[[str], None]) -> None:
    """Until nobody trains in the folder, `PATIENCE` at most: the engine then says that somebody does."""
    if not (run_dir / ".lock").is_file():
        return
    for second in range(PATIENCE):
        try:
            with run_lock(run_dir):
                return
        except Unusable:
            if not second:
                on_line(f"{run_dir}: the run before is still saving; waiting for it, {PATIENCE} s at most")
            time.sleep(1)


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
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if device == "cpu" or (device is None and not torch.accelerator.is_available()):
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def torchrun_words(
    words: Sequence[str],
    processes: int,
    nodes: int = 1,
    rank: int = 0,
    address: str = "",
    restarts: int = RESTARTS,
) -> list[str]:
    """Arguments of Python that start `words` through torchrun on one machine.

    Args:
        words: what each process runs: a script, `-m module` or `--no-python program`, and its arguments.
        processes: on each machine.
        nodes: number of machines.
        rank: of this machine, from 0.
        address: `host:port` of machine 0; needed for more than one.
        restarts: of all processes when one has failed, on one machine with accelerators.
    """
    place = ["--standalone"]
    if torch.accelerator.is_available() and nodes == 1:
        place += ["--max-restarts", str(restarts)]
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
    log: Path | None = None,
    **machines,
) -> None:
    """Runs `words` in one process or several and passes their output on.

    Their standard input is a pipe that nothing is written to; it closes when this process ends, however it does.

    Args:
        words: see `torchrun_words`.
        processes: on this machine.
        environment: of the processes.
        on_line: gets each line of output.
        log: file that the output is added to; None: a temporary one.
        **machines: `nodes`, `rank`, `address` and `restarts` for `torchrun_words`; without them one process needs no
            torchrun.

    Raises:
        LaunchError: a process ended with an error.
    """
    alone = processes == 1 and not machines
    command = [sys.executable, *(words if alone else torchrun_words(words, processes, **machines))]
    last: deque[str] = deque(maxlen=LAST_LINES)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "console.log" if log is None else log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as written, open(log, encoding="utf-8", errors="replace") as read:
            read.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the processes once, through here
            )
            told: set[int] = set()
            with StopRequest(lambda: _terminate_children(process, alone, told)) as request:

                def look() -> None:  # torchrun may have had no children yet, or has started others
                    if request.name:
                        _terminate_children(process, alone, told)

                try:
                    for line in _lines_until_the_end(process, read, look):
                        failed = failed or TORCHRUN_SAYS in line
                        if not failed:
                            last.append(line)
                        on_line(line)
                finally:
                    process.stdin.close()
                    if process.poll() is None:
                        _terminate_children(process, alone, set())
                        process.terminate()
                        process.wait()
    early = process.returncode == -signal.SIGTERM  # a process on its own, or torchrun before it had any
    if not alone and process.returncode:  # it counts workers that SIGTERM ended as failed
        early = process.pid in told or not any(line.startswith("Traceback") for line in last)
    if request.name and early:
        raise RunStopped(f"Stopped by {request.name} before the training had begun.")
    if process.returncode:
        who = f"{processes} processes: torchrun" if not alone else "the process"
        raise LaunchError(f"{who} ended with code {process.returncode}. Last lines:\n" + "\n".join(last))


def _lines_until_the_end(process: subprocess.Popen, file: TextIO, look: Callable[[], None]) -> Iterator[str]:
    """The lines that a process writes to `file`, until it has ended; a progress bar's carriage return ends one too.

    `look` is called in between.
    """
    rest = ""
    while True:
        look()
        ended = process.poll() is not None  # asked first: what was written before is read after
        *lines, rest = re.split(r"[\r\n]", rest + file.read())
        yield from (line.rstrip() for line in lines + [rest] * ended if line.strip())
        if ended:
            return
        time.sleep(LOOK)


def _terminate_children(process: subprocess.Popen, alone: bool, told: set[int]) -> None:
    """SIGTERM to the training processes that torchrun has started, to itself before there are any, or to the only one.

    Those in `told` have had it, and save by now. torchrun is left alone once its processes have had it: it lives longer
    than they do, and a signal would make a crash of a stop in good order.
    """
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for one in [first] if alone else first.children() or ([] if told else [first]):
            if one.pid not in told:
                told.add(one.pid)
                one.terminate()


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

    Ten minutes before the time limit the tasks get SIGTERM, save and end; the job then puts itself back into the queue,
    and goes on there, because it always resumes. So it does after a failure, of a node or of its own, while it has
    been there fewer than `RETRIES` times: what fails every time is not repeated for ever. When one task fails, Slurm
    ends the others, which would wait for it for hours. The run folder must be on storage that all machines share.

    Args:
        words: arguments of `nitro-e`, such as those of `train_arguments`.
        nodes: number of machines.
        processes: on each, one for every accelerator.
        hours: time limit.
        port: at which the first machine listens.
    """
    words = [*words] + ["--resume"] * ("--resume" not in words)
    final = shlex.quote(f"{words[words.index('--run-dir') + 1]}/final") if "--run-dir" in words else "final"
    ranks = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE="
    return f"""#!/bin/bash
#SBATCH --job-name=nitro-e
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={processes}
#SBATCH --gpus-per-node={processes}
#SBATCH --cpus-per-task=8
#SBATCH --time={hours}:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT={port}
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-8}}
export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS  # since Slurm 22.05 srun does not take it over by itself
srun --kill-on-bad-exit=1 bash -c '{ranks}{processes} exec nitro-e "$@"' nitro-e {shlex.join(words)}
code=$?
# not finished: stopped in good order, or failed; again, but not for ever
if [ ! -d {final} ] && {{ [ $code -eq 0 ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt {RETRIES} ]; }}; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
