"""Settings and fixtures every test shares. Tests run offline, on the CPU, without touching the checkout."""

import os
import shutil
import signal
import sys
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: threads of one would wait on those of another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.pop("COLUMNS", None)  # rich would keep the width that it finds when it is imported

# Tests send these signals; nohup and shells in the background have told this process to ignore them.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

if sys.platform == "darwin":  # a Mac's accelerator rounds otherwise than the CPU, and virtual ones have little memory
    import torch

    torch.accelerator.current_accelerator = lambda check_available=False: None

LITTLE_TEXT_MUCH_WORK = ("test_overfit.py", "test_lesson_mutations.py", "test_cpu_kernels.py", "test_train.py")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Files go to processes whole, in the order below; without pytest-xdist all run in this one."""
    option = config.option
    if hasattr(option, "numprocesses") and "PYTEST_XDIST_WORKER" not in os.environ:
        option.numprocesses = "auto" if option.numprocesses is None else option.numprocesses
        option.dist = "loadfile" if option.dist == "no" else option.dist
        option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """All tests together: a process for each core, up to four. Named files: one, so that `-s` shows what they print."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if named else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    """Long files come first (`--no-loadscope-reorder`): one at the end would keep a single process busy.

    Those with slow tests, then notebooks, then the rest, the more text the earlier.
    """
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("browser")}
    long |= {item.path for item in items if item.path.name in LITTLE_TEXT_MUCH_WORK}
    paths = {item.path for item in items}
    places = {path: (path not in long, path.suffix != ".ipynb", -path.stat().st_size) for path in paths}
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(scope="session")
def tiny_pipeline():
    """Shared by all tests: do not change its weights."""
    from tiny import build_tiny_pipeline  # here, not above: the tests of structure need no torch

    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(monkeypatch, tmp_path, tiny_folder):
    """The tiny pipeline in the place of the shipped weights."""
    from nitro_e_lite import files

    shutil.copytree(tiny_folder, tmp_path / "lite")
    files.write_manifest(tmp_path / "lite")
    monkeypatch.setattr(files, "weights_dir", lambda: tmp_path)
    return tmp_path / "lite"


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A tiny teacher with its encoders, as a folder that both `load_pipeline` and `load_encoders` read."""
    from tiny import save_tiny_teacher

    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    """That teacher: do not change its weights."""
    from nitro_e_lite.inference.loading import load_pipeline

    return load_pipeline(teacher_folder, "cpu")


@pytest.fixture(scope="session")
def cache(teacher, tmp_path_factory):
    """What it drew for students."""
    from tiny import draw

    folder = tmp_path_factory.mktemp("drawn") / "set"
    draw(teacher, folder).run()
    return folder
