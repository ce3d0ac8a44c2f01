"""The runbook: commands as they are printed, signals to papermill, what is looked at first, the canary."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from lesson_cells import write_stage_alone
from typer.testing import CliRunner

from nitro_e_lite.cli.app import app
from nitro_e_lite.config import override, to_dict
from nitro_e_lite.course import notebooks
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch
from nitro_e_lite.errors import Unusable
from nitro_e_lite.experiments import canary, handshake, launch, preflight, stage_run
from nitro_e_lite.model.flops import build_on_meta
from nitro_e_lite.presets import preset
from nitro_e_lite.stages.pretrain import Pretrain
from nitro_e_lite.training.checkpoints import list_checkpoints
from nitro_e_lite.training.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
CELL = """from pathlib import Path
from nitro_e_lite.config import override
from nitro_e_lite.experiments.launch import launch
from nitro_e_lite.presets import preset
never = [f"{name}=100000" for name in ("steps", "validate_every", "sample_every", "checkpoint_every")]
launch(override(preset("base", "smoke"), never), Path("run"), resume=True, device="cpu", apart=True)"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One latent cache for the whole file, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NITRO_E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Signals


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with a notebook that trains for ever; each case goes on where the one before was stopped."""
    folder = tmp_path_factory.mktemp("clone")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": CELL}
    book = {"cells": [cell], "metadata": notebooks.METADATA, "nbformat": 4, "nbformat_minor": 5}
    (folder / "long.ipynb").write_text(json.dumps(book))
    return folder


def trained(run: Path) -> int:
    path = run / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["step"] if path.is_file() and path.read_text() else 0


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "target"),
    [("SIGTERM", "papermill"), ("SIGINT", "papermill"), ("SIGHUP", "papermill"), ("SIGTERM", "worker")],
)
def test_a_signal_ends_in_a_checkpoint_without_orphans_and_the_same_command_continues(clone, name, target):
    """Papermill and its kernel die at once; the training once ran on for half a minute and died without saving."""
    run = clone / "run"
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["papermill", "long.ipynb", "out.ipynb", "--no-progress-bar"]
    log = (clone / "papermill.log").open("w")
    papermill = subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=subprocess.STDOUT)
    begun = max(saved, default=0)
    until(lambda: trained(run) > begun or papermill.poll() is not None)
    family = psutil.Process(papermill.pid).children(recursive=True)
    (worker,) = (one for one in family if launch.WORKER in one.cmdline())
    (papermill if target == "papermill" else worker).send_signal(getattr(signal, name))
    assert psutil.wait_procs(family, timeout=60)[1] == [], "an orphan"
    assert papermill.wait(60) != 0
    now = int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    assert now == trained(run) > begun, "the last step is saved, and it went on from the one before"


def test_a_kernel_that_dies_over_two_processes_leaves_a_checkpoint_and_no_orphan(clone):
    """The pipe to torchrun closes; its workers have inherited it."""
    script = CELL.replace('"run"', '"two"').replace("apart=True", "processes=2")
    environment, run = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, clone / "two"
    log = (clone / "kernel.log").open("w")
    kernel = subprocess.Popen([sys.executable, "-c", script], cwd=clone, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: trained(run) > 1 or kernel.poll() is not None, seconds=300)  # three processes import torch
        family = psutil.Process(kernel.pid).children(recursive=True)
        assert sum(launch.WORKER in one.cmdline() for one in family) == 3, "torchrun and two workers"
    finally:
        kernel.kill()
        kernel.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == [], "an orphan"
    (saved,) = list_checkpoints(run / "checkpoints")
    assert int(saved.name.removeprefix("step-")) == trained(run) > 1


# Commands as they are printed

BOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
TEXTS = {name: ["".join(cell["source"]) for cell in book["cells"]] for name, book in BOOKS.items()}
STAGES = [name for name, texts in TEXTS.items() if any("stage_run.prepare(" in text for text in texts)]
LITE = preset("finetune", "lite")
MORE = {  # what stage 2 does at lite scale and not at smoke scale; it once failed there after hours of training
    "10_fine_tuning_ema": [
        *(f"data.{name}={json.dumps(getattr(LITE.data, name))}" for name in ("pairs", "pairs_every", "colorless")),
        f"optimizer.whiten_text_input={json.dumps(LITE.optimizer.whiten_text_input)}",
    ]
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh clone has of the notebooks, of those with a stage the stage alone."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(ROOT / "notebooks" / "params", folder / "notebooks" / "params")
    for name in STAGES:
        write_stage_alone(ROOT / "notebooks" / f"{name}.ipynb", folder / "notebooks" / f"{name}.ipynb")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_the_printed_command_runs_as_printed(fresh, name):
    """All of them failed in a clone: there was no folder `runs`."""
    lines = [line.strip("` ") for text in TEXTS[name] for line in text.splitlines()]
    command = next(line for line in lines if f"papermill notebooks/{name}.ipynb " in line)
    values = {"preset": "smoke", "devices": 1, "overrides": ["steps=2", *MORE.get(name, [])]}
    values |= {one: "lite" for one in ("encoders", "vision") if any(f"\n{one} = " in text for text in TEXTS[name])}
    before = (ROOT / "figures" / "ledger.json").read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = f"{command} --no-progress-bar -y {shlex.quote(json.dumps(values))}"
    ran = subprocess.run(words, shell=True, cwd=fresh, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    outputs = [
        o
        for cell in json.loads((fresh / "runs" / f"{name}.ipynb").read_text())["cells"]
        for o in cell.get("outputs", [])
    ]
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    assert "ok      accelerators" in printed
    run = fresh / yaml.safe_load((ROOT / "notebooks" / "params" / f"{name}.full.yaml").read_text())["run_dir"]
    assert [*run.glob("training/**/final/*config.json")] and (run / "figures" / "ledger.json").is_file()
    assert (ROOT / "figures" / "ledger.json").read_bytes() == before
    if name.startswith("10"):
        assert "stage 2, average" in printed and "ours agree on 32 of the first 32" in printed


@pytest.mark.parametrize("scale", ["lite", "full"])
def test_stage_2_goes_on_from_stage_1(scale):
    stage_1, stage_2 = (
        yaml.safe_load((ROOT / "notebooks" / "params" / f"{name}.{scale}.yaml").read_text(encoding="utf-8"))
        for name in ("09_repa_pretraining", "10_fine_tuning_ema")
    )
    assert stage_2["base"] == f"{stage_1['run_dir']}/training"
    assert stage_1["vision"] == preset("base", scale).repa.vision
    assert stage_1["encoders"] == stage_2["encoders"] == preset("finetune", scale).data.encoders


# What is looked at first


def lacks(findings) -> dict[str, str]:
    return {one.name: one.says for one in findings if one.must and not one.fine}


def test_preflight_names_all_that_the_full_run_lacks_here(tmp_path, monkeypatch):
    """Eight processes on a CPU once passed for eight GPUs, and a disk without room for what is still to be encoded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 0, 9e9))
    full = preset("finetune", "full")
    found = preflight.preflight(full, "runs/x", 8, "cpu")
    missing = lacks(found)
    assert "8 processes on the CPU would take years" in missing["accelerators"]
    assert (
        "nitro-e data encode makes them" in missing["data: data/fluxdb"]
        and "validation data: data/validation" in missing
    )
    assert "must" not in missing and "'' is no folder" in missing["weights to start from"]
    assert "accept its licence" in missing["encoder: meta-llama/Llama-3.2-1B"]  # tests are offline
    assert missing["disk"] == "9 GB free, 24.5 for 4 checkpoints and 5 snapshots"
    for stage, gigabytes in {"distill": 16.5, "sprint": 21.4}.items():  # 12 or, with an average, 16 bytes a parameter
        disk = lacks(preflight.preflight(preset(stage, "full"), "runs/x", 1, "cpu"))["disk"]
        assert disk == f"9 GB free, {gigabytes} for 4 checkpoints"
    (data,) = [one for one in found if one.name == "disk for data"]
    assert not data.fine and not data.must and "text 7.29" in data.says
    with pytest.raises(Unusable, match="the run cannot start: accelerators: none here"):
        preflight.require(found)


def test_preflight_of_shards_and_processes(tmp_path, monkeypatch):
    rows = LatentBatch(torch.zeros(3, 8, 16, 16), [["a"], ["b"], ["c"]])
    write_latents(tmp_path / "mine", [rows], "fingerprint")
    folders = [f"data.folders=[{tmp_path / 'mine'}]", f"data.validation_folders=[{tmp_path / 'mine'}]"]
    found = preflight.preflight(override(preset("base", "smoke"), [*folders, "repa.weight=0.5"]), tmp_path, 1, "cpu")
    missing = lacks(found)
    assert missing.pop("rows in all") == "3; a batch has 8"
    says = "3 rows of latents; text is encoded in training; no vision features and no pictures (--vision, --pictures)"
    assert missing == {f"data: {tmp_path / 'mine'}": says}
    card = tmp_path / "mine" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "pictures": 224}))
    found = preflight.preflight(override(preset("base", "smoke"), [*folders, "repa.weight=0.5"]), tmp_path, 1, "cpu")
    assert lacks(found).keys() == {"rows in all"}, "the vision model looks at the pictures"
    assert any(one.says.endswith("vision features are computed from pictures") for one in found)
    card.write_text("{}")
    found = preflight.preflight(override(preset("base", "smoke"), [*folders, "repa.weight=0.5"]), tmp_path, 1, "cpu")
    assert "card.json is missing or broken" in lacks(found)[f"data: {tmp_path / 'mine'}"]  # found, and not raised

    full = preflight.preflight(preset("distill", "full"), tmp_path, 1, "cpu")
    assert {"teacher", "drawn: data/drawn-full"} < lacks(full).keys()
    for teacher in ("lite", "lite-grpo"):  # a shipped adapter is a model too
        small = preflight.preflight(override(preset("distill", "smoke"), [f"teacher={teacher}"]), tmp_path, 1, "cpu")
        assert not lacks(small) and any("a lesson draws those" in one.says for one in small)

    hub = preflight.preflight(override(preset("distill", "smoke"), ["teacher=amd/Nitro-E"]), tmp_path, 1, "cpu")
    assert "not here, and not to be had" in lacks(hub)["teacher: amd/Nitro-E"]  # looked for there, and no folder

    rewards = override(
        preset("rewards", "smoke"), ["rewards=[[redness, 1], ['http://127.0.0.1:9', 1]]", "prompts=no.jsonl"]
    )
    found = preflight.preflight(rewards, tmp_path, 1, "cpu")
    assert lacks(found).keys() == {"prompts", "reward: http://127.0.0.1:9"}
    assert "Start the server again" in lacks(found)["reward: http://127.0.0.1:9"]
    (told,) = (one.says for one in found if one.name == "reward: redness")
    assert "a red circle, as asked for" in told and f"hours for the run's {4 * 8} pictures" in told

    run = tmp_path / "tuned" / "config.json"  # of the run whose model learns from rewards
    run.parent.mkdir()
    for encoders, missing in (("full", "encoder: meta-llama/Llama-3.2-1B"), ("nowhere", "encoders")):
        run.write_text(json.dumps({"config": {"data": {"encoders": encoders}}}))
        for place in (run.parent, run.parent / "final"):
            started = override(preset("rewards", "smoke"), [f"start_from={place}", "rewards=[[redness, 1]]"])
            assert missing in lacks(preflight.preflight(started, tmp_path, 1, "cpu")), place

    said = handshake.SAYS + '{"backend": "gloo", "world": 2, "right": true, "met": 1.0, "sent": 3e9}'

    def meets(words, count, environment, on_line, restarts):
        assert not restarts  # each would wait as long again
        on_line(said)

    monkeypatch.setattr(launch, "run_processes", meets)
    (batch,) = preflight._shares(preset("base", "smoke"), 3)
    assert not batch.fine and batch.must and batch.says == "8 cannot be divided by 3 processes times accumulate=1"
    gate = threading.Barrier(3, timeout=30)  # servers that take their time are asked at once
    preflight._together(lambda _: gate.wait(), range(3))
    (met,) = preflight._exchange(4, "cpu")
    assert not met.fine and met.says == "gloo: 2 met in 1.0 s; 3.00 GB/s each", "two of four met"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "inside of torchrun" in lacks(preflight.preflight(preset("base", "smoke"), tmp_path, 2, "cpu"))["launcher"]


def test_the_handshake_adds_and_says_how_fast(capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "ACCELERATE_USE_CPU": "true",
        **place,
    }.items():
        monkeypatch.setenv(name, value)
    handshake.main()
    found = json.loads(capsys.readouterr().out.removeprefix(handshake.SAYS))
    assert found["world"] == 1 and found["right"] and found["backend"] == "gloo" and found["seconds"] > 0


HANGS = """
import os, time
from nitro_e_lite.experiments import handshake

handshake.LIMIT, add = 3, handshake.dist.all_reduce
if os.environ["RANK"] == "1":
    handshake.dist.all_reduce = lambda numbers: add(numbers) if numbers.numel() == 1 else time.sleep(100)
handshake.main()
"""


def test_a_hang_of_real_processes_is_named(tmp_path, monkeypatch):
    """They meet and add once, then one hangs; what was said of it once was the last line of a traceback."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script, run = tmp_path / "hangs.py", launch.run_processes
    script.write_text(HANGS)
    monkeypatch.setattr(launch, "run_processes", lambda words, *rest, **machines: run([str(script)], *rest, **machines))
    (met,) = preflight._exchange(2, "cpu")
    hangs = (
        rf"timed out: process [01] on {re.escape(socket.gethostname())} waited 3 s in an all-reduce of 4 MB over gloo"
    )
    assert not met.fine and met.must and re.match(hangs, met.says), met.says


# Runs in notebooks


def test_a_stopped_run_goes_on_first_and_a_finished_one_is_left_or_made_again(tmp_path, capsys):
    config = override(preset("base", "smoke"), ["steps=4", "sample_every=100", "validate_every=100"])
    run = stage_run.StageRun(config, tmp_path / "run", device="cpu")
    stage_run.prepare(run, again=True)
    assert not run.stopped and not run.finished, "nothing was begun, so demonstrations come first"
    engine = Engine(config, Pretrain, run.folder, device="cpu")
    engine.step(), engine.save()
    stage_run.prepare(dataclasses.replace(run, folder=tmp_path / "first"), first=True)
    assert trained(tmp_path / "first") == 4, "asked for, it trains before them"
    stage_run.prepare(run, again=True)  # the same settings: it goes on
    assert run.finished and trained(run.folder) == 4 and "ok      accelerators" in capsys.readouterr().out
    final = run.folder / "final" / "config.json"
    stamp = final.stat().st_mtime_ns
    stage_run.prepare(run)
    assert run.train() == run.folder / "final" and final.stat().st_mtime_ns == stamp
    other = dataclasses.replace(run, config=override(config, ["seed=7"]))
    engine = Engine(dataclasses.replace(config, steps=9), Pretrain, tmp_path / "other", device="cpu")
    engine.step(), engine.save()
    other = dataclasses.replace(other, folder=tmp_path / "other")
    other.start_again()
    assert not (tmp_path / "other").exists(), "made with other settings"
    run.start_again()
    assert not run.folder.exists()


def test_a_long_run_trains_apart(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *words, **options: calls.append(options))
    for steps in (stage_run.SHORT, stage_run.SHORT + 1):
        stage_run.StageRun(override(preset("base", "smoke"), [f"steps={steps}"]), tmp_path / "run", 3).train()
    assert [call["apart"] for call in calls] == [False, True]
    assert all(call["processes"] == 3 and call["resume"] for call in calls)


# The canary


def test_canary_kills_resumes_and_says_go(tmp_path, monkeypatch):
    """In this process: a run that is left in the middle of a step loses what a killed one loses."""
    starts = []

    def start(config, folder, *, resume=False, device, on_line, **_):
        starts.append((config.steps, resume))
        engine = Engine(config, Pretrain, folder, resume, "cpu")
        if not resume:
            step = engine.step

            def dies():
                if engine.global_step == 14:
                    raise launch.LaunchError("killed")
                return step()

            engine.step = dies
        return engine.fit()

    monkeypatch.setattr(launch, "launch", start)
    monkeypatch.setitem(canary.STEADY, "cpu", 0.01)  # a step of a tenth of a second beside another test is not steady
    monkeypatch.setattr(canary.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1e9, 0, 1e9))
    config = override(preset("base", "smoke"), ["steps=20", "optimizer.decay_steps=0"])
    lines = []
    bands = {band.name: band for band in canary.canary(config, tmp_path / "base", device="cpu", on_line=lines.append)}
    assert starts == [(20, False), (20, True)] and "killed after step 14; resumes from step 12" in lines
    assert bands["repeated steps, loss differs by"].measured == 0 and lines[-1] == "GO: 20 steps, one kill, 10 bands"
    disk, stays = bands["disk to come / disk free"].measured, dataclasses.replace(config, snapshot_every=2)
    (more,) = canary._disk(stays, tmp_path / "base-canary", 20)
    snapshot = sum(value.numel() for value in build_on_meta(to_dict(config.model)).state_dict().values()) * 2
    assert 1e9 * (more.measured - disk) == pytest.approx(10 * snapshot)


def test_the_command_looks_first_and_names_all_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in ("distill", "sprint"):
        found = CliRunner().invoke(app, ["train", stage, "--preset", "full", "--device", "cpu", "--canary"])
        assert found.exit_code == 2 and "MISSING drawn: data/drawn-full" in found.stdout
    words = ["train", "1024px", "--preset", "full", "--processes", "8", "--device", "cpu", "--canary"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2 and len(found.stderr.strip().splitlines()) == 1
    for name in (
        "accelerators",
        "data: data/1024px/journeydb",
        "data: data/1024px/fluxdb",
        "validation data",
        "encoder",
    ):
        assert f"MISSING {name}" in found.stdout and f"{name}" in found.stderr
    assert not [*tmp_path.iterdir()]


def rows(losses, **more):
    return [{"step": k, "loss": x, "samples_per_second": 100.0, "memory": 1.0} | more for k, x in enumerate(losses, 1)]


def student(losses):
    """The metrics of a student beside heads, who take turns."""
    turns = rows(losses)
    return [row | {"student_loss": row.pop("loss")} for row in turns] + [{"step": 2, "heads_loss": 0.7}]


@pytest.mark.parametrize(
    ("before", "after", "bad"),
    [
        (rows([3, 2, 1.5]), rows([3, 2, 1.5, 1]), []),
        (rows([3, 2, 1.5]), rows([3, 2, 1.4, 1]), ["repeated steps, loss differs by"]),
        (rows([3, 2]), rows([3, 2, 1.5, 1]), ["repeated steps, loss differs by"]),  # killed too early: nothing repeated
        (rows([1, 2, 2.5]), rows([1, 2, 2.5, 3]), ["loss, last tenth / first tenth"]),
        (rows([3, 2, 1.5]), [*rows([3, 2, 1.5, 1]), {"step": 5, "loss": None}], ["losses that are not finite"]),
        (rows([3, 2, 1.5]), rows([3, 2, 1.5, 1], skipped=1), ["steps skipped"]),
        (rows([3, 2, 1.5]), rows([3, 2, 1.5, 1], memory=9e9), ["memory of a process, peak"]),
        (student([1, 2, 2.5]), student([1, 2, 2.5, 3]), []),  # with a judge beside it
        (student([1, 2, 2.5]), student([1, 2, 2.6, 3]), ["repeated steps, loss differs by"]),
    ],
)
def test_bands_that_stop(before, after, bad):
    bands = canary.judge(preset("base", "smoke"), before, after, 2, 1, "cpu")
    assert [band.name for band in bands if not band.fine] == bad
    assert all(str(band).startswith("STOP" if band.name in bad else "ok") for band in bands)


@pytest.mark.parametrize(
    ("memory", "fine"), [([1.0] * 12 + [1.3] * 18, True), ([1 + k / 100 for k in range(30)], False)]
)
def test_memory_may_step_up_once_and_not_go_on_growing(memory, fine):
    """A checkpoint is a copy that is kept: a third of a small student's memory, and no leak."""
    after = [row | {"memory": one} for row, one in zip(rows(range(32, 2, -1)), memory, strict=True)]
    bands = {band.name: band for band in canary.judge(preset("base", "smoke"), after[:2], after, 0, 1, "cpu")}
    assert bands["memory, end / middle"].fine is fine
