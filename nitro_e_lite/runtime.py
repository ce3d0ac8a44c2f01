"""Seeds, devices, folders, the environment report and the metrics file.

What every other module needs and none should decide for itself: where things live on disk, which device and
number type a run uses, how a file's contents are checked, and how a long run writes what it measured so that
a killed run can carry on. The rule for the metrics file: one JSON object a line, flushed as soon as it is
written, so that a reader (or a resumed run) never needs more than the last whole line.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend

PACKAGE_DIR = Path(__file__).resolve().parent
MANIFEST = "SHA256SUMS"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORTED_PACKAGES = (
    "torch diffusers transformers tokenizers accelerate peft safetensors numpy matplotlib "
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
        raise TypeError(f"seed: expected an integer, got {seed!r} ({type(seed).__name__})")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed} is outside the range 0 to 2**32 - 1")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} is not usable on this machine ({reason}); try 'cpu'") from None
    return device


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number type of the weights: the one named, else bfloat16 on a GPU that has it, else float32.

    Raises:
        ValueError: for a name other than `float32`, `bfloat16`, `float16`.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    dtype = DTYPES.get(name, name) if isinstance(name, str) else name
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}")
    return dtype


def weights_dir() -> Path:
    """Folder of the weights shipped inside the package."""
    return PACKAGE_DIR / "weights"


def cache_dir() -> Path:
    """Folder for what can be made again (latent caches); `NITRO_E_CACHE` moves it. Not created here."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NITRO_E_CACHE") or Path(base) / "nitro-e-lite")


def repo_root() -> Path | None:
    """The checkout this package runs from, or None when it is installed elsewhere."""
    root = PACKAGE_DIR.parent
    return root if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


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


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | Path) -> Path:
    """Writes `SHA256SUMS` (the format of `sha256sum`) for every file below `folder` and returns its path."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    lines = [f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    path = folder / MANIFEST
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def check_manifest(folder: str | Path, *parts: str) -> dict[str, str]:
    """Compares the files named in `folder/SHA256SUMS` with their checksums.

    Args:
        folder: holds the manifest.
        *parts: names of files and folders in it; only they are compared. All when none is given.

    Returns:
        Relative path -> sha256.

    Raises:
        FileNotFoundError: the manifest, or a file it names, is missing.
        ValueError: a file's contents differ, or a line cannot be read.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checksum file is missing")
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ValueError(f"{path}: cannot read the line {line!r}; expected '<sha256>  <file>'")
        if parts and name.split("/")[0] not in parts:
            continue
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: listed in {MANIFEST} but missing; get the folder again")
        if sha256_file(folder / name) != digest:
            raise ValueError(f"{folder / name}: contents differ from {MANIFEST}; get the file again")
        sums[name] = digest
    return sums


def environment_report() -> dict[str, Any]:
    """What a result depends on besides its parameters: versions, device, threads, commit. JSON-ready."""
    device = pick_device()
    return {
        "nitro_e_lite": importlib.metadata.version("nitro-e-lite"),
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
    """Which implementation torch chooses for fused attention in training on ``device``.

    A GPU that answers "MATH" computes attention slowly and with much memory: on ROCm that means a build without
    kernels for this GPU.
    """
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


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file; a last line that was cut off by a kill is left out."""
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class MetricsWriter:
    """Appends one JSON object a line to `path`, flushed at once; safe to reopen after a kill.

    Args:
        path: the JSONL file; its folder is made when missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(list(read_jsonl(self.path)) if self.path.is_file() else [])

    def write(self, **row: Any) -> None:
        """Writes one row; values must be JSON types, numbers finite.

        Raises:
            ValueError: for a value that is NaN or infinite.
            TypeError: for a value JSON has no form for.
            OSError: it could not be written, for example because the disk is full.
        """
        text = json.dumps(row, allow_nan=False) + "\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: could not be written ({error}); what was written before is intact") from error

    def truncate_after(self, step: int) -> None:
        """Drops the rows whose `step` lies after `step`: call it when a run resumes from that step."""
        self._file.close()
        self._rewrite([row for row in read_jsonl(self.path) if row.get("step", 0) <= step])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file's contents in one atomic move, then reopens it for appending."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # every row was flushed; one that could not be was reported
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
