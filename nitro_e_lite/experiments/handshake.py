"""One of the processes that try the exchange of a run before the run: do they meet, and how fast do they add?

`preflight.py` starts as many as the run will have, in the same way. Each adds its rank to those of the others, then as
many numbers as the gradient of the full model has (a few on a CPU). A process that has waited for `LIMIT` seconds says
in what and ends, so that a network that does not work costs a minute and not the hours of a run's own patience.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 60  # seconds in all
GRADIENT = 310_000_000  # float32 numbers of the full model in stage 1, about
SAYS, GIVES_UP = "handshake found ", "handshake timed out: "  # what lines begin with


def main() -> None:
    """Meets the others, adds, and prints what was found as one line of JSON."""
    faulthandler.dump_traceback_later(2 * LIMIT, exit=True, file=sys.__stderr__)  # where no thread of Python's can run
    rank, begin, doing = int(os.environ["LOCAL_RANK"]), time.perf_counter(), ["meeting the others"]
    alarm = threading.Timer(LIMIT, lambda: _give_up(doing[-1]))
    alarm.daemon = True
    alarm.start()
    device = torch.device("cpu")
    if torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true":
        torch.accelerator.set_device_index(rank)
        device = torch.accelerator.current_accelerator()
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=3 * LIMIT))  # later than the alarm, which says more
    world = dist.get_world_size()
    doing.append(f"the first all-reduce over {backend}")
    total = torch.tensor([float(dist.get_rank())], device=device)
    dist.all_reduce(total)
    right, met = total.item() == world * (world - 1) / 2, time.perf_counter() - begin
    gradient = torch.ones(GRADIENT if device.type != "cpu" else 1_000_000, device=device)
    doing.append(f"an all-reduce of {gradient.nbytes / 1e6:,.0f} MB over {backend}")
    seconds = []
    for _ in range(3):  # the first one builds the rings
        begin = time.perf_counter()
        dist.all_reduce(gradient)
        gradient[0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    found = {"backend": backend, "world": world, "right": right, "met": met, "seconds": min(seconds)}
    found["sent"] = 2 * (world - 1) / world * gradient.nbytes / min(seconds)  # bytes/s of each, in a ring
    if dist.get_rank() == 0:
        print(SAYS + json.dumps(found), flush=True)
    dist.destroy_process_group()
    alarm.cancel()
    faulthandler.cancel_dump_traceback_later()


def _give_up(doing: str) -> None:
    """Ends this process, whatever its main thread waits in."""
    who = f"process {os.environ.get('RANK')} on {socket.gethostname()}"
    print(f"{GIVES_UP}{who} waited {LIMIT} s in {doing}", flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
