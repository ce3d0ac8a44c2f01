"""Where the time of a run goes on each process, and the sign that it goes on.

A step waits for data, waits for the other processes while gradients are averaged, and computes the rest of the time.
All three are measured on every process and gathered once a logging interval. They give a straggler a name: everyone
else waits for it in the averaging, so it is the process that computes and reads longest and waits least.

On an accelerator the host only queues work. Averaging is timed there between two events of the device, which costs no
step its place in the queue, and is read when the host waits for the device anyway.

Each process also keeps a small file in `RUN_DIR/heartbeat`, written anew every few seconds while steps end: a process
whose file has grown old hangs, and `find RUN_DIR/heartbeat -mmin +10` names it together with its machine.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from nitro_e_lite.files import write_atomically

WAITS = ("data", "communication")  # what is measured; the rest of a step is "compute"
BEAT = 10.0  # seconds between two signs of life


class Clock:
    """Seconds that this process has waited, by what for.

    Args:
        device: of the run; the CPU when None.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self._seconds = dict.fromkeys(WAITS, 0.0)
        self._events: list[tuple[torch.Event, torch.Event]] = []  # around communication, on the device

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Adds what is done within to `what`: "data" on the host, "communication" on the device."""
        if what == "communication" and self.device.type != "cpu":
            begin, end = (torch.Event(device=self.device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        begin = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """The seconds since they were last taken; the device must have caught up."""
        taken = dict(self._seconds)
        taken["communication"] += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = dict.fromkeys(WAITS, 0.0), []
        return taken


def step_times(waits: dict[str, float], seconds: float, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step by rank: "data", "communication" and "compute"; all processes call it.

    Args:
        waits: of this process over some steps, from `Clock.take`.
        seconds: that those steps took.
        steps: how many.
        device: of the run.
    """
    mine = [waits[name] / steps for name in WAITS]
    mine.append(max(0.0, seconds / steps - sum(mine)))
    rows = torch.tensor(mine, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = rows.new_empty(dist.get_world_size(), len(mine))
        dist.all_gather(list(gathered.unbind()), rows)
        rows = gathered
    return {name: rows.view(-1, len(mine))[:, k].tolist() for k, name in enumerate((*WAITS, "compute"))}


def straggler(times: dict[str, list[float]]) -> int:
    """The rank for which the others wait: the one that reads and computes longest."""
    busy = [data + compute for data, compute in zip(times["data"], times["compute"], strict=True)]
    return busy.index(max(busy))


def forget_others(run_dir: Path, world: int) -> None:
    """Removes the heartbeats of more processes than there are now: they would seem to hang."""
    for path in (run_dir / "heartbeat").glob("rank-*.json"):
        if path.stem.removeprefix("rank-").isdecimal() and int(path.stem.removeprefix("rank-")) >= world:
            path.unlink(missing_ok=True)


class Heartbeat:
    """A file that says which step this process has done, and when.

    Args:
        run_dir: of the run.
        rank: of this process.
    """

    def __init__(self, run_dir: Path, rank: int):
        self.path, self._next = run_dir / "heartbeat" / f"rank-{rank:05d}.json", 0.0

    def beat(self, step: int) -> None:
        """Writes it anew when it is time to; a disk that cannot take it is no reason to stop."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + BEAT
        facts = {"step": step, "time": round(time.time(), 1), "host": socket.gethostname(), "pid": os.getpid()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(facts) + "\n")
        except OSError:
            pass
