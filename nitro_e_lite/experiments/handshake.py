"""One of the processes that try the exchange of a run before the run: do they meet, and how fast do they add?

`preflight.py` starts as many as the run will have, in the same way. Each adds its rank to those of the others, then as
many numbers as the gradient of the full model has (a few on a CPU). A process that waits longer than `LIMIT` seconds
says where and ends, so that a network that does not work costs a minute and not the hours of a run's own patience.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 120  # seconds in all, of which the processes wait for each other at most the half
GRADIENT = 310_000_000  # float32 numbers of the full model in stage 1, about
SAYS = "handshake "  # what the line of the first process begins with


def main() -> None:
    """Meets the others, adds, and prints what was found as one line of JSON."""
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
    rank, begin = int(os.environ["LOCAL_RANK"]), time.perf_counter()
    device = torch.device("cpu")
    if torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true":
        torch.accelerator.set_device_index(rank)
        device = torch.accelerator.current_accelerator()
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=LIMIT // 2))
    world = dist.get_world_size()
    total = torch.tensor([float(dist.get_rank())], device=device)
    dist.all_reduce(total)
    right, met = total.item() == world * (world - 1) / 2, time.perf_counter() - begin
    gradient = torch.ones(GRADIENT if device.type != "cpu" else 1_000_000, device=device)
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
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
