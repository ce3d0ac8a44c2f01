"""Several processes and machines: output comes back, failures are raised, stops are passed on, commands are right."""

import os
import shlex
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch

from nitro_e_lite.config import override
from nitro_e_lite.errors import UserError
from nitro_e_lite.experiments import launch as launcher
from nitro_e_lite.experiments.launch import (
    LaunchError,
    child_environment,
    launch,
    run_processes,
    slurm_script,
    torchrun_commands,
    torchrun_words,
    train_arguments,
)
from nitro_e_lite.files import run_lock
from nitro_e_lite.presets import assignments, preset
from nitro_e_lite.runtime import RunStopped, StopRequest
from nitro_e_lite.training.checkpoints import list_checkpoints

SUM = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(10.0 ** dist.get_rank())
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {total.item()}, MPLBACKEND={os.environ.get('MPLBACKEND')}")
dist.destroy_process_group()
"""


def test_two_nodes_on_this_machine(tmp_path):
    """Two torchrun agents with a process each, as two machines would run them, find each other."""
    script = tmp_path / "sum.py"
    script.write_text(SUM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = child_environment(2, "cpu", {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    lines = {0: [], 1: []}
    nodes = [
        threading.Thread(
            target=run_processes,
            args=([str(script)], 1, environment, lines[rank].append),
            kwargs={"nodes": 2, "rank": rank, "address": address},
        )
        for rank in lines
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(timeout=120)
    for rank, said in lines.items():
        assert f"rank {rank} of 2: 11.0, MPLBACKEND=None" in said, said


def test_a_failure_is_raised_with_its_last_lines(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("print('so far so good', flush=True)\nraise SystemExit('the disk is on fire')\n")
    lines = []
    with pytest.raises(LaunchError, match=r"(?s)1 processes: torchrun ended with code 1.*the disk is on fire"):
        run_processes([str(script)], 1, child_environment(1, "cpu"), lines.append, nodes=1)
    assert "so far so good" in lines and any("the disk is on fire" in line for line in lines)


def test_a_stop_that_comes_before_there_are_processes_is_heard(tmp_path):
    """torchrun takes seconds to start them; the request was noted, and nobody was ever told."""
    script = tmp_path / "waits.py"
    script.write_text("import time\ntime.sleep(600)\n")
    begin = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(RunStopped, match="Stopped by SIGTERM before the training had begun"):
        run_processes([str(script)], 2, child_environment(2, "cpu"), print)
    assert time.monotonic() - begin < 60


SAVES = """
import signal, time
asked = []
if {patient}:
    signal.signal(signal.SIGTERM, lambda *given: asked.append(1))
print("begun", flush=True)
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
print("saved", flush=True)
"""


@pytest.mark.parametrize("patient", [True, False])
def test_several_processes_that_stop_are_no_crash(tmp_path, patient):
    """torchrun got a signal too while it cleared up after them; and it counts those that SIGTERM ends as failed."""
    (tmp_path / "saves.py").write_text(SAVES.format(patient=patient))
    lines = []

    def heard(line):
        lines.append(line)
        if lines.count("begun") == 2 and line == "begun":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    run = [str(tmp_path / "saves.py")], 2, child_environment(2, "cpu"), heard
    if patient:
        run_processes(*run)
        assert lines.count("saved") == 2
    else:
        with pytest.raises(RunStopped, match="Stopped by SIGTERM before the training had begun"):
            run_processes(*run)


def test_threads_are_shared_by_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5}, raising=False)
    assert [child_environment(n, "cpu", {})["OMP_NUM_THREADS"] for n in (1, 2, 4, 9)] == ["6", "3", "1", "1"]


def test_a_closed_terminal_stops_a_run_in_processes_of_its_own(tmp_path, monkeypatch):
    """The whole way: the worker, progress streamed back, SIGHUP passed on, a checkpoint, the outcome."""
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = override(preset("base", "smoke"), ["steps=100000", "validate_every=100000", "sample_every=100000"])
    lines = []

    def hang_up():
        while not (tmp_path / "run" / "metrics.jsonl").is_file():  # until it trains
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGHUP)

    threading.Thread(target=hang_up, daemon=True).start()
    with pytest.raises(RunStopped, match="Stopped by SIGTERM after step") as stopped:
        launch(config, tmp_path / "run", device="cpu", on_line=lines.append, apart=True)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert f"after step {int(checkpoint.name.removeprefix('step-'))} of" in str(stopped.value)
    assert all(line in (tmp_path / "run" / "console.log").read_text() for line in lines)


def test_a_start_waits_for_the_run_before_to_save(tmp_path, monkeypatch):
    """An immediate restart met the orphans of the run before, and was refused or read a checkpoint too early."""
    lock, lines, slept = run_lock(tmp_path), [], []
    lock.__enter__()

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(launcher.time, "sleep", sleep)
    launcher._wait_for_the_run_before(tmp_path, lines.append)
    assert slept == [1, 1] and lines == [f"{tmp_path}: the run before is still saving; waiting for it, 180 s at most"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_each_signal_is_heard_and_passed_on_once(name):
    passed = []
    with StopRequest(lambda: passed.append(name)) as request:
        signal.raise_signal(getattr(signal, name))
        signal.raise_signal(signal.SIGTERM)  # a terminal and a launcher may both send one
    assert (request.name, passed) == (name, [name])


def test_nohup_stays_in_force_and_the_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.name is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.name == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_mistake_found_by_the_processes_is_one_here_too(tmp_path):
    config = override(preset("base", "smoke"), ["model.in_channels=3"])
    with pytest.raises(UserError, match="model.in_channels=3: the encoders in use give 8"):
        launch(config, tmp_path / "run", device="cpu", on_line=lambda line: None, apart=True)


def test_of_a_mistake_only_the_process_that_found_it_speaks(tmp_path):
    """The others lose their connection to it, and each once ended with a traceback of its own."""
    config, lines = override(preset("rewards", "smoke"), ["rewards=[[beauty, 1.0]]"]), []
    with pytest.raises(UserError, match="'beauty' is unknown"):
        launch(config, tmp_path / "run", processes=2, device="cpu", on_line=lines.append)
    assert [line for line in lines if line.startswith("Error: ")] and not [line for line in lines if "[rank1]" in line]


def test_in_place_and_refusals(tmp_path):
    with pytest.raises(ValueError, match="processes=0"):
        launch(preset("base", "smoke"), tmp_path, processes=0)
    if torch.accelerator.is_available():
        with pytest.raises(ValueError, match="accelerators; one process uses one"):
            launch(preset("base", "smoke"), tmp_path, processes=99)
    (tmp_path / "final").mkdir()
    with pytest.raises(FileExistsError, match="holds a run already"):
        launch(preset("base", "smoke"), tmp_path, device="cpu")


def test_environment_of_the_processes():
    notebook = {"MPLBACKEND": "inline", "JPY_PARENT_PID": "1", "FORCE_COLOR": "1", "PATH": "/bin"}
    environment = child_environment(2, "cpu", notebook)
    assert environment["ACCELERATE_USE_CPU"] == "true" and environment["PATH"] == "/bin"
    assert not {"MPLBACKEND", "JPY_PARENT_PID", "FORCE_COLOR"} & environment.keys()
    assert child_environment(2, "cpu", {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_commands_for_several_machines():
    config = override(preset("base", "full"), ["optimizer.lr=1e-4", "data.folders=[one dir, two]"])
    words = train_arguments(config, "runs/full", True, None)
    commands = torchrun_commands(words, nodes=4, processes=8, address="node0:29600")
    assert len(commands) == 4
    for rank, command in enumerate(commands):
        read = shlex.split(command)
        assert read == ["torchrun", "--no-python", *torchrun_words(["nitro-e", *words], 8, 4, rank, "node0:29600")[2:]]
        assert read[read.index("--node_rank") + 1] == str(rank) and read[read.index("--nnodes") + 1] == "4"
    sets = [words[k + 1] for k, word in enumerate(words) if word == "--set"]
    assert sets == assignments(config) and override(preset("base", "full"), sets) == config


@pytest.mark.parametrize(
    ("code", "restarts", "finished", "again"),
    [(0, 9, False, True), (0, 0, True, False), (1, 0, False, True), (1, 5, False, False)],
    ids=["stopped", "finished", "failed", "failed too often"],
)
def test_slurm_script(tmp_path, code, restarts, finished, again):
    """The script is run by bash with stand-ins for Slurm's two programs; each task prints what it was given."""
    words = ["train", "base", "--set", "data.folders=[one dir]", "--run-dir", "runs/my run"]
    script = slurm_script(words, nodes=2, processes=8, hours=36)
    for line in ("--nodes=2", "--ntasks-per-node=8", "--signal=TERM@600", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in script
    task = "SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16"
    told = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"
    for name, text in {
        "scontrol": 'if [ "$1" = requeue ]; then echo "again $2"; else echo node0; echo node1; fi',
        "srun": f'[ "$1 $SRUN_CPUS_PER_TASK" = "--kill-on-bad-exit=1 12" ] && shift && {task} exec "$@"',
        "nitro-e": f'echo {told}; printf "<%s>" "$@"; echo; exit {code}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if finished:
        (tmp_path / "runs" / "my run" / "final").mkdir(parents=True)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_CPUS_PER_TASK": "12", "SLURM_RESTART_COUNT": str(restarts)}
    ran = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    first, given, *rest = ran.stdout.splitlines()
    assert first == "9 1 16 8 node0 29500 12" and ran.returncode == code
    assert given == "".join(f"<{word}>" for word in [*words, "--resume"])
    assert rest == ["again 77"] * again
