"""Seeds, devices, manifests and the metrics file."""

import json
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch

from nitro_e_lite import files, runtime
from nitro_e_lite.training.metrics import MetricsWriter


def test_import_of_the_package_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import nitro_e_lite; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds, torch_loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 1.0
    assert torch_loaded == "False"


def test_package_has_no_unknown_attribute():
    import nitro_e_lite

    with pytest.raises(AttributeError, match="no_such_thing"):
        nitro_e_lite.no_such_thing  # noqa: B018


def test_seed_everything_repeats_all_generators():
    runtime.seed_everything(3)
    first = (np.random.rand(), torch.rand(2).tolist())
    runtime.seed_everything(3)
    assert first == (np.random.rand(), torch.rand(2).tolist())


def test_several_threads_work_ahead_and_keep_the_order():
    begun, meet = [], threading.Barrier(2, timeout=30)  # one thread alone would wait for ever

    def work(item):
        begun.append(item)
        if item < 2:
            meet.wait()
        time.sleep(0.001 * (10 - item))
        return item**2

    results = runtime.in_order(work, iter(range(10)), threads=2, ahead=1)
    assert next(results) == 0
    time.sleep(0.1)
    assert sorted(begun) == [0, 1, 2, 3]  # two at work, one waiting to be read, one in the place of the first
    assert list(results) == [n**2 for n in range(1, 10)]
    with pytest.raises(ZeroDivisionError):
        list(runtime.in_order(lambda n: 1 // n, range(3)))


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_seed_everything_refuses(seed, error):
    with pytest.raises(error, match="seed"):
        runtime.seed_everything(seed)


def test_a_build_for_gpus_without_a_gpu_runs_on_the_cpu(monkeypatch):
    """The usual Linux wheel of torch names an accelerator on every machine; what counts is whether one is there."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device() == torch.device("cpu")


def test_pick_device_and_dtype():
    assert runtime.pick_device("cpu") == torch.device("cpu")
    assert runtime.pick_dtype(None, torch.device("cpu")) is torch.float32
    assert runtime.pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert runtime.pick_dtype(torch.float16, torch.device("cpu")) is torch.float16


@pytest.mark.parametrize("name", ["tpuu", "cuda:99", 3.5])
def test_pick_device_names_what_is_wrong(name):
    with pytest.raises(ValueError, match="device: .*try 'cpu'"):
        runtime.pick_device(name)


@pytest.mark.parametrize("name", ["fp32", torch.int8, 16])
def test_pick_dtype_names_what_is_wrong(name):
    with pytest.raises(ValueError, match="dtype: .*bfloat16"):
        runtime.pick_dtype(name, torch.device("cpu"))


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "a"))
    assert files.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("NITRO_E_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "nitro-e-lite"


def test_shipped_folders_hold_what_their_checksums_say():
    """A card that was changed without them once made `nitro-e doctor` call a clean checkout damaged."""
    shipped = [path.parent for path in files.weights_dir().glob("*/SHA256SUMS")]
    assert {"lite", *files.STUDENTS} <= {folder.name for folder in shipped}
    for folder in shipped:
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {files.MANIFEST}
        assert there == files.check_manifest(folder).keys(), folder.name


def test_manifest_round_trip_and_damage(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    files.write_manifest(tmp_path)
    assert list(files.check_manifest(tmp_path)) == ["a.txt", "part/b.txt"]
    # an independent reader of the format agrees
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)

    (tmp_path / "part" / "b.txt").write_text("c")
    with pytest.raises(ValueError, match="b.txt: contents differ"):
        files.check_manifest(tmp_path)
    assert list(files.check_manifest(tmp_path, "a.txt")) == ["a.txt"]  # the rest may be damaged
    with pytest.raises(ValueError, match="b.txt: contents differ"):
        files.check_manifest(tmp_path, "a.txt", "part")
    (tmp_path / "part" / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match="b.txt: listed"):
        files.check_manifest(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(ValueError, match="cannot read the line"):
        files.check_manifest(tmp_path)
    digest = files.sha256_file(tmp_path / "a.txt")
    (tmp_path / "SHA256SUMS").write_text(f"nonsense of another program\n{digest} *a.txt\n")  # as a download has it
    assert files.check_manifest(tmp_path, "a.txt") == {"a.txt": digest}
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="checksum file is missing"):
        files.check_manifest(tmp_path)


def test_environment_report_is_json_and_complete():
    report = json.loads(json.dumps(runtime.environment_report()))
    assert report["packages"]["torch"] == torch.__version__
    assert {"commit", "device", "device_name", "python", "cpu_threads", "rocm"} <= set(report)
    if report["device"] == "cpu":
        assert report["attention"] == "FLASH_ATTENTION"


def test_metrics_survive_a_kill_and_a_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        for step in range(5):
            metrics.write(step=step, loss=1.0 / (step + 1))
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    assert [row["step"] for row in files.read_jsonl(path)] == [0, 1, 2, 3, 4]
    with MetricsWriter(path) as metrics:  # reopened as it is: the torn line goes, whole lines stay
        metrics.write(step=5, loss=0.1)
    assert [row["step"] for row in files.read_jsonl(path)] == [0, 1, 2, 3, 4, 5]

    with MetricsWriter(path) as metrics:
        metrics.truncate_after(2)
        metrics.write(step=3, loss=0.5)
    assert [row["step"] for row in files.read_jsonl(path)] == [0, 1, 2, 3]


ROWS = [{"a": "one\u2028two\x85three"}, {"b": None}]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n\n"])
def test_json_lines_end_at_line_feeds_alone_and_may_be_blank(tmp_path, start, end):
    text = end.join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for last in ("", end):  # with and without a final line end
        (tmp_path / "rows.jsonl").write_bytes(start + (text + last).encode())
        for rule in ("dropped", "counts"):
            assert list(files.read_jsonl(tmp_path / "rows.jsonl", torn_last_line=rule)) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": ', "rows.jsonl, line 3: no JSON"),
        (b'[{"a": 1}]', "rows.jsonl, line 3: must be a JSON object, is of type list"),
        (b"null", "rows.jsonl, line 3: must be a JSON object, is of type NoneType"),
        (b'{"a": "caf\xe9"}', "rows.jsonl, line 3: not UTF-8 .byte 0xe9 at 11"),
    ],
)
def test_json_lines_name_the_line_that_is_wrong(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    for rule in ("dropped", "counts"):
        with pytest.raises(ValueError, match=message):
            list(files.read_jsonl(path, torn_last_line=rule))
    told = []
    assert list(files.read_jsonl(path, damaged=told.append)) == [{"a": 1}, {"a": 2}]
    assert len(told) == 1 and "line 3" in str(told[0])


@pytest.mark.parametrize("torn", ['{"a": 2, "b', '{"a": "caf\xc3'])
def test_a_torn_last_line_is_dropped_in_logs_and_counts_in_input_files(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn.encode("latin-1"))
    assert list(files.read_jsonl(path)) == [{"a": 1}]
    with pytest.raises(ValueError, match="line 2: n"):
        list(files.read_jsonl(path, torn_last_line="counts"))
    files.append_jsonl(path, {"a": 3})
    assert list(files.read_jsonl(path, damaged=lambda problem: None)) == [{"a": 1}, {"a": 3}]
    files.append_jsonl(tmp_path / "new.jsonl", {"a": 1})
    files.append_jsonl(tmp_path / "new.jsonl", {"a": 2})
    assert (tmp_path / "new.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_metrics_refuse_nan(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as metrics, pytest.raises(ValueError):
        metrics.write(step=0, loss=float("nan"))


def test_metrics_on_a_full_disk_name_their_file(tmp_path):
    metrics = MetricsWriter(tmp_path / "m.jsonl")
    metrics.write(step=1)
    metrics._file.close()
    full = OSError(28, "No space left on device")
    metrics._file = mock.Mock(flush=mock.Mock(side_effect=full), close=mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="m.jsonl: could not be written .*No space left"):
        metrics.write(step=2)
    metrics.close()  # has nothing more to say
    assert [row["step"] for row in files.read_jsonl(tmp_path / "m.jsonl")] == [1]


def test_tune_cpu_flushes_denormals():
    """Products below 1e-38 become zero, in the calling thread and in those that torch starts later."""
    code = (
        "import torch; from nitro_e_lite.runtime import tune_cpu; torch.set_num_threads(2); tune_cpu(); "
        "small = torch.full((200_000,), 2e-38); print((small * 0.1).count_nonzero().item())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
