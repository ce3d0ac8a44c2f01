"""Seeds, devices, number types, the environment report, and stopping on request.

What every other module needs and none should decide for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend

from nitro_e_lite import __version__
from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.files import repo_root

Item, Made = TypeVar("Item"), TypeVar("Made")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

REPORTED_PACKAGES = (
    "torch diffusers transformers tokenizers accelerate peft torchao safetensors numpy matplotlib "
    "jupyterlab ipywidgets papermill nbval"
).split()


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (all devices).

    Args:
        seed: integer in [0, 2**32).

    Raises:
        TypeError, ValueError: when `seed` is no integer or outside that range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidType(f"seed: expected an integer, got {seed!r} ({type(seed).__name__})")
    if not 0 <= seed < 2**32:
        raise InvalidValue(f"seed: {seed} is outside the range 0 to 2**32 - 1")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator(seed: int, step: int, purpose: str, row: int = 0) -> torch.Generator:
    """The random stream for one purpose of one training step: a function of its arguments alone.

    Streams of other seeds, steps, purposes or rows have nothing to do with each other. Noise is drawn row by row of the
    global batch, so that a process draws its own rows only and any number of processes sees the same numbers. (A CPU
    generator of torch keeps the lower 32 bits of its seed, so the four numbers are hashed and not added up.)

    Args:
        seed: of the run.
        step: from 0; for the order of an epoch the number of the epoch.
        purpose: what is drawn, such as "noise".
        row: of the global batch.

    Returns:
        A generator on the CPU.
    """
    name = f"{seed} {step} {purpose} {row}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big"))


def tune_cpu() -> None:
    """Settings that make training on a CPU faster without changing what it learns.

    Numbers below 1e-38 are flushed to zero: processors compute with them many times slower, and gradients are full of
    them. Threads inherit the setting when they start, so this comes before torch's first parallel operation; those that
    run already keep computing with such numbers. The C library (glibc) keeps the memory of freed tensors: by default it
    hands back every block above 32 MB, and the kernel then clears each page of the next one anew. Elsewhere than on
    Linux the second part does nothing.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD in <malloc.h>
        mallopt(option, value)


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device to run on: the one named, or the first accelerator there is, or the CPU.

    Raises:
        ValueError: when the name means nothing to torch or that device is not on this machine.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise NotImplementedError("its tensors hold no numbers")
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidValue(f"device: {name!r} is not usable on this machine ({reason}); try 'cpu'") from None
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` of the host on `device`, without waiting until the device has done what it was given before.

    Apple's GPUs are waited for: they have been seen to read memory that was freed in the meantime.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=device.type != "mps")


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number type of the weights: the one named, else bfloat16 on a GPU that has it, else float32.

    Raises:
        ValueError: for a name other than `float32`, `bfloat16`, `float16`.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    dtype = DTYPES.get(name, name) if isinstance(name, str) else name
    if dtype not in DTYPES.values():
        raise InvalidValue(f"dtype: {name!r} is not one of {', '.join(DTYPES)}")
    return dtype


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are, as torchrun tells them; 0 of 1 without a launcher.

    Raises:
        ValueError: one was told without the other, or they make no sense: a part of the work would be left undone.
    """
    told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if told in (["", ""], ["", "1"]):
        return 0, 1
    with contextlib.suppress(ValueError):
        rank, world = (int(text) for text in told)
        if 0 <= rank < world:
            return rank, world
    raise InvalidValue(
        f"RANK={told[0]}, WORLD_SIZE={told[1]}: torchrun sets both, RANK from 0 to WORLD_SIZE - 1; unset them for one "
        "process"
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[Item], Made], items: Iterable[Item], threads: int | None = None, ahead: int = 0
) -> Iterator[Made]:
    """What `work` makes of each item, in their order, by several threads ahead of who reads it.

    Args:
        work: is called by several threads at once.
        items: read as they are needed.
        threads: how many; None: one for each core, four at most, since each may have a team of its own in torch.
        ahead: items that may wait to be read, besides one for each thread.
    """
    threads = threads or min(4, cores())
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead + threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def git_commit() -> str | None:
    """Short hash of the checkout's commit, None outside a checkout or without git."""
    root = repo_root()
    if root is None:
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment_report() -> dict[str, Any]:
    """What a result depends on besides its parameters: versions, device, threads, commit. JSON-ready."""
    device = pick_device()
    return {
        "nitro_e_lite": __version__,  # of the code that runs: a copied checkout is not installed
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": device_name(device),
        "attention": attention_backend(device),
        "rocm": torch.version.hip,
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: package_version(name) for name in REPORTED_PACKAGES},
    }


def attention_backend(device: torch.device) -> str:
    """Which implementation torch chooses for fused attention in training on `device`.

    A GPU that answers "MATH" computes attention slowly and with much memory: on ROCm that means a build without
    kernels for this GPU. Of Apple's GPUs torch cannot be asked.
    """
    if device.type not in ("cpu", "cuda", "xpu"):
        return "not known"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query = torch.empty(1, 2, 256, 32, dtype=dtype, device=device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(query, query, query)).name


def package_version(name: str) -> str | None:
    """Installed version of a distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """What a person calls the device: the GPU's product name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_used(device: torch.device, reserved: bool = True) -> int:
    """Bytes: the most on the accelerator since `forget_memory`, or what the process has in main memory on a CPU.

    Args:
        device: where.
        reserved: with what the allocator holds besides tensors, as a run needs it; without, what tensors took.
    """
    if device.type in ("cuda", "xpu"):
        return (torch.accelerator.max_memory_reserved if reserved else torch.accelerator.max_memory_allocated)(device)
    return psutil.Process().memory_info().rss


def forget_memory(device: torch.device) -> None:
    """Gives back what nobody holds any more, and lets `memory_used` begin again."""
    gc.collect()
    if device.type in ("cuda", "xpu"):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def memory_there(device: torch.device) -> int:
    """Bytes of the accelerator's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def check_memory(field: str, needed: float) -> None:
    """Refuses what cannot fit into the machine's memory, before any work.

    Args:
        field: what asks for so much, as "batch=1000".
        needed: bytes.

    Raises:
        ValueError: more than there is.
    """
    there, needed = psutil.virtual_memory().total, min(needed, 1e30)  # integers may be larger than any float
    if needed > there:
        raise InvalidValue(f"{field}: needs about {needed / 1e9:,.0f} GB of memory; there are {there / 1e9:,.0f}")


class RunStopped(Exception):
    """A run was asked to stop and has written its checkpoint; the message says how to continue."""


class StopRequest:
    """Listens for SIGTERM, SIGINT and SIGHUP while a run lasts; `name` is the signal's name once one came.

    The signal only leaves a note: the step in progress is finished, then the loop sees the note and saves. Signals that
    follow are ignored, because a launcher and a terminal may both send one. A closed terminal sends SIGHUP; under
    `nohup`, which ignores it, it stays ignored, and Windows has none. Outside of the main thread, where Python delivers
    no signals, nothing is listened for.

    Args:
        action: also called when the first signal comes.
    """

    def __init__(self, action: Callable[[], None] = lambda: None):
        self.name: str | None = None
        self._action = action

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)  # not on Windows
            heard = [signal.SIGTERM, signal.SIGINT]
            heard += [hangup] if hangup and signal.getsignal(hangup) is not signal.SIG_IGN else []
            for number in heard:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            self._action()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
