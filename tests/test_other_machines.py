"""What macOS and Windows do in another way, simulated: locks, folders, signals, memory, processors, accelerators."""

import ctypes
import os
import signal
import types
from pathlib import Path

import pytest
import torch
import yaml

from nitro_e_lite import files, runtime
from nitro_e_lite.cli.data import local_device
from nitro_e_lite.course.demo_server import worker_threads
from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.fp8_ladder import choose_rung

ROOT = Path(__file__).resolve().parents[1]


def test_windows_locks_a_folder(monkeypatch, tmp_path):
    held = set()

    def locking(handle, mode, size):
        file = os.fstat(handle).st_ino
        if file in held:
            raise PermissionError(13, "Permission denied")
        held.add(file)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    with files.run_lock(tmp_path), files.share_lock(tmp_path, 0, 2), files.share_lock(tmp_path, 1, 2):
        with pytest.raises(RuntimeError, match="another process is writing there"), files.run_lock(tmp_path):
            pass


def test_windows_flushes_files_and_no_folders(monkeypatch, tmp_path):
    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(files, "WINDOWS", True)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest: opened.append((path, flags)) or real(path, flags, *rest))
    files._fsync(tmp_path)
    files._fsync(tmp_path / "a")
    assert opened == [(tmp_path / "a", os.O_RDWR)]


def test_a_run_stops_where_there_is_no_hangup(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with runtime.StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
    assert request.name == "SIGTERM"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_closes_stops_a_run_unless_nohup_says_otherwise():
    before = signal.getsignal(signal.SIGHUP)
    with runtime.StopRequest() as request:
        signal.raise_signal(signal.SIGHUP)
    assert request.name == "SIGHUP"
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with runtime.StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
        assert request.name is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])  # no such library, no mallopt, Windows
def test_another_c_library_is_left_alone(monkeypatch, error):
    def fails(name):
        raise error("elsewhere")

    monkeypatch.setattr(ctypes, "CDLL", fails)
    runtime.tune_cpu()


def test_a_processor_has_a_name_without_proc(monkeypatch):
    def gone(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", gone)
    assert runtime.device_name(torch.device("cpu"))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert worker_threads() >= 1


def test_products_without_onednn_are_torchs(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "ONEDNN", False)
    layer, tokens = torch.nn.Linear(64, 32), torch.randn(4, 300, 64)
    with torch.no_grad():
        found = cpu_kernels.linear(tokens, layer.weight, layer.bias)
        torch.testing.assert_close(found, layer(tokens))


def test_apple_silicon_takes_the_place_of_cuda(monkeypatch):
    mps, real = torch.device("mps"), torch.empty
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: mps)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **more: real(*size, **more))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runtime.pick_device() == mps and local_device(None) == "mps"
    assert runtime.pick_dtype(None, mps) == torch.float32
    assert runtime.device_name(mps)  # asks no CUDA
    choice = choose_rung(mps)
    assert choice.rung and choice.reasons


def test_the_workflow_runs_everywhere_on_torchs_cpu_build():
    workflow = yaml.safe_load(next((ROOT / ".github" / "workflows").glob("*.yml")).read_text(encoding="utf-8"))
    matrix, steps = (workflow["jobs"]["tests"][name] for name in ("strategy", "steps"))
    assert {name.partition("-")[0] for name in matrix["matrix"]["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert workflow["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu")
    assert any(step.get("with", {}).get("cache") == "pip" for step in steps)
